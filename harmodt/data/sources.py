"""Records the source of an import in the store, and detects whether the source has changed."""

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
    """Describes a set of files; a changed description shows that the files have changed.

    The description is made without reading the content of the files.

    Attributes:
        count, bytes: the number of files, and their total size.
        newest: the latest time at which one of them was changed, UTC.
        crc32: the checksum of all names, sizes and times.
    """

    count: int
    bytes: int
    newest: str
    crc32: str

    def __str__(self) -> str:
        return f"{self.count:,} files with {self.bytes:,} bytes, last changed {self.newest}"


class Record(msgspec.Struct):
    """The facts about an import in a store's provenance, besides the import's settings.

    Attributes:
        files: the source's files of each task; empty if an earlier version of this program made
            the import.
        clipped: for each task, the share of the source's action values beyond [-1, 1].
        skipped: for each task, the reasons why episodes were left out, one reason per episode.
    """

    files: dict[str, Files] = {}
    clipped: dict[str, float] = {}
    skipped: dict[str, list[str]] = {}


def read_record(provenance: dict[str, Any], store: Path) -> Record:
    """Read the record from a provenance. The record is empty if no import made the store.

    Raises:
        UserError: the record has a wrong form.
    """
    return sealed.convert(f"the provenance of {store}", provenance, Record, KIND.remedy)


def describe_files(source: Importer, tasks: Sequence[str]) -> dict[str, Files]:
    """Describe the source's files of each task; the result is empty if the source is missing."""
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
    """Check that the files of a source have not changed since an import.

    Args:
        then, now: the files of each task at the import and now. If one of them is empty, nothing
            is compared.
        source: the path of the source.
        store: the directory of the store.
        what: the content of the store, for the error: "an import" or "an unfinished import".

    Raises:
        UserError: the files have changed.
    """
    for task in now if then else ():
        if then.get(task) != now[task]:
            raise UserError(
                f"nothing was imported: {store} holds {what} of {source}, and the source's files "
                f"of {task} have changed since (then {then.get(task, 'none')}; now {now[task]}): "
                f"delete {store} or choose another --output"
            )
