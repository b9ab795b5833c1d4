"""Which tasks each step of a run is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import DataSettings
from ..draws import TASKS, Draws, choose
from ..errors import UserError


class TaskOrder:
    """The tasks of every step of a run, each a function of the step alone.

    Args:
        settings: tasks of a step, and how they are chosen.
        tasks: number of tasks.
        seed: of the run.

    Raises:
        UserError: tasks_per_step is above the number of tasks.
    """

    def __init__(self, settings: DataSettings, tasks: int, seed: int):
        if settings.tasks_per_step > tasks:
            raise UserError(
                f"tasks_per_step is {settings.tasks_per_step}, but there are only {tasks} tasks: "
                "give at most that many"
            )
        self._settings = settings
        self._tasks = torch.arange(tasks)
        self._seed = seed

    def of(self, steps: range) -> Tensor:
        """The tasks of some consecutive steps, counted from 1: int64 [S, G] on the CPU.

        Drawing for many steps takes hardly longer than for one.
        """
        count, tasks = self._settings.tasks_per_step, len(self._tasks)
        done = torch.arange(steps.start - 1, steps.stop - 1)[:, None]  # steps before each
        if self._settings.task_sampling == "round-robin":
            return (done * count + torch.arange(count)) % tasks
        if count == tasks:
            return self._tasks.expand(len(steps), -1)
        words, *_ = Draws(self._seed, TASKS, done).words(self._tasks)
        return choose(words, count)
