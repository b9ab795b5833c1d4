"""A stand-in for a trained policy that acts with a family's scripted experts."""

from __future__ import annotations

import copy

import numpy as np

from harmodt.environments import METAWORLD, family


class ExpertPolicy:
    """Implements `harmodt.policies.Policy`, and remembers what it was told."""

    step = 70
    mask = "task"
    unseen = None
    backend = "reference"
    precision = "fp32"
    device = "cpu"
    plans = None

    def __init__(self, *tasks: str, environment: str = METAWORLD) -> None:
        self.tasks = tasks
        self.target_returns = np.arange(1.0, len(tasks) + 1) * 1000
        self.environment = family(environment).spec
        self.acted: list[range | None] = []  # the part of each call
        self.seen: list[np.ndarray] = []
        self.starts: list[tuple[list[int], int, list[float]]] = []
        self.restarts: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []

    def copy(self) -> ExpertPolicy:
        """Another one, which adds to the same lists."""
        return copy.copy(self)

    def start(
        self,
        task_ids: np.ndarray,
        seed: int = 0,
        target_returns: np.ndarray | None = None,
        part: range | None = None,
    ) -> None:
        targets = self.target_returns[task_ids] if target_returns is None else target_returns
        self.starts.append((task_ids.tolist(), seed, targets.tolist()))
        expert = family(self.environment.family).expert
        self._part = part
        self._experts = [
            expert(self.tasks[i]) for i in (task_ids if part is None else task_ids[part])
        ]

    def restart(self, rows: np.ndarray) -> None:
        self.restarts.append(rows.copy())

    def act(self, observations: np.ndarray) -> np.ndarray:
        self.acted.append(self._part)
        self.seen.append(observations)
        pairs = zip(self._experts, observations, strict=True)
        actions = np.stack([expert(observation) for expert, observation in pairs])
        return actions.clip(-1, 1).astype(np.float32)

    def record_rewards(self, rewards: np.ndarray) -> None:
        self.rewards.append(rewards.copy())
