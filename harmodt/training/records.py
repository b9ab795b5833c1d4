"""Numbers over training in a file: a JSON object a line, with its checksum.

The last entry of a line is `crc32`, of the object without it, eight hexadecimal digits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..errors import UserError
from ..files import checksum, read_bytes, write_bytes

_CRC = ', "crc32": "'

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
        if path.exists():
            lines = [(r, line) for r, line in _read(path, timed) if _belongs_to(r) <= step]
            self.kept = [record for record, _ in lines]
            write_bytes(path, b"".join(line for _, line in lines))
        self._file = open(path, "a")  # noqa: SIM115 (open while the run goes on)

    def write(self, record: Mapping[str, float]) -> None:
        """Append a record."""
        self._file.write(_line(record))
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
    *lines, _cut_short = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None:
            raise UserError(
                f"line {number} of {path} is damaged (its checksum fails): delete that line, or "
                "restore the file from a copy"
            )
        if ("seconds" in record) != timed:
            raise UserError(f"{path} holds the numbers of another file: restore it from a copy")
        if timed and not ("peak_memory" in record and all(map(math.isfinite, record.values()))):
            raise UserError(
                f"line {number} of {path} is damaged (it lacks the memory, or a number is not "
                "finite): delete that line, or restore the file from a copy"
            )
        found.append((record, line + b"\n"))
    return found


def _belongs_to(record: Record) -> float:
    """The step that wrote a record: what is done before a step, a mask update, belongs to that."""
    return record["step"] + ("harmony" in record)


def _line(record: Mapping[str, float]) -> str:
    """A record with its checksum, which stands last so that the rest can be had as text."""
    text = json.dumps(record)
    return f'{text[:-1]}{_CRC}{checksum(text.encode())}"}}\n'


def _parse(line: bytes) -> Record | None:
    """The numbers of a line with the step that they are of; None where it is damaged."""
    text, _, found = line.partition(_CRC.encode())
    content = text + b"}"
    if found != f'{checksum(content)}"}}'.encode():
        return None
    try:
        record = msgspec.convert(json.loads(content), Record)
    except (ValueError, RecursionError):
        return None
    return record if record.get("step", -1.0) >= 0 else None
