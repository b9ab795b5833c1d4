"""A stand-in for a trained policy that acts with Meta-World's scripted experts."""

from __future__ import annotations

import warnings

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from harmodt_kernels import REFERENCE


class ExpertPolicy:
    """The interface of `harmodt.policies.decision.Policy`; remembers what it was told."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks
        self.target_returns = np.arange(1.0, len(tasks) + 1) * 1000
        self.step = 70
        self.mask = "task"
        self.backend = REFERENCE
        self.calls = 0
        self.starts: list[tuple[list[int], int, list[float]]] = []
        self.restarts: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []

    def start(self, task_ids, seed=0, target_returns=None):
        targets = self.target_returns[task_ids] if target_returns is None else target_returns
        self.starts.append((task_ids.tolist(), seed, targets.tolist()))
        self._experts = [ENV_POLICY_MAP[self.tasks[i]]() for i in task_ids]

    def restart(self, rows):
        self.restarts.append(rows.copy())

    def act(self, observations):
        self.calls += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = zip(self._experts, observations, strict=True)
            actions = [expert.get_action(observation) for expert, observation in pairs]
        return np.stack(actions).clip(-1, 1).astype(np.float32)

    def record_rewards(self, rewards):
        self.rewards.append(rewards.copy())
