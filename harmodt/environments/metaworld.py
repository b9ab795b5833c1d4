"""One Meta-World environment: given goals or random ones, reproducible to the bit."""

from __future__ import annotations

import functools
from typing import Any

import metaworld
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from .metaworld_names import ACTION_SIZE, EPISODE_LENGTH, OBSERVATION_SIZE

__all__ = ["ACTION_SIZE", "EPISODE_LENGTH", "OBSERVATION_SIZE", "Environment"]


@functools.lru_cache(maxsize=64)
def _make_goals(task: str, goal_seed: int) -> list[metaworld.Task]:
    """The 50 goals of Meta-World's MT1 benchmark; drawing them takes more than half a second."""
    return metaworld.MT1(task, seed=goal_seed).train_tasks


class Environment:
    """One task of Meta-World, with the goal visible in the observation.

    An episode depends on the task, its goal and the actions alone, bit for bit: not on what
    was run before in the same object.

    Args:
        task: a v3 task name.
        goal_seed: seed of the 50 goals among which `reset` chooses (metaworld.MT1).
        options: passed to Meta-World's class: render_mode, camera_name, camera_id, width, height.
    """

    def __init__(self, task: str, goal_seed: int = 0, **options: Any) -> None:
        self.task = task
        self.goal_seed = goal_seed
        self._env = ALL_V3_ENVIRONMENTS[task](**options)
        # As in Meta-World's own "goal-observable" classes; the cached space hides the goal.
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env._set_task_called = True
        self._env.seeded_rand_vec = True

    @property
    def goals(self) -> int:
        """Number of goals that `reset` knows, 50."""
        return len(_make_goals(self.task, self.goal_seed))

    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode with one of the `goals`; returns the observation, float64 [39]."""
        self._env.set_task(_make_goals(self.task, self.goal_seed)[goal_index])
        return self._env.reset()[0]

    def reset_random(self, seed: int) -> np.ndarray:
        """Begin an episode with a goal drawn from the task's whole range by `seed`."""
        self._env._freeze_rand_vec = False
        self._env.seed(seed)
        return self._env.reset()[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Execute an action [4], taken as float32 and clipped to [-1, 1].

        Returns the observation, float64 [39], the reward and whether the task is solved now.

        Raises:
            ValueError: the action is not finite, or the episode has had its 500 steps.
        """
        action = np.asarray(action, np.float32)
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: the action {action} is not finite")
        observation, reward, _, _, info = self._env.step(action.clip(-1, 1))
        return observation, float(reward), bool(info["success"])

    def render(self) -> np.ndarray:
        """The current picture, uint8 [height, width, 3]; needs render_mode="rgb_array"."""
        return self._env.render()

    def close(self) -> None:
        """Release the renderer."""
        self._env.close()
