"""What policies act in: families of tasks that share a simulator, sizes and a length of episodes.

A family is a module with a subclass of `EnvironmentFamily`, and a row of `FAMILIES`. Simulators
are imported by `make` and `expert` alone, so that data can be read and trained on without them.
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
"""Name of every family, and the module and class that are it."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """What data, runs and evaluations record of a family.

    Attributes:
        family: its name.
        observation_size, action_size: numbers in an observation and in an action.
        episode_length: steps after which an episode ends; it goes on after a success.
        success: whether the family says if a task is solved; else there is a return alone.
        reward_version: of the reward function, where a simulator has several; None where it is
            not known, or there is one only.
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
    """What a camera needs to film an environment that MuJoCo simulates."""

    model: Any  # mujoco.MjModel
    data: Any  # mujoco.MjData
    camera: str
    upside_down: bool  # whether the camera hangs so
    steps_per_second: int


class Environment(ABC):
    """One task. An episode depends on its start and the actions alone, bit for bit.

    Environments advance in lock-step, so every episode has the family's `episode_length` steps:
    where a simulation ends before that, the environment stands still and gives no reward.
    """

    @abstractmethod
    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode at one of the family's `goals`; returns the observation, float64."""

    @abstractmethod
    def reset_random(self, seed: int) -> np.ndarray:
        """Begin an episode drawn by `seed` from all that the task may begin with."""

    @abstractmethod
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Execute an action, clipped to [-1, 1].

        Returns the observation, float64 [observation_size], the reward, and whether the task is
        solved now: always False in a family without success.

        Raises:
            ValueError: the action is not finite, or the episode is over.
        """

    @property
    def ended(self) -> bool:
        """Whether the simulation came to its end before the episode's length."""
        return False

    @property
    def scene(self) -> Scene:
        """What to film now."""
        raise NotImplementedError(f"{type(self).__name__} cannot be filmed")


class EnvironmentFamily(ABC):
    """Tasks, sizes, and how to make an environment.

    A family is a value: a frozen dataclass, which can be compared, hashed and pickled.

    Attributes:
        spec: sizes and the like, of the environments that `make` returns.
        goals: how many starts of an episode a task has for a goal seed: goals in Meta-World.
        ends_early: whether the simulation can end an episode before `spec.episode_length` steps.
        reward_versions: names of the simulator's reward functions, where it has several.
        packages: names of the packages whose versions results depend on.
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
        """The tasks that a person's names and sets mean, in that order and without repeats.

        Raises:
            UserError: no name at all, or one that does not exist.
        """

    @abstractmethod
    def make(self, task: str, goal_seed: int = 0) -> Environment:
        """An environment for a task; `goal_seed` draws the `goals` that its `reset` knows."""

    @abstractmethod
    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        """A policy that solves the task, for one episode: from observation to action.

        Raises:
            UserError: there is none.
        """


def family(name: str) -> EnvironmentFamily:
    """The family of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise UserError(
            f"there is no environment family {name!r}: choose from {', '.join(FAMILIES)}"
        )
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def family_of(tasks: Sequence[str]) -> EnvironmentFamily:
    """The family that has the tasks of these names.

    Raises:
        UserError: none has them all; it is that of the family of the first.
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
