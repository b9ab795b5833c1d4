"""Writes and reads the records of training: a JSON object with a checksum on each line."""

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
"""Measured numbers by name, with the `step` at which they were measured."""


class Records:
    """Appends records to a file.

    Attributes:
        kept: the records that the file had at the start, in their order, without dropped ones.

    Args:
        path: the file.
        step: the run's last step so far. Records of later steps are dropped, because the run takes
            those steps again.
        timed: as in `read_records`.

    Raises:
        UserError: a line is damaged, or `timed` is wrong for the file.
    """

    def __init__(self, path: Path, step: int, timed: bool):
        self.kept: list[Record] = []
        with contextlib.suppress(FileNotFoundError):
            lines = [(r, line) for r, line in _read(path, timed) if _belongs_to(r) <= step]
            self.kept = [record for record, _ in lines]
            write_bytes(path, b"".join(line for _, line in lines))
        self._file = open(path, "a")  # noqa: SIM115 (stays open during the run)

    def write(self, record: Mapping[str, float]) -> None:
        """Append a record."""
        self._file.write(sealed.seal_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has all records, so that a crash of the machine loses none."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path, timed: bool) -> list[Record]:
    """Return the records of a file; an empty list if there is no file.

    Args:
        path: the file.
        timed: whether the records have `seconds`. Records of costs.jsonl do; records of
            metrics.jsonl do not.

    Raises:
        UserError: a line is damaged, or `timed` is wrong for the file.
    """
    try:
        return [record for record, _ in _read(path, timed)]
    except FileNotFoundError:
        return []


def _read(path: Path, timed: bool) -> list[tuple[Record, bytes]]:
    """Return records with their lines. A last line that a kill has cut short is left out."""
    found = []
    for where, record, line in sealed.read_lines(path, Record, _REMEDY):
        if not record.get("step", -1.0) >= 0:
            raise sealed.damaged(where, "it has no step", _REMEDY)
        if ("seconds" in record) != timed:
            raise UserError(f"{path} holds the records of another file: {sealed.RESTORE}")
        if timed and not ("peak_memory" in record and all(map(math.isfinite, record.values()))):
            why = "it lacks the memory, or a number is not finite"
            raise sealed.damaged(where, why, _REMEDY)
        found.append((record, line))
    return found


def _belongs_to(record: Record) -> float:
    """Return the step during which a record was written.

    A mask update and a harmony score belong to the step that follows them.
    """
    return record["step"] + ("harmony" in record)
