"""What a store holds: as facts, and as a table in which no number is ever cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.filesize import decimal

from ..errors import UserError, printable
from .sources import read_record
from .store import DataStore

_HEADINGS = (
    "task", "episodes", "steps", "return min", "mean", "max", "success", "clipped", "prompts",
    "size",
)  # fmt: skip
_GAP = "  "


def describe(store: DataStore) -> dict[str, Any]:
    """What a store holds, as JSON; all of it but `prompts` and `bytes` counts training episodes.

        {"path": str, "checksum": str, of the manifest, which holds those of the arrays
         "environment": {"family": str, "observation_size": int, "action_size": int,
                         "episode_length": int, "success": bool, "reward_version": str | null},
         "provenance": {...}, the settings of the command that made the store
         "episodes": int, "steps": int, "prompts": int (episodes), "bytes": int,
         "skipped": int, episodes of the source that an import left out
         "tasks": {name: {"episodes": int, "steps": int,
                          "returns": {"min": float, "mean": float, "max": float},
                          "success": share of the episodes of which it is known, or null,
                          "clipped": share of the source's action values beyond [-1, 1], or null
                                     where no import counted them,
                          "prompts": int, "bytes": int}}}

    Raises:
        UserError: an array is missing, or is not what was written.
    """
    record = read_record(store.provenance, store.path)
    tasks = {
        name: _describe_task(store, name) | {"clipped": record.clipped.get(name)}
        for name in store.tasks
    }
    totals = {
        count: sum(task[count] for task in tasks.values())
        for count in ("episodes", "steps", "prompts", "bytes")
    }
    return {
        "path": str(store.path),
        "checksum": store.checksum,
        "environment": store.environment.to_json(),
        "provenance": store.provenance,
        **totals,
        "skipped": sum(map(len, record.skipped.values())),
        "tasks": tasks,
    }


def _describe_task(store: DataStore, name: str) -> dict[str, Any]:
    task = store.task(name)
    lowest = float(task.train.returns.min())
    if not math.isfinite(lowest):  # which the manifest's mean would not be either
        raise UserError(
            f"{store.path / name / 'returns_to_go.npy'} has changed since it was written (a return "
            f"is {lowest}): restore it from a copy or make the store again"
        )
    known = task.train.successes[task.train.successes >= 0]
    return {
        "episodes": len(task.train),
        "steps": len(task.train.rewards),
        "returns": {"min": lowest, "mean": task.mean_return, "max": task.best_return},
        "success": float(known.mean()) if len(known) else None,
        "prompts": len(task.prompts),
        "bytes": store.size(name),
    }


def to_text(description: dict[str, Any], width: int | None = None) -> str:
    """A description as a table, one row per task and one for the whole.

    Args:
        description: by `describe`.
        width: of the terminal; a row that does not fit goes on in lines of its own, between two of
            its numbers. Without a width every row is one line.
    """
    *tasks, whole = _rows(description)
    rows = _without_empty_columns([_HEADINGS, *tasks, whole])
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = list(_lines(widths, width))
    table = [_row(row, widths, lines) for row in rows]
    return "\n".join([*_title(description), "", *table[:-1], "", table[-1]])


def _title(description: dict[str, Any]) -> list[str]:
    environment = description["environment"]
    version = environment["reward_version"]
    sizes = (
        f"{environment['observation_size']} observations, {environment['action_size']} actions"
        f"{f', reward version {version}' if version else ''}"
    )
    origin = ", ".join(description["provenance"]) or "none"
    skipped = description["skipped"]
    return [
        printable(f"{description['path']}: {environment['family']} ({sizes})"),
        printable(
            f"checksum {description['checksum']}, provenance: {origin} (in full with --json)"
        ),
        *([f"{skipped:,} episodes of the source were skipped (why: --json)"] if skipped else []),
    ]


def _rows(description: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of each task, and of the whole."""
    tasks = description["tasks"]
    columns = (
        [task["returns"][which] for task in tasks.values()] for which in ("min", "mean", "max")
    )
    returns = zip(*map(_numbers, columns), strict=True)
    for (name, task), numbers in zip(tasks.items(), returns, strict=True):
        share = "unknown" if task["success"] is None else f"{task['success']:.0%}"
        clipped = "" if task["clipped"] is None else f"{task['clipped']:.1%}"
        yield _cells(printable(name), task, (*numbers, share, clipped))
    yield _cells(f"{len(tasks)} tasks", description, ("", "", "", "", ""))


def _without_empty_columns(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows without the columns that have a heading alone."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return list(zip(*kept, strict=True))


def _cells(name: str, counts: dict[str, Any], between: tuple[str, ...]) -> tuple[str, ...]:
    before = f"{counts['episodes']:,}", f"{counts['steps']:,}"
    return name, *before, *between, f"{counts['prompts']:,}", decimal(counts["bytes"])


def _numbers(column: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as tell them apart.

    Three digits of the one smallest in size, and a decimal below 1000, but no more than six digits
    of the largest: a return is a float32.
    """
    sizes = [abs(number) for number in column if number]
    decimals = 0
    if sizes:
        low, high = (math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
        decimals = max(0, min(max(2 - low, 1 if low < 3 else 0), 5 - high))
    return [f"{number:.{decimals}f}" for number in column]


def _lines(widths: Sequence[int], width: int | None) -> Iterator[range]:
    """Which columns stand in the same line of a row, so that each line fits if one column does."""
    start, used = 0, widths[0]
    for column in range(1, len(widths)):
        used += len(_GAP) + widths[column]
        if width is not None and used > width:
            yield range(start, column)
            start, used = column, len(_GAP) + widths[column]
    yield range(start, len(widths))


def _row(cells: Sequence[str], widths: Sequence[int], lines: Sequence[range]) -> str:
    """The name to the left, all numbers to the right of their columns; later lines are indented."""
    room = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = [cells[0] + room[0], *(_GAP + r + c for r, c in zip(room[1:], cells[1:], strict=True))]
    shown = ["".join(padded[column] for column in line).rstrip() for line in lines]
    return "\n".join(line for line in shown if line)
