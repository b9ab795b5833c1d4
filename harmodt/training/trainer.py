"""Counts the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..algorithms import Learner, Setup, StepResult, find
from ..checkpoint import Checkpoint
from ..data.store import TaskData
from ..draws import INITIALISE, Seeds


class Trainer:
    """Trains a learner of any algorithm on several tasks.

    Whatever is random in a step follows from (seed, purpose, step): a run continued from a
    checkpoint draws what it would have drawn.

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
        Seeds(setup.config.run.seed).begin(INITIALISE, 0)
        self.learner: Learner[Any] = find(setup.config.algorithm).learner(setup)
        self.learner.prepare_training(data)

    def before_step(self) -> dict[str, float]:
        """Let the learner do what is due before the next step; returns what is to be logged.

        Raises:
            ValueError: a gradient or a loss is NaN or infinite.
        """
        return self.learner.before_step(self.step)

    def train_step(self) -> StepResult:
        """One step over some tasks."""
        self.step += 1
        return self.learner.train_step(self.step)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        return self.learner.tensors()

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is of another model size.
        """
        self.learner.load(checkpoint)
        self.step = checkpoint.step
