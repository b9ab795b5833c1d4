"""Counts the steps of a run and tells its learner what each one is to be trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithms import Learner, Setup, StepResult, find
from ..checkpoint import Checkpoint
from ..data.store import TaskData
from ..draws import INITIALISE, TASKS, TRAIN, Draws, Seeds, choose
from ..errors import UserError

_STEPS_AHEAD = 64  # that tasks are drawn for at once


class Trainer:
    """Trains a learner of any algorithm on several tasks.

    Every random draw is seeded by (seed, purpose, step): a run continued from a checkpoint draws
    what it would have drawn.

    Args:
        setup: the run's settings, tasks and device.
        data: one entry per task; index = task id.

    Attributes:
        learner: what is trained.
        step: steps done so far.

    Raises:
        UserError: tasks_per_step is above the number of tasks, or a setting of the algorithm does
            not fit the model.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        self.setup = setup
        self.task_count = len(data)
        self.step = 0
        self._settings = setup.config.data
        if self._settings.tasks_per_step > self.task_count:
            raise UserError(
                f"tasks_per_step is {self._settings.tasks_per_step}, but there are only "
                f"{self.task_count} tasks: give at most that many"
            )
        self._seeds = Seeds(setup.config.run.seed)
        self._chosen: dict[int, list[list[int]]] = {}  # first of some steps to the tasks of each
        self._seeds.begin(INITIALISE, 0)
        self.learner: Learner = find(setup.config.algorithm).learner(setup, data)

    def before_step(self) -> dict[str, float]:
        """Let the learner do what is due before the next step; returns what is to be logged.

        Raises:
            ValueError: a gradient or a loss is NaN or infinite.
        """
        return self.learner.before_step(self.step, self._seeds)

    def train_step(self) -> StepResult:
        """One step over some tasks."""
        draws = self._seeds.begin(TRAIN, self.step)
        task_ids = self._choose_tasks()
        self.step += 1
        return self.learner.train_step(self.step, task_ids, draws)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        return self.learner.tensors()

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is of another model size.
        """
        checkpoint.copy_to(self.tensors())
        self.step = checkpoint.step

    def _choose_tasks(self) -> list[int]:
        """The tasks of the next step, drawn on the CPU: a GPU would draw the same.

        Drawing for many steps takes hardly longer than for one.
        """
        count = self._settings.tasks_per_step
        if self._settings.task_sampling == "round-robin":
            return [(self.step * count + i) % self.task_count for i in range(count)]
        if count == self.task_count:
            return list(range(count))
        first = self.step - self.step % _STEPS_AHEAD
        if first not in self._chosen:
            steps = torch.arange(first, first + _STEPS_AHEAD)[:, None]
            draws = Draws(self.setup.config.run.seed, TASKS, steps)
            words, *_ = draws.words(torch.arange(self.task_count))
            self._chosen = {first: choose(words, count).tolist()}
        return self._chosen[first][self.step - first]
