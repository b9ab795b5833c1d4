"""Meta-World: fifty tasks of a simulated robot arm. The observation contains the goal."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import METAWORLD, Environment, EnvironmentFamily, EnvironmentSpec, Scene
from .metaworld_names import TASK_SETS, resolve_tasks

REWARD_VERSION = "v2"
"""The default one of the two reward functions that every v3 environment has."""


@dataclass(frozen=True)
class MetaWorld(EnvironmentFamily):
    """The environments of the package `metaworld`."""

    spec = EnvironmentSpec(
        family=METAWORLD,
        observation_size=39,
        action_size=4,
        episode_length=500,
        success=True,
        reward_version=REWARD_VERSION,
    )
    goals = 50
    reward_versions = ("v1", "v2")
    packages = ("metaworld", "mujoco", "gymnasium")
    task_sets = TASK_SETS

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        return resolve_tasks(names)

    def make(self, task: str, goal_seed: int = 0) -> MetaWorldEnvironment:
        """Make an environment with the goals of `metaworld.MT1(task, goal_seed)`."""
        return MetaWorldEnvironment(task, goal_seed)

    def expert(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        """Meta-World's scripted policy for the task."""
        from metaworld.policies import ENV_POLICY_MAP

        policy = ENV_POLICY_MAP[task]()  # type: ignore[abstract]

        def act(observation: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():  # the policy warns that its constants may be too high
                warnings.simplefilter("ignore", UserWarning)
                return policy.get_action(observation)

        return act


class RepeatedMetaWorld(MetaWorld):
    """The same tasks with 100 actions per episode, each executed twice.

    TD-MPC2's data were made in this way (Hansen et al., 2024). Returns and the effects of actions
    differ from `MetaWorld`, so this is a separate family.
    """

    spec = replace(MetaWorld.spec, family="metaworld-repeat-2", episode_length=100)

    def make(self, task: str, goal_seed: int = 0) -> RepeatedEnvironment:
        """As `MetaWorld.make`."""
        return RepeatedEnvironment(task, goal_seed)


class MetaWorldEnvironment(Environment):
    """One task of Meta-World.

    Task, goal and actions determine an episode to the bit. Earlier episodes of the same object
    do not affect it.

    Args:
        task: a v3 task name.
        goal_seed: seed of the 50 goals that `reset` chooses from (metaworld.MT1).
    """

    def __init__(self, task: str, goal_seed: int = 0) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.task = task
        self.goal_seed = goal_seed
        self._env = ALL_V3_ENVIRONMENTS[task](reward_function_version=REWARD_VERSION)
        # These two lines show the goal, as Meta-World's "goal-observable" classes do. The second
        # deletes a cached observation space that would hide the goal.
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)
        # `reset_random` needs these two lines, because it calls no `set_task` and gives a seed.
        self._env._set_task_called = True
        self._env.seeded_rand_vec = True

    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode with one of the 50 goals; return the observation, float64 [39]."""
        self._env.set_task(_make_goals(self.task, self.goal_seed)[goal_index])
        return self._env.reset()[0]

    def reset_random(self, seed: int) -> np.ndarray:
        """Begin an episode with a goal that `seed` draws from the task's whole range."""
        self._env._freeze_rand_vec = False
        self._env.seed(seed)
        return self._env.reset()[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """As `Environment.step`. The action [4] is converted to float32."""
        action = np.asarray(action, np.float32)
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: the action {action} is not finite")
        observation, reward, _, _, info = self._env.step(action.clip(-1, 1))
        return observation, float(reward), bool(info["success"])

    @property
    def scene(self) -> Scene:
        """The view of the camera that is closest to table and gripper."""
        model, data = self._env.model, self._env.data
        return Scene(model, data, camera="corner4", upside_down=True, steps_per_second=80)


class RepeatedEnvironment(MetaWorldEnvironment):
    """One task of Meta-World in which every action is executed twice.

    As in TD-MPC2, an episode begins with one hidden step with the action 0. The reward is the sum
    of the two steps' rewards. The task counts as solved if it is solved after the second step.
    """

    _left = 0  # steps that are left in the episode; 0 until `reset`

    def reset(self, goal_index: int) -> np.ndarray:
        return self._rest(super().reset(goal_index))

    def reset_random(self, seed: int) -> np.ndarray:
        return self._rest(super().reset_random(seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """As `MetaWorldEnvironment.step`."""
        if self._left == 0:
            raise ValueError(f"{self.task}: the episode is over")
        _, first, _ = super().step(action)
        observation, second, solved = super().step(action)
        self._left -= 1
        return observation, first + second, solved

    @property
    def scene(self) -> Scene:
        return super().scene._replace(steps_per_second=super().scene.steps_per_second // 2)

    def _rest(self, observation: np.ndarray) -> np.ndarray:
        super().step(np.zeros(MetaWorld.spec.action_size))
        self._left = RepeatedMetaWorld.spec.episode_length
        return observation


def task_of_class(name: str) -> str:
    """The v3 name of the task whose environment is Meta-World's class `name`."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return {kind.__name__: task for task, kind in ALL_V3_ENVIRONMENTS.items()}[name]


@functools.lru_cache(maxsize=64)
def _make_goals(task: str, goal_seed: int) -> list[Any]:
    """The goals of Meta-World's MT1 benchmark, cached because a draw takes over half a second."""
    import metaworld

    return metaworld.MT1(task, seed=goal_seed).train_tasks
