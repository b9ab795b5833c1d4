"""Numbers over training in a file of sealed lines (`sealed.py`)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

from .. import sealed
from ..errors import UserError
from ..files import write_bytes

_REMEDY = "delete that line, or restore the file from a copy"

Record = dict[str, float]
"""What was measured, by name, and the `step` that it was measured at."""


class Records:
    """Appends records to a file.

    Attributes:
        kept: those that were there, in their order.

    Args:
        path: of the file.
        step: the step that the run stands at; what was written after it is dropped, because the
            run does those steps again.
        timed: as in `read_records`.

    Raises:
        UserError: a line is damaged, or the file is of the other kind.
    """

    def __init__(self, path: Path, step: int, timed: bool):
        self.kept: list[Record] = []
        with contextlib.suppress(FileNotFoundError):
            lines = [(r, line) for r, line in _read(path, timed) if _belongs_to(r) <= step]
            self.kept = [record for record, _ in lines]
            write_bytes(path, b"".join(line for _, line in lines))
        self._file = open(path, "a")  # noqa: SIM115 (open while the run goes on)

    def write(self, record: Mapping[str, float]) -> None:
        """Append a record."""
        self._file.write(sealed.seal_line(record))
        self._file.flush()

    def sync(self) -> None:
        """See to it that what was written outlives a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def read_records(path: Path, timed: bool) -> list[Record]:
    """The records of a file; of one that is not there, none.

    Args:
        path: of the file.
        timed: whether its records have `seconds`: costs.jsonl's have, metrics.jsonl's have not.

    Raises:
        UserError: a line is damaged, or the file is of the other kind.
    """
    try:
        return [record for record, _ in _read(path, timed)]
    except FileNotFoundError:
        return []


def _read(path: Path, timed: bool) -> list[tuple[Record, bytes]]:
    """Records with their lines; the last line, which a kill cut short, is left out."""
    found = []
    for where, record, line in sealed.read_lines(path, Record, _REMEDY):
        if not record.get("step", -1.0) >= 0:
            raise sealed.damaged(where, "it has no step", _REMEDY)
        if ("seconds" in record) != timed:
            raise UserError(f"{path} holds the numbers of another file: {sealed.RESTORE}")
        if timed and not ("peak_memory" in record and all(map(math.isfinite, record.values()))):
            why = "it lacks the memory, or a number is not finite"
            raise sealed.damaged(where, why, _REMEDY)
        found.append((record, line))
    return found


def _belongs_to(record: Record) -> float:
    """The step that wrote a record: what is done before a step, a mask update, belongs to that."""
    return record["step"] + ("harmony" in record)
