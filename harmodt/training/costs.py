"""The wall-clock time and the memory that a run has taken so far."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from ..rundir import RunDirectory
from .records import Record, Records

PARTS = ("masks and harmony", "evaluations", "checkpoints")
"""The parts of a run whose time is measured separately. All other time counts as training steps."""


class Costs:
    """Writes RUN/costs.jsonl.

    A line has:
        step: the training step.
        seconds: the seconds of training up to that step, with the time before a resumption.
        seconds/PART: for each of `PARTS`, how many of these seconds it took.
        peak_memory: the largest number of bytes that the training process held; an evaluation's
            workers are not included.
        peak_device_memory: on a GPU, the largest number of bytes that PyTorch had allocated there.

    A resumed run adds to the costs at its last checkpoint. Work that a kill has lost is not
    counted. Costs have their own file: two runs with the same settings write the same
    metrics.jsonl, but their costs differ.

    Args:
        run: the run's directory.
        step: the run's last step so far.
        device: the device of the model.

    Raises:
        UserError: a line is damaged, or the file holds other records.
    """

    def __init__(self, run: RunDirectory, step: int, device: torch.device):
        self._began = time.monotonic()
        self._records = Records(run.costs, step, timed=True)
        self._device = device
        self._before: Record = self._records.kept[-1] if self._records.kept else {}
        self._seconds = {part: self._before.get(f"seconds/{part}", 0.0) for part in PARTS}
        self._unmeasured: list[tuple[str, _Moment, _Moment]] = []

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a `with` block to a part, unless the block raises an error.

        The block does not wait for a GPU; `write` reads the GPU's times later.
        """
        began = self._now()
        yield
        self._unmeasured.append((part, began, self._now()))

    def write(self, step: int) -> None:
        """Write the costs up to this step. A GPU must have finished the step."""
        for part, began, ended in self._unmeasured:
            self._seconds[part] += _between(began, ended)
        self._unmeasured = []
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # given in KiB
        record = {
            "step": step,
            "seconds": self._before.get("seconds", 0.0) + time.monotonic() - self._began,
            **{f"seconds/{part}": seconds for part, seconds in self._seconds.items()},
            "peak_memory": max(memory, self._before.get("peak_memory", 0)),
        }
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            earlier = self._before.get("peak_device_memory", 0)
            record["peak_device_memory"] = max(allocated, earlier)
        self._records.write(record)

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _now(self) -> _Moment:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


_Moment = float | torch.cuda.Event


def _between(began: _Moment, ended: _Moment) -> float:
    """Return the seconds between two moments."""
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
