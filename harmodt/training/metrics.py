"""Numbers over training, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..config import TrainConfig
from ..files import write_bytes
from .trainer import StepResult, learning_rate


class Metrics:
    """Writes RUN/metrics.jsonl and RUN/tensorboard.

    Attributes:
        successes: step of every evaluation so far to its average success.

    Args:
        run: the run's directory.
        step: the step that the run stands at; what was written after it is dropped, because the
            run does those steps again.
    """

    def __init__(self, run: Path, step: int):
        self._path = run / "metrics.jsonl"
        self.successes: dict[int, float] = {}
        if self._path.exists():
            self._drop_after(step)
        self._file = open(self._path, "a")  # noqa: SIM115 (open while the run goes on)
        self._board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the best evaluation so far, the last of equals, and its success."""
        if not self.successes:
            return None
        return max(self.successes.items(), key=lambda item: (item[1], item[0]))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write some numbers of one step."""
        if "success" in values:
            self.successes[step] = values["success"]
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_steps(
        self,
        step: int,
        config: TrainConfig,
        tasks: Sequence[str],
        results: Sequence[StepResult],
        losses: Tensor,
    ) -> None:
        """Write the means over the last steps: loss, each task's loss, gradient norm.

        Args:
            step: the last of the steps.
            tasks: all task names.
            results: the steps.
            losses: [steps, G], the results' losses.
        """
        ids = torch.tensor([list(result.tasks) for result in results])
        values = {
            "loss": float(losses.mean()),
            "gradient_norm": float(torch.stack([r.gradient_norm for r in results]).mean()),
            "learning_rate": learning_rate(step, config),
        }
        for task in ids.unique().tolist():
            values[f"loss/{tasks[task]}"] = float(losses[ids == task].mean())
        self.write(step, values)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()

    def _drop_after(self, step: int) -> None:
        kept = []
        for line in self._path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            # A mask update belongs to the step that comes after it.
            if record["step"] + ("harmony" in record) > step:
                continue
            if "success" in record:
                self.successes[record["step"]] = record["success"]
            kept.append(line)
        write_bytes(self._path, "".join(kept).encode())
