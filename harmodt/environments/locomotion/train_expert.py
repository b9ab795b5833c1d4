"""Train the expert of a family of walkers, by soft actor-critic on random goals.

    python -m harmodt.environments.locomotion.train_expert cheetah-vel

It needs the packages of harmodt[experts]. Half of each batch's transitions get another goal and the
reward for this goal (Andrychowicz et al., "Hindsight experience replay", 2017). This reward follows
from the transition's velocity.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
import tyro
from safetensors.torch import save
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv

from ...errors import run_command
from ...files import write_bytes
from ...settings import Count, Positive, Whole, check, parse_arguments
from . import Locomotion, walkers
from .expert import WEIGHTS, Expert
from .measure_expert import expert_returns
from .simulator import EPISODE_LENGTH


@dataclass(frozen=True)
class TrainExpertConfig:
    """Train the expert of a family of walkers, by soft actor-critic on random goals."""

    family: Annotated[str, tyro.conf.Positional]
    """cheetah-dir, cheetah-vel or ant-dir."""
    output: Path = WEIGHTS
    """Directory in which FAMILY.safetensors is written."""
    steps: Count = 500_000
    """Total number of environment steps."""
    environments: Count = 4
    """Number of environments that collect transitions."""
    evaluate_every: Count = 25_000
    """Steps between evaluations on the family's standard goals; the best expert is kept."""
    progress_weight: Positive = 1.0
    """Factor of the reward for progress in training. With 1, an ant first learns to stand still."""
    seed: Whole = 0
    """Seed of all random draws."""


class GoalEnvironment(gymnasium.Env):
    """A walker with a new goal in each episode; its observations are the expert's inputs."""

    def __init__(self, family: Locomotion, progress_weight: float, seed: int) -> None:
        self.family = family
        self._weight = progress_weight
        self._rng = np.random.default_rng(seed)
        self._walker = family.make(family.task_of(family.task_goals[0]))
        self._observation = self._walker.reset_random(0)
        size = len(family.walker.features(self._observation, np.float64(0)))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (family.spec.action_size,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._walker.goal = float(self.family.draw_goals(self._rng, 1)[0])
        self._observation = self._walker.reset_random(int(self._rng.integers(2**31)))
        self._steps = 0
        return self._seen(), {}

    def step(self, action: np.ndarray) -> Any:
        before = self._observation
        self._observation, reward, _ = self._walker.step(action)
        self._steps += 1
        velocity, goal = self._walker.velocity, np.float64(self._walker.goal)
        progress = float(self._walker.progress(velocity, goal))
        rest = reward - progress
        reward += (self._weight - 1) * progress
        raw = np.concatenate([before, self._observation, velocity, [rest]])
        truncated = self._steps == EPISODE_LENGTH
        return self._seen(), reward, self._walker.ended, truncated, {"raw": raw}

    def _seen(self) -> np.ndarray:
        goal = np.float64(self._walker.goal)
        return self.family.walker.features(self._observation, goal).astype(np.float32)


class RelabellingBuffer(ReplayBuffer):
    """A replay buffer that gives half of each batch other goals."""

    def __init__(
        self, *args: Any, family: Locomotion, progress_weight: float, seed: int, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._family = family
        self._weight = progress_weight
        self._rng = np.random.default_rng(seed)
        # Each row: the observations before and after the step, the velocity [2], and the reward
        # without its part for progress.
        width = 2 * family.spec.observation_size + 3
        self._raw = np.zeros((self.buffer_size, self.n_envs, width), np.float32)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
        self._raw[self.pos] = [info["raw"] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        rows = self._rng.integers(self.buffer_size if self.full else self.pos, size=batch_size)
        columns = self._rng.integers(self.n_envs, size=batch_size)
        chosen = rows, columns
        observations, after = self.observations[chosen], self.next_observations[chosen]
        rewards = self.rewards[chosen]
        half = batch_size // 2
        observations[:half], after[:half], rewards[:half] = self._relabelled(
            self._raw[rows[:half], columns[:half]]
        )
        ended = self.dones[chosen] * (1 - self.timeouts[chosen])
        parts = (observations, self.actions[chosen], after, ended[:, None], rewards[:, None])
        return ReplayBufferSamples(*map(self.to_torch, parts))

    def _relabelled(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = self._family.spec.observation_size
        before, after, velocity, rest = np.split(raw, (size, 2 * size, 2 * size + 2), axis=1)
        goals = self._family.draw_goals(self._rng, len(raw)).astype(np.float32)
        rewards = self._weight * self._family.walker.progress(velocity, goals) + rest[:, 0]
        features = self._family.walker.features
        return features(before, goals), features(after, goals), rewards


class KeepBest(BaseCallback):
    """Evaluates the deterministic policy at intervals and writes the best one."""

    def __init__(self, family: Locomotion, path: Path, every: int) -> None:
        super().__init__()
        self._family = family
        self._path = path
        self._every = every
        self._due = every
        self._best = -np.inf
        self._began = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._due:
            self._due += self._every
            content = save(_weights(self.model))  # type: ignore[arg-type]
            returns = expert_returns(self._family, Expert.read(content), episodes=1)
            mean = float(np.mean(returns))
            seconds = time.perf_counter() - self._began
            print(f"{self.num_timesteps} steps, {seconds:.0f} s: {mean:.1f}", flush=True)
            if mean > self._best:
                self._best = mean
                write_bytes(self._path, content)
        return True


def train_expert(config: TrainExpertConfig) -> None:
    """Train an expert, and write the weights with the highest mean return."""
    check(config)
    family = walkers(config.family)
    torch.set_num_threads(1)  # the layers are small
    weight = config.progress_weight
    makers: list[Callable[[], gymnasium.Env]] = [
        partial(GoalEnvironment, family, weight, 1000 * config.seed + number)
        for number in range(config.environments)
    ]
    model = SAC(
        "MlpPolicy",
        DummyVecEnv(makers),
        learning_rate=5e-4,
        buffer_size=1_000_000,
        learning_starts=min(10_000, config.steps // 10),
        batch_size=128,
        tau=0.01,
        gamma=0.99,
        train_freq=8,
        gradient_steps=16,
        replay_buffer_class=RelabellingBuffer,
        replay_buffer_kwargs={"family": family, "progress_weight": weight, "seed": config.seed},
        policy_kwargs={"net_arch": [256, 256], "optimizer_kwargs": {"fused": True}},
        seed=config.seed,
    )
    path = config.output / f"{config.family}.safetensors"
    model.learn(config.steps, callback=KeepBest(family, path, config.evaluate_every))


def _weights(model: SAC) -> dict[str, torch.Tensor]:
    actor = model.actor
    layers = [layer for layer in actor.latent_pi if isinstance(layer, torch.nn.Linear)]
    layers.append(actor.mu)  # type: ignore[arg-type]
    named = {}
    for number, layer in enumerate(layers):
        named[f"{number}.weight"] = layer.weight.detach().contiguous()
        named[f"{number}.bias"] = layer.bias.detach().contiguous()
    return named


def main() -> None:
    config: TrainExpertConfig = parse_arguments(
        TrainExpertConfig, prog="python -m harmodt.environments.locomotion.train_expert"
    )
    train_expert(config)


if __name__ == "__main__":
    run_command(main)
