"""Describes the content of a store, as JSON or as a table in which no number is cut."""

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
"""A console that measures tables. It is wider than any table."""


def describe(store: DataStore) -> dict[str, Any]:
    """Describe the content of a store, as JSON.

    `prompts` and `shared_prompts` count prompt episodes, `bytes` is the size of all arrays, and
    `clipped` and `skipped` come from the import. All other numbers describe training episodes.

        {"path": str, "checksum": str (the manifest's checksum, which covers the arrays),
         "environment": {"family": str, "observation_size": int, "action_size": int,
                         "episode_length": int, "success": bool, "reward_version": str | null},
         "provenance": {...} (the settings of the command that made the store),
         "skipped": int (episodes of the source that an import left out),
         "episodes": int, "steps": int, "prompts": int,
         "shared_prompts": int (prompts that are also training episodes), "bytes": int,
         "tasks": {name: {"episodes": int, "steps": int,
                          "returns": {"min": float, "mean": float, "max": float},
                          "success": share of solved episodes among those whose success is known,
                                     or null if no success is known,
                          "clipped": share of the source's action values beyond [-1, 1], or null
                                     if no import counted them,
                          "prompts": int, "shared_prompts": int, "bytes": int}}}

    Raises:
        UserError: an array is missing or damaged.
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
    if not math.isfinite(lowest):  # stored returns are finite, so the file is damaged
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
    """Print a title, and a table with a row for each task and a last row for the whole store.

    Args:
        description: the result of `describe`.
        console: prints the output.
        width: the width of the terminal. Columns that do not fit go into further tables below,
            which repeat the names of the tasks. No number is cut. Without a width there is only
            one table.
    """
    console.print("\n".join(_title(description)), soft_wrap=True, highlight=False)
    *tasks, whole = _rows(description)
    for columns in _parts([*tasks, whole], width):
        console.print()
        console.print(_table(tasks, whole, columns), crop=False)


def _parts(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[list[int]]:
    """Yield the columns of each table: the first column, and as many further columns as fit.

    Every table has at least one further column. Columns without content are left out.
    """
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
    """A table of the given columns, which are as wide as their cells.

    Names are aligned to the left and numbers to the right.
    """
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
    return [
        f"{description['path']}: {environment['family']} ({sizes})",
        f"checksum {description['checksum']}, provenance: {origin} (--json prints all of it)",
        *([f"the import skipped {skipped:,} episodes (--json prints why)"] if skipped else []),
    ]


def _rows(description: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of each task's row, then the cells of the last row."""
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
    """Format the numbers of a column with the same number of decimals.

    The smallest absolute value above 0 gets three significant digits, and at least one decimal if
    it is below 1000. The largest gets at most six digits, because a float32 has hardly more.
    """
    sizes = [abs(number) for number in column if number]
    decimals = 0
    if sizes:
        low, high = (math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
        decimals = max(0, min(max(2 - low, 1 if low < 3 else 0), 5 - high))
    return [f"{number:.{decimals}f}" for number in column]
