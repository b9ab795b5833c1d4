"""Cheetah-dir, Cheetah-vel and Ant-dir: families whose tasks differ only in a goal.

Prompt-DT (Xu et al., 2022) and Table 4 of the paper use them. A task's name contains its goal:
`cheetah-vel-0.600` is 0.6 m/s. Each family holds some tasks out as unseen tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import UserError
from .. import EnvironmentFamily, EnvironmentSpec, family
from .expert import load_expert
from .simulator import EPISODE_LENGTH, DirectionAnt, DirectionCheetah, VelocityCheetah, Walker

VELOCITIES = tuple(round(0.075 * number, 3) for number in range(1, 41))
"""The goals of Cheetah-vel, in m/s."""

ANGLES = tuple(np.random.default_rng(0).uniform(0, 2 * math.pi, 50).round(3).tolist())
"""The goals of Ant-dir, in radians. The draw is fixed; the public data have other goals."""


@dataclass(frozen=True)
class Locomotion(EnvironmentFamily):
    """A family of walkers. Each task has a goal, which is a number.

    Any goal makes a task, `<family>-<goal>`. `task_sets` has the family's standard tasks.

    Attributes:
        walker: the class of the environments.
        task_goals: the goals of the standard tasks.
        goal_range: the range of goals that the expert was trained on.
        unseen: the indices of the unseen tasks in `task_goals`.
    """

    goals = 50
    packages = ("mujoco", "gymnasium")
    walker: ClassVar[type[Walker]]
    task_goals: ClassVar[tuple[float, ...]]
    goal_range: ClassVar[tuple[float, float]]
    unseen: ClassVar[tuple[int, ...]]

    @property
    def trained(self) -> tuple[int, ...]:
        """The indices of the training tasks.

        They are the tasks that are not unseen. If all are unseen, all are also training tasks.
        """
        numbers = range(len(self.task_goals))
        return tuple(number for number in numbers if number not in self.unseen) or tuple(numbers)

    @property
    def task_sets(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """The sets of all standard tasks, of the training tasks and of the unseen tasks."""
        name, numbered = self.spec.family, list(enumerate(map(self.task_of, self.task_goals)))
        return {
            name: tuple(task for _, task in numbered),
            f"{name}-train": tuple(task for i, task in numbered if i in self.trained),
            f"{name}-unseen": tuple(task for i, task in numbered if i in self.unseen),
        }

    def task_of(self, goal: float) -> str:
        """The name of the task with a goal: it has three decimals, or more if the goal has more."""
        short = f"{goal:.3f}"
        exact = short if math.isclose(float(short), goal) else np.format_float_positional(goal)
        return f"{self.spec.family}-{exact}"

    def goal_of(self, task: str) -> float:
        """The inverse of `task_of`.

        Raises:
            UserError: there is no task of this name.
        """
        found = re.fullmatch(rf"{self.spec.family}-([0-9]+(?:\.[0-9]+)?)", task)
        if found is None or not float(found[1]) < 100:
            raise UserError(
                f"there is no task {task!r}: name {', '.join(self.task_sets)}, or a goal such as "
                f"{self.task_of(self.task_goals[0])}"
            )
        return float(found[1])

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        """As `EnvironmentFamily.resolve_tasks`."""
        if not names:
            raise UserError(f"no task is named: name tasks, or the set {self.spec.family}")
        sets, tasks = self.task_sets, list[str]()
        for name in map(str.lower, map(str.strip, names)):
            tasks.extend(sets[name] if name in sets else [self.task_of(self.goal_of(name))])
        return tuple(dict.fromkeys(tasks))

    def make(self, task: str, goal_seed: int = 0) -> Walker:
        """Make a walker; the seed draws the states in which `reset` begins episodes."""
        return self.walker(task, self.goal_of(task), goal_seed)

    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        """The family's trained policy with the task's goal."""
        expert, goal = load_expert(self.spec.family), np.float64(self.goal_of(task))
        return lambda observation: expert(self.walker.features(observation, goal))

    def draw_goals(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draw goals to train an expert on, float64 [count]."""
        return generator.uniform(*self.goal_range, count)


class CheetahDirection(Locomotion):
    """Run forwards or backwards. Both are training tasks and unseen tasks, as in Prompt-DT."""

    spec = EnvironmentSpec("cheetah-dir", 20, 6, EPISODE_LENGTH, success=False)
    walker = DirectionCheetah
    task_goals = (1.0, -1.0)
    goal_range = (-1.0, 1.0)
    unseen = (0, 1)
    _names: ClassVar = {1.0: "cheetah-dir-forward", -1.0: "cheetah-dir-backward"}

    def draw_goals(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draw one of the two directions for each goal."""
        return generator.choice(np.array(self.task_goals), count)

    def task_of(self, goal: float) -> str:
        return self._names[goal]

    def goal_of(self, task: str) -> float:
        for goal, name in self._names.items():
            if task == name:
                return goal
        raise UserError(
            f"there is no task {task!r}: choose among {', '.join(self.task_sets)}, "
            f"{', '.join(self._names.values())}"
        )


class CheetahVelocity(Locomotion):
    """Run at a speed."""

    spec = EnvironmentSpec("cheetah-vel", 20, 6, EPISODE_LENGTH, success=False)
    walker = VelocityCheetah
    task_goals = VELOCITIES
    goal_range = (0, 3.1)
    unseen = (2, 7, 15, 23, 26)


class AntDirection(Locomotion):
    """Run in a direction."""

    spec = EnvironmentSpec("ant-dir", 27, 8, EPISODE_LENGTH, success=False)
    ends_early = True  # when the ant falls
    walker = DirectionAnt
    task_goals = ANGLES
    goal_range = (0, 2 * math.pi)
    unseen = (6, 17, 23, 30, 41)


def walkers(name: str) -> Locomotion:
    """Return the family of walkers with a name.

    Raises:
        UserError: there is no such family of walkers.
    """
    found = family(name)
    if not isinstance(found, Locomotion):
        raise UserError(f"{name} is not a family of walkers: name one, such as cheetah-vel")
    return found
