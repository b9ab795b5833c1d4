"""Chooses the tasks of each training step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import DataSettings
from ..draws import TASKS, Draws, choose
from ..errors import UserError


class TaskOrder:
    """Chooses the tasks of each step of a run. They depend only on the run's seed and the step.

    Args:
        settings: says how many tasks a step has, and how they are chosen.
        tasks: number of tasks in the run.
        seed: the run's seed.

    Raises:
        UserError: `tasks_per_step` is larger than the number of tasks.
    """

    def __init__(self, settings: DataSettings, tasks: int, seed: int):
        if settings.tasks_per_step > tasks:
            raise UserError(
                f"tasks_per_step is {settings.tasks_per_step}, but there are only {tasks} tasks: "
                f"give --tasks-per-step {tasks} or fewer"
            )
        self._settings = settings
        self._tasks = torch.arange(tasks)
        self._seed = seed

    def of(self, steps: range) -> Tensor:
        """Choose the tasks of consecutive steps; the first step of a run is 1.

        Drawing many steps takes about as long as drawing one step.

        Returns:
            Task ids, int64 [S, G], on the CPU.
        """
        count, tasks = self._settings.tasks_per_step, len(self._tasks)
        done = torch.arange(steps.start - 1, steps.stop - 1)[:, None]  # number of earlier steps
        if self._settings.task_sampling == "round-robin":
            return (done * count + torch.arange(count)) % tasks
        if count == tasks:
            return self._tasks.expand(len(steps), -1)
        words, *_ = Draws(self._seed, TASKS, done).words(self._tasks)
        return choose(words, count)
