"""Families of environments.

The tasks of a family share a simulator, the sizes of observations and actions, and the episode
length. Each family is a subclass of `EnvironmentFamily`, and has a row in `FAMILIES`. Only `make`
and `expert` import simulators, so a run can read data and train without them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..settings import Count

METAWORLD = "metaworld"

FAMILIES: dict[str, str] = {
    METAWORLD: "harmodt.environments.metaworld:MetaWorld",
    "metaworld-repeat-2": "harmodt.environments.metaworld:RepeatedMetaWorld",
    "cheetah-dir": "harmodt.environments.locomotion:CheetahDirection",
    "cheetah-vel": "harmodt.environments.locomotion:CheetahVelocity",
    "ant-dir": "harmodt.environments.locomotion:AntDirection",
}
"""The name of every family, and its module and class."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """The description of a family. Stores, runs and evaluations record it.

    Attributes:
        family: the family's name.
        observation_size, action_size: how many numbers an observation and an action have.
        episode_length: steps after which an episode ends; a success does not end it.
        success: whether the family says if a task is solved. If not, an episode has only a return.
        reward_version: name of the reward function, for a simulator that has several; None if the
            simulator has only one or the name is not known.
    """

    family: str
    observation_size: Count
    action_size: Count
    episode_length: Count
    success: bool
    reward_version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The attributes as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EnvironmentSpec:
        """The inverse of `to_json`."""
        return cls(**values)


class Scene(NamedTuple):
    """Everything that is needed to film an environment that MuJoCo simulates."""

    model: Any  # mujoco.MjModel
    data: Any  # mujoco.MjData
    camera: str
    upside_down: bool  # whether the camera hangs upside down
    steps_per_second: int


class Environment(ABC):
    """An environment of one task. The same start and actions give the same episode, bit for bit.

    Environments advance in lock-step, so every episode has the family's `episode_length` steps. If
    a simulation ends earlier, the environment stands still and gives the reward 0.
    """

    @abstractmethod
    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode at one of the task's starts.

        Args:
            goal_index: the index of the start, from 0 to the family's `goals` - 1.

        Returns:
            The observation, float64 [observation_size].
        """

    @abstractmethod
    def reset_random(self, seed: int) -> np.ndarray:
        """As `reset`, but `seed` draws the start from all possible starts of the task."""

    @abstractmethod
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Execute an action, clipped to [-1, 1].

        Returns:
            The observation, float64 [observation_size]; the reward; and whether the task is solved
            now, which is always False in a family without success.

        Raises:
            ValueError: the action is not finite, or the episode is over.
        """

    @property
    def ended(self) -> bool:
        """Whether the simulation ended before the episode's length."""
        return False

    @property
    def scene(self) -> Scene:
        """The scene to film now."""
        raise NotImplementedError(f"{type(self).__name__} cannot be filmed")


class EnvironmentFamily(ABC):
    """A family's tasks and sizes, and the methods that make its environments and experts.

    A family is a value: a frozen dataclass, which can be compared, hashed and pickled.

    Attributes:
        spec: the description of the environments that `make` returns.
        goals: number of starts that a goal seed draws for a task. In Meta-World each start has its
            own goal.
        ends_early: whether the simulation can end an episode before `spec.episode_length` steps.
        reward_versions: names of the simulator's reward functions, if it has several.
        packages: names of the packages whose versions affect results.
        task_sets: the tasks of each set, by the name of the set.
    """

    spec: EnvironmentSpec
    goals: int
    ends_early: bool = False
    reward_versions: tuple[str, ...] = ()
    packages: tuple[str, ...]
    task_sets: Mapping[str, tuple[str, ...]]

    @abstractmethod
    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        """Turn names of tasks and sets into tasks, in the given order and without repeats.

        Raises:
            UserError: there is no name, or a name does not exist.
        """

    @abstractmethod
    def make(self, task: str, goal_seed: int = 0) -> Environment:
        """Make an environment for a task; `goal_seed` draws the starts that `reset` can choose."""

    @abstractmethod
    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        """Make a policy that solves the task; it maps an observation to an action.

        The policy may have a state, so make a new one for each episode.

        Raises:
            UserError: the family has no expert.
        """


def family(name: str) -> EnvironmentFamily:
    """Return the family with a name.

    Raises:
        UserError: there is no such family.
    """
    if name not in FAMILIES:
        raise UserError(
            f"there is no environment family {name!r}: choose from {', '.join(FAMILIES)}"
        )
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def family_of(tasks: Sequence[str]) -> EnvironmentFamily:
    """Return the family that has the tasks of these names.

    Raises:
        UserError: no family has all tasks. If the first task begins with the name of a family, the
            error says what this family lacks; else it says what Meta-World lacks.
    """
    reasons: dict[str, UserError] = {}
    for name in FAMILIES:
        try:
            family(name).resolve_tasks(tasks)
            return family(name)
        except UserError as error:
            reasons[name] = error
    likely = (name for name in FAMILIES if tasks and tasks[0].lower().startswith(name))
    raise reasons[next(likely, METAWORLD)]
