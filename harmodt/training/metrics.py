"""Numbers over training, as JSON lines and for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..algorithms import StepResult
from ..rundir import RunDirectory
from .records import Records


class Metrics:
    """Writes RUN/metrics.jsonl and RUN/tensorboard.

    Attributes:
        scores: step of every evaluation so far to what the best is chosen by: average success, or
            mean return where environments know no success.

    Args:
        run: the run's directory.
        step: the step that the run stands at; what was written after it is dropped, because the
            run does those steps again.

    Raises:
        UserError: a line is damaged, or the file holds others.
    """

    def __init__(self, run: RunDirectory, step: int):
        self.scores: dict[int, float] = {}
        self._records = Records(run.metrics, step, timed=False)
        for record in self._records.kept:
            self._remember(int(record["step"]), record)
        self._board = SummaryWriter(run.tensorboard, purge_step=step + 1)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the best evaluation so far, the last of equals, and its score."""
        if not self.scores:
            return None
        return max(self.scores.items(), key=lambda item: (item[1], item[0]))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write some numbers of one step."""
        self._remember(step, values)
        self._records.write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_steps(
        self,
        step: int,
        learning_rate: float,
        tasks: Sequence[str],
        results: Sequence[StepResult],
        losses: Tensor,
    ) -> None:
        """Write the means over the last steps: loss, each task's loss, gradient norm.

        Args:
            step: the last of the steps.
            learning_rate: of that step.
            tasks: all task names.
            results: the steps.
            losses: [steps, G], the results' losses.
        """
        ids = torch.tensor([list(result.task_ids) for result in results])
        values = {
            "loss": float(losses.mean()),
            "gradient_norm": float(torch.stack([r.gradient_norm for r in results]).mean()),
            "learning_rate": learning_rate,
        }
        for task in ids.unique().tolist():
            values[f"loss/{tasks[task]}"] = float(losses[ids == task].mean())
        self.write(step, values)

    def sync(self) -> None:
        """See to it that what was written outlives a crash of the machine."""
        self._records.sync()

    def close(self) -> None:
        """Finish both files."""
        self._records.close()
        self._board.close()

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        if "mean_return" in values:
            self.scores[step] = values.get("success", values["mean_return"])
