"""What a store holds: as facts, and as a table in which no number is ever cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table, box

from .. import sealed
from ..progress import PlainConsole
from .sources import read_record
from .store import KIND, DataStore

_HEADINGS = (
    *("task", "episodes", "steps", "return min", "return mean", "return max"),
    *("success", "clipped", "prompts", "size"),
)
_WIDE = PlainConsole(width=10_000)
"""Measures tables: wider than any."""


def describe(store: DataStore) -> dict[str, Any]:
    """What a store holds, as JSON; all of it but `prompts` and `bytes` counts training episodes.

        {"path": str, "checksum": str, of the manifest, which holds those of the arrays
         "environment": {"family": str, "observation_size": int, "action_size": int,
                         "episode_length": int, "success": bool, "reward_version": str | null},
         "provenance": {...}, the settings of the command that made the store
         "skipped": int, episodes of the source that an import left out
         "episodes": int, "steps": int, "prompts": int (episodes),
         "shared_prompts": int (prompts that are training episodes too), "bytes": int,
         "tasks": {name: {"episodes": int, "steps": int,
                          "returns": {"min": float, "mean": float, "max": float},
                          "success": share of the episodes of which it is known, or null,
                          "clipped": share of the source's action values beyond [-1, 1], or null
                                     where no import counted them,
                          "prompts": int, "shared_prompts": int, "bytes": int}}}

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
        for count in ("episodes", "steps", "prompts", "shared_prompts", "bytes")
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
        where = store.path / name / "returns_to_go.npy"
        raise sealed.damaged(where, f"a return is {lowest}", KIND.remedy)
    known = task.train.successes[task.train.successes >= 0]
    return {
        "episodes": len(task.train),
        "steps": len(task.train.rewards),
        "returns": {"min": lowest, "mean": task.mean_return, "max": task.best_return},
        "success": float(known.mean()) if len(known) else None,
        "prompts": len(task.prompts),
        "shared_prompts": store.shared_prompts(name),
        "bytes": store.size(name),
    }


def show(description: dict[str, Any], console: Console, width: int | None = None) -> None:
    """Print what the store is, and a table with a row for each task and one for the whole.

    Args:
        description: by `describe`.
        width: of the terminal. Columns that do not fit beside the names of the tasks stand in
            another table below, with the names again; no number is ever cut. Without a width
            there is one table.
    """
    console.print("\n".join(_title(description)), soft_wrap=True, highlight=False)
    *tasks, whole = _rows(description)
    for columns in _parts([*tasks, whole], width):
        console.print()
        console.print(_table(tasks, whole, columns), crop=False)


def _parts(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[list[int]]:
    """The columns of each table: the first, and as many filled ones as fit, at least one."""
    part = [0]
    filled = [column for column in range(1, len(_HEADINGS)) if any(row[column] for row in rows)]
    for column in filled:
        table = _table(rows[:-1], rows[-1], [*part, column])
        if len(part) > 1 and width is not None and _WIDE.measure(table).maximum > width:
            yield part
            part = [0]
        part.append(column)
    yield part


def _table(tasks: Sequence[Sequence[str]], whole: Sequence[str], columns: Sequence[int]) -> Table:
    """Some columns, as wide as their cells: the names to the left, all numbers to the right."""
    table = Table(
        show_footer=True, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for column in columns:
        heading, footer = _HEADINGS[column], whole[column]
        table.add_column(heading, footer, justify="right" if column else "left", no_wrap=True)
    for row in tasks:
        table.add_row(*(row[column] for column in columns))
    table.width = _WIDE.measure(table).maximum
    return table


def _title(description: dict[str, Any]) -> list[str]:
    environment = description["environment"]
    version = environment["reward_version"]
    sizes = (
        f"{environment['observation_size']} observations, {environment['action_size']} actions"
        f"{f', reward version {version}' if version else ''}"
    )
    origin = ", ".join(description["provenance"]) or "none"
    skipped = description["skipped"]
    skipped = description["skipped"]
    return [
        f"{description['path']}: {environment['family']} ({sizes})",
        f"checksum {description['checksum']}, provenance: {origin} (in full with --json)",
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
        yield _cells(name, task, (*numbers, share, clipped))
    yield _cells(f"{len(tasks)} tasks", description, ("", "", "", "", ""))


def _cells(name: str, counts: dict[str, Any], between: tuple[str, ...]) -> tuple[str, ...]:
    before = f"{counts['episodes']:,}", f"{counts['steps']:,}"
    shared = counts["shared_prompts"]
    prompts = f"{counts['prompts']:,}" + (f" ({shared:,} shared)" if shared else "")
    return name, *before, *between, prompts, decimal(counts["bytes"])


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
