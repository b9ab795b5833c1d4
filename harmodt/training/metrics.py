"""Numbers over training, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..algorithms import StepResult
from ..errors import UserError
from ..files import checksum, read_bytes, write_bytes
from ..rundir import RunDirectory

_CRC = ', "crc32": "'


class Metrics:
    """Writes RUN/metrics.jsonl and RUN/tensorboard.

    A line of metrics.jsonl is a JSON object: the step, what was measured there, and at the end
    `crc32` of the object without it, eight hexadecimal digits.

    Attributes:
        scores: step of every evaluation so far to what the best is chosen by: average success, or
            mean return where environments know no success.

    Args:
        run: the run's directory.
        step: the step that the run stands at; what was written after it is dropped, because the
            run does those steps again.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, run: RunDirectory, step: int):
        self._path = run.metrics
        self.scores: dict[int, float] = {}
        if self._path.exists():
            self._drop_after(step)
        self._file = open(self._path, "a")  # noqa: SIM115 (open while the run goes on)
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
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
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
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        if "mean_return" in values:
            self.scores[step] = values.get("success", values["mean_return"])

    def _drop_after(self, step: int) -> None:
        kept = []
        *lines, _cut_short = read_bytes(self._path).split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None:
                raise UserError(
                    f"line {number} of {self._path} is damaged (its checksum fails): delete that "
                    "line, or restore the file from a copy"
                )
            # What is done before a step, a mask update, belongs to that step.
            if record["step"] + ("harmony" in record) > step:
                continue
            self._remember(int(record["step"]), record)
            kept.append(line + b"\n")
        write_bytes(self._path, b"".join(kept))


def _line(record: Mapping[str, float]) -> str:
    """A record with its checksum, which stands last so that the rest can be had as text."""
    text = json.dumps(record)
    return f'{text[:-1]}{_CRC}{checksum(text.encode())}"}}\n'


def _parse(line: bytes) -> dict[str, float] | None:
    """The numbers of a line with the step that they are of; None where it is damaged."""
    text, _, found = line.partition(_CRC.encode())
    content = text + b"}"
    if found != f'{checksum(content)}"}}'.encode():
        return None
    try:
        record = msgspec.convert(json.loads(content), dict[str, float])
    except (ValueError, RecursionError):
        return None
    return record if record.get("step", -1.0) >= 0 else None
