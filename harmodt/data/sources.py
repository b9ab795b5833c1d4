"""What a store records of the source that it was imported from, and whether that has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .. import sealed
from ..errors import UserError
from ..files import json_checksum
from .importers import Importer
from .store import KIND


class Files(msgspec.Struct, frozen=True):
    """What tells whether some files have changed without reading them.

    Attributes:
        count, bytes: how many there are, and their size.
        newest: when the last of them was changed, UTC.
        crc32: of the names, sizes and times of all.
    """

    count: int
    bytes: int
    newest: str
    crc32: str

    def __str__(self) -> str:
        return f"{self.count:,} of {self.bytes:,} bytes, the newest of {self.newest}"


class Record(msgspec.Struct):
    """What a store's provenance has of an import besides its settings, by the names of the tasks.

    Attributes:
        files: of the source; empty where an earlier version of this program imported it.
        clipped: the share of the source's action values beyond [-1, 1].
        skipped: why an episode was left out, for each that was.
    """

    files: dict[str, Files] = {}
    clipped: dict[str, float] = {}
    skipped: dict[str, list[str]] = {}


def read_record(provenance: dict[str, Any], store: Path) -> Record:
    """The record in a provenance; empty where no import made the store.

    Raises:
        UserError: it is not of its form.
    """
    return sealed.convert(f"the provenance of {store}", provenance, Record, KIND.remedy)


def describe_files(source: Importer, tasks: Sequence[str]) -> dict[str, Files]:
    """The source's files of each task; empty if there is no source any more."""
    if not source.source.exists():
        return {}
    return {
        task: _describe(file for file in source.files(task) if file.is_file()) for task in tasks
    }


def _describe(files: Iterable[Path]) -> Files:
    stats = {str(file): file.stat() for file in files}
    newest = max((stat.st_mtime_ns for stat in stats.values()), default=0)
    return Files(
        count=len(stats),
        bytes=sum(stat.st_size for stat in stats.values()),
        newest=str(np.datetime64(newest // 10**6, "ms")),
        crc32=json_checksum([(n, s.st_size, s.st_mtime_ns) for n, s in sorted(stats.items())]),
    )


def check_unchanged(
    then: dict[str, Files], now: dict[str, Files], source: Path, store: Path, what: str
) -> None:
    """Check that the files of a source are those that a store was made from.

    Args:
        then, now: of each task; where one is empty, nothing is compared.
        what: the store has of the source.

    Raises:
        UserError: they have changed.
    """
    for task in now if then else ():
        if then.get(task) != now[task]:
            raise UserError(
                f"nothing was imported: {store} holds {what} of {source}, whose files of {task} "
                f"have changed since (then {then.get(task, 'none')}; now {now[task]}): delete "
                f"{store} or choose another --output"
            )
