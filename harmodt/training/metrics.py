"""Writes the numbers of training as JSON lines and for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..algorithms import StepResult
from ..rundir import RunDirectory
from .records import Records


class Metrics:
    """Writes RUN/metrics.jsonl and RUN/tensorboard.

    Attributes:
        scores: the score of every evaluation so far, by step. The score is the average success, or
            the mean return where the environments do not report success.
        best: step and score of the best evaluation so far; the later one if two are equal. None
            before the first evaluation.

    Args:
        run: the run's directory.
        step: the run's last step so far. Records of later steps are dropped (`Records`).

    Raises:
        UserError: a line is damaged, or the file holds other records.
    """

    def __init__(self, run: RunDirectory, step: int):
        self.scores: dict[int, float] = {}
        self.best: tuple[int, float] | None = None
        self._records = Records(run.metrics, step, timed=False)
        for record in self._records.kept:
            self._remember(int(record["step"]), record)
        self._board: Any = SummaryWriter(run.tensorboard, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of one step."""
        self._remember(step, values)
        self._records.write({"step": step, **values})
        # Write one event for all numbers: `add_scalar` would write one for each, which is slow.
        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._board.file_writer.add_summary(Summary(value=numbers), step)

    def write_steps(
        self,
        step: int,
        learning_rate: float,
        tasks: Sequence[str],
        results: Sequence[StepResult],
        losses: Tensor,
    ) -> float:
        """Write the means over some steps: loss, loss of each task, gradient norm.

        Args:
            step: the last of the steps.
            learning_rate: the learning rate of that step.
            tasks: the names of all tasks; index = task id.
            results: the results of the steps.
            losses: the losses of the results, [steps, tasks in a step] on the CPU.

        Returns:
            The mean loss.
        """
        ids = torch.tensor([list(result.task_ids) for result in results]).flatten()
        counts = torch.bincount(ids, minlength=len(tasks))
        sums = torch.bincount(ids, losses.flatten().double(), minlength=len(tasks))
        loss = float(losses.double().mean())
        values = {
            "loss": loss,
            "gradient_norm": float(torch.stack([r.gradient_norm for r in results]).mean()),
            "learning_rate": learning_rate,
        }
        for name, mean, count in zip(tasks, (sums / counts).tolist(), counts.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = mean
        self.write(step, values)
        return loss

    def sync(self) -> None:
        """Wait until the disk has all records, so that a crash of the machine loses none."""
        self._records.sync()

    def close(self) -> None:
        """Close both files."""
        self._records.close()
        self._board.close()

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        if "mean_return" not in values:
            return
        score = values.get("success", values["mean_return"])
        self.scores[step] = score
        if self.best is None or score >= self.best[1]:
            self.best = (step, score)
