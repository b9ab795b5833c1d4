"""A family of environments that is nothing like Meta-World: short, of other sizes, no success."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from harmodt.environments import Environment, EnvironmentFamily, EnvironmentSpec


class WalkEnvironment(Environment):
    """The action is a speed along a line, at most 1; the goal's index is the reward for it."""

    def reset(self, goal_index: int) -> np.ndarray:
        self.goal, self.place = goal_index, 0.0
        return np.array([self.place, self.goal])

    def reset_random(self, seed: int) -> np.ndarray:
        return self.reset(seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self.place += action[0]
        return np.array([self.place, self.goal]), self.goal * float(action[0]), False


class Walk(EnvironmentFamily):
    spec = EnvironmentSpec("walk", 2, 1, 7, success=False)
    goals = 6
    packages = ("numpy", "rich")
    task_sets: Mapping[str, tuple[str, ...]] = MappingProxyType({"both": ("left", "right")})

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(task for name in names for task in self.task_sets.get(name, (name,)))

    def make(self, task: str, goal_seed: int = 0) -> WalkEnvironment:
        return WalkEnvironment()

    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        direction = {"left": -1.0, "right": 1.0}[task]
        return lambda observation: np.array([direction])
