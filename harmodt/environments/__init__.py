"""Families of environments: tasks that share a simulator, sizes and an episode length.

A family is a module with a subclass of `EnvironmentFamily`, and a row of `FAMILIES`. Only `make`
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
    """The description of a family that data, runs and evaluations record.

    Attributes:
        family: the family's name.
        observation_size, action_size: numbers in an observation and in an action.
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
        """Begin an episode at one of the family's `goals`; return the observation, float64."""

    @abstractmethod
    def reset_random(self, seed: int) -> np.ndarray:
        """Begin an episode at a start that `seed` draws from all possible starts of the task."""

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
    """Tasks, sizes, and how to make an environment.

    A family is a value: a frozen dataclass, which can be compared, hashed and pickled.

    Attributes:
        spec: the description of the environments that `make` returns.
        goals: number of starts that a task has for each goal seed; in Meta-World these are goals.
        ends_early: whether the simulation can end an episode before `spec.episode_length` steps.
        reward_versions: names of the simulator's reward functions, if it has several.
        packages: names of the packages whose versions affect results.
        task_sets: names that stand for several tasks.
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
        """Make an environment for a task; `goal_seed` draws the `goals` of its `reset`."""

    @abstractmethod
    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        """Make a policy that solves the task in one episode; it maps observation to action.

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
        UserError: no family has all tasks. The error is that of the family whose name the first
            task begins with, or that of Meta-World.
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
