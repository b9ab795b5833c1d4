"""Tabulates an experiment's results beside the paper's, for a terminal and as files."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table, box
from rich.text import Text

from .. import sealed
from ..data.store import MANIFEST, DataStore
from ..environments import METAWORLD, family_of
from ..files import clear_temporaries, write_bytes
from ..results import stack, versions
from ..settings import settings
from ..statistics import Average, average, interquartile_mean, paired_difference, seed_deviation
from ..training.records import read_records
from .jobs import Folder, Train, find_result, left_out
from .plan import Cell, Collection, Plan, Run

FORMAT = "harmodt-reproduction"
VERSION = 1

SOLVED, RETURN, HARMONY = "success in %", "return", "averaged harmony score"


@dataclass(frozen=True)
class Row:
    """The results of a variant on a column.

    Attributes:
        column, variant: the names of column and variant.
        algorithm: the algorithm's name.
        settings: the settings that differ from the preset's, as arguments.
        measure: the kind of numbers: SOLVED, RETURN or HARMONY.
        seeds: the seeds that have a result.
        tasks, episodes: the number of tasks, and of episodes per task.
        mean: the mean over seeds, tasks and episodes.
        deviation: the standard deviation of the seeds' means.
        middle: the interquartile mean.
        difference: the mean minus the reference's mean, on the seeds that both have.
        paper: the paper's mean ± deviation, as printed.
        by_task: for each task, the mean over episodes of each seed; empty for HARMONY.
    """

    column: str
    variant: str
    algorithm: str
    settings: str
    measure: str
    seeds: tuple[int, ...] = ()
    tasks: int = 0
    episodes: int = 0
    mean: Average | None = None
    deviation: float | None = None
    middle: Average | None = None
    difference: Average | None = None
    paper: str | None = None
    by_task: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_csv(self) -> dict[str, Any]:
        """Return the row for a CSV file. Each average becomes a mean and two bounds."""
        row = {name: getattr(self, name) for name in ("column", "variant", "algorithm", "settings")}
        row |= {"measure": self.measure, "seeds": " ".join(map(str, self.seeds))}
        row |= {"tasks": self.tasks, "episodes": self.episodes}
        for name in ("mean", "middle", "difference"):
            found = getattr(self, name)
            row[name] = found and found.mean
            row |= {f"{name}_low": found and found.low, f"{name}_high": found and found.high}
            if name == "mean":
                row["deviation"] = self.deviation
        paper = self.paper.split(" ± ") if self.paper else (None, None)
        names = ("paper_mean", "paper_deviation")
        return row | dict(zip(names, paper, strict=True))


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment.

    Attributes:
        plan: the plan of the experiment.
        rows: the rows of all columns; the variants of a column follow each other.
        notes: sentences on how the results were measured, and how that differs from the paper.
    """

    plan: Plan
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write PATH.json, PATH.csv and PATH.md, each whole or not at all."""
        table, readable, content = (path.with_suffix(kind) for kind in (".csv", ".md", ".json"))
        for file in (table, readable, content):
            clear_temporaries(file)
        write_bytes(table, self.to_csv().encode())
        write_bytes(readable, self.to_markdown().encode())
        sealed.write(content, self.to_json())

    def to_csv(self) -> str:
        """Return CSV with a line for each row."""
        text = io.StringIO()
        rows = [row.to_csv() for row in self.rows]
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Return all results as plain JSON values."""
        plan = self.plan
        packages = family_of([plan.experiment.columns[0].tasks]).packages
        return {
            "format": FORMAT,
            "version": VERSION,
            "experiment": plan.name,
            "budget": plan.budget_name,
            "seeds": list(plan.seeds),
            "reference": plan.experiment.reference,
            "versions": versions(packages),
            "runs": {
                f"{cell.column.name}, {cell.variant.name}": [run.name for run in cell.runs]
                for cell in plan.cells
            },
            "paper": {name: _paper()[name] for name in ("source", "units")},
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }

    def to_markdown(self) -> str:
        """Return Markdown with the title, a table for each column, and the notes."""
        headings, lines = self._headings, [f"# {self._title}", ""]
        for column in self.plan.experiment.columns:
            lines.append(f"| {column.name} | {' | '.join(headings)} |")
            lines.append("| --- |" + " --: |" * len(headings))
            for row in self.rows:
                if row.column == column.name:
                    cells = " | ".join(_cells(row)[: len(headings)]).replace("\n", " ")
                    lines.append(f"| {row.variant} | {cells} |")
            lines.append("")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])

    @property
    def _title(self) -> str:
        return f"{self.plan.name}: {self.plan.experiment.title}; {self.rows[0].measure}"

    @property
    def _headings(self) -> list[str]:
        """The headings of `_cells`, with one for the paper if the paper has this experiment."""
        paper = _paper_of(self.plan.name)
        headings = ["mean", "middle half", f"minus {self.plan.experiment.reference}"]
        return headings + ([f"paper, {paper['source']}"] if paper["variants"] else [])

    def table(self, width: int = 80) -> Table:
        """Return a table for a terminal. A cell shows a mean and, below it, its interval.

        If that is too wide, each variant has one cell, which shows all its results in lines.

        Args:
            width: the number of characters in a line of the terminal.
        """
        headings = self._headings
        table = self._table(headings, lambda row: _cells(row)[: len(headings)])
        names = [row.variant for row in self.rows] + [row.column for row in self.rows]
        # The names can be wrapped between words, which saves this width.
        wrapped = max(map(len, names)) - max(len(word) for name in names for word in name.split())
        if Console(width=1000).measure(table).maximum - wrapped <= width:
            return table
        return self._table([""], lambda row: [_stacked(headings, _cells(row))])

    def _table(self, headings: Sequence[str], cells: Callable[[Row], list[str]]) -> Table:
        table = Table(title=self._title, box=box.SIMPLE_HEAD)
        table.add_column("")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=len(headings) > 1)
        for column in self.plan.experiment.columns:
            table.add_section()
            table.add_row(Text(column.name, style="bold"))
            for row in self.rows:
                if row.column == column.name:
                    table.add_row(row.variant, *cells(row))
        return table


def tabulate(plan: Plan, folder: Folder) -> Outcome:
    """Collect the results of an experiment. Runs that are not done have no results.

    Raises:
        UserError: a result is damaged.
    """
    rows = []
    for column in plan.experiment.columns:
        cells = [cell for cell in plan.cells if cell.column == column]
        found = {cell.variant.name: _values(plan, cell, folder) for cell in cells}
        reference = found.get(plan.experiment.reference, {})
        rows += [_row(plan, cell, found[cell.variant.name], reference) for cell in cells]
    return Outcome(plan, tuple(rows), tuple(_notes(plan, folder, rows)))


def _values(plan: Plan, cell: Cell, folder: Folder) -> dict[int, np.ndarray]:
    """Return the results of a cell by seed, [tasks, episodes], or [1, times] for harmony."""
    runs = dict(zip(plan.seeds, cell.runs, strict=True))
    if plan.experiment.measure == "harmony":
        return {s: _harmony(folder, run) for s, run in runs.items() if _is_trained(folder, run)}
    results = {seed: find_result(folder, run, cell.question) for seed, run in runs.items()}
    there = {seed: result for seed, result in results.items() if result is not None}
    return dict(zip(there, stack(list(there.values())), strict=True)) if there else {}


def _is_trained(folder: Folder, run: Run) -> bool:
    return Train(folder, run).step == run.steps


def _harmony(folder: Folder, run: Run) -> np.ndarray:
    """Return the averaged harmony scores that a run logged, float64 [1, times]."""
    records = read_records(folder.run(run).metrics, timed=False)
    return np.array([[float(r["harmony"]) for r in records if "harmony" in r]])


def _row(
    plan: Plan, cell: Cell, found: Mapping[int, np.ndarray], reference: Mapping[int, np.ndarray]
) -> Row:
    spec = family_of([cell.column.tasks]).spec
    measure = HARMONY if plan.experiment.measure == "harmony" else RETURN
    if spec.success and plan.experiment.measure == "outcome":
        measure = SOLVED
    described = _paper_of(plan.name)["variants"].get(cell.variant.name, {})
    row: dict[str, Any] = {
        "column": cell.column.name,
        "variant": cell.variant.name,
        "algorithm": cell.variant.algorithm,
        "settings": " ".join(cell.runs[0].flags),
        "measure": measure,
        "paper": described.get("results", {}).get(cell.column.name),
    }
    if not found:
        return Row(**row)
    values = np.stack(list(found.values()))
    both = [seed for seed in found if seed in reference]
    difference = None
    if both and cell.variant.name != plan.experiment.reference:
        ours, theirs = (np.stack([results[s] for s in both]) for results in (found, reference))
        difference = paired_difference(ours, theirs)
    if measure != HARMONY:
        means = values.mean(2).T.tolist()
        row["by_task"] = dict(zip(cell.question.tasks, means, strict=True))
    return Row(
        **row,
        seeds=tuple(found),
        tasks=values.shape[1],
        episodes=values.shape[2],
        mean=average(values),
        deviation=seed_deviation(values),
        middle=interquartile_mean(values),
        difference=difference,
    )


def _training(plan: Plan) -> str:
    """Describe the number of steps, and the tasks and windows of a step.

    Variants that differ from most others are named.
    """
    cells: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        values = dict(settings(cell.runs[0].config))
        kind = "windows" if "context_length" in values else "single steps"
        tasks = values["tasks_per_step"]
        batch = f"{tasks} task{'s'[: tasks > 1]} × {values['batch_per_task']} {kind}"
        cells.setdefault(batch, []).append(cell)
    usual, *others = sorted(cells, key=lambda batch: -len(cells[batch]))
    steps = {
        batch: " or ".join(f"{n:,}" for n in sorted({cell.runs[0].steps for cell in same_batch}))
        for batch, same_batch in cells.items()
    }
    names = {b: dict.fromkeys(cell.variant.name for cell in cells[b]) for b in others}
    named = [f"{', '.join(names[b])}: {steps[b]} steps of {b}" for b in others]
    return f"{steps[usual]} steps of {usual}" + (f" ({'; '.join(named)})" if named else "")


def _notes(plan: Plan, folder: Folder, rows: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on how the results were measured, and how that differs from the paper."""
    yield f"Budget {plan.budget_name}: {plan.budget.title}."
    missing = sum(len(plan.seeds) - len(row.seeds) for row in rows)
    if missing:
        yield f"{missing} of {len(rows) * len(plan.seeds)} results are still missing."
    if plan.experiment.measure != "harmony":
        yield from dict.fromkeys(
            f"Left out, because it was measured in another way: {run.name} with {how}."
            for cell in plan.cells
            for run in cell.runs
            for how in left_out(folder, run, cell.question)
        )
    seeds = ", ".join(map(str, plan.seeds))
    if plan.experiment.measure == "harmony":
        times = max(row.episodes for row in rows)  # a row without a result has none
        yield f"Scores were logged at {times} steps during training; seeds {seeds}."
    else:
        episodes = plan.cells[0].question.episodes
        yield (
            f"Measured after the last step on {episodes} episodes per task, seeds {seeds}; paper: "
            "50 episodes, three seeds."
        )
    yield (
        f"Trained for {_training(plan)}, preset {plan.budget.preset}; paper: 1e6 "
        "steps in its Table 6, 10 million in its text."
    )
    yield from dict.fromkeys(_data_note(folder, collection) for collection in plan.collections)
    if any(
        family_of([column.tasks]).spec.family == METAWORLD for column in plan.experiment.columns
    ):
        yield "Tasks and experts are from Meta-World v3; the paper's tasks are from v2."
    yield from _averages(plan, rows)
    yield (
        "± is the standard deviation over seeds; the paper does not say what its ± is. Brackets "
        "hold 95 % intervals of a bootstrap over seeds, tasks and episodes (for harmony, over "
        "seeds and steps). Middle half: the interquartile mean over seeds and tasks. Differences "
        "compare runs with the same seed on the same goals."
    )


def _averages(plan: Plan, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence with averages over all columns, if the paper prints such averages.

    A variant that lacks the result of a column has no average.
    """
    parts = []
    for name, variant in _paper_of(plan.name)["variants"].items():
        if "average" in variant:
            own_rows = [row for row in rows if row.variant == name]
            means = [row.mean.mean for row in own_rows if row.mean]
            whole = means and len(means) == len(own_rows)
            ours = number(rows[0], sum(means) / len(means)) if whole else "–"
            parts.append(f"{name} {ours} ({variant['average']})")
    if parts:
        yield f"Average of the columns (the paper's in brackets): {', '.join(parts)}."


def _data_note(folder: Folder, collection: Collection) -> str:
    made, path = collection.wanted, folder.data(collection)
    if (path / MANIFEST).exists() and "collect" not in DataStore.open(path).provenance:
        return f"Data: the store {path}, which was not collected here."
    return (
        f"Data, {made['composition']}: {made['episodes']} episodes of at most "
        f"{made['episode_length']} steps per task, by experts with decreasing exploration; paper: "
        "1 M transitions per task from SAC's replay buffers, half as many for sub-optimal data."
    )


def _cells(row: Row) -> list[str]:
    """Return the cells of a row, one for each heading."""
    if row.mean is None:
        return ["–", "–", "–", row.paper or "–"]
    deviation = "" if row.deviation is None else f" ± {number(row, row.deviation)}"
    cells = [_with_interval(row, row.mean, deviation)]
    for found in (row.middle, row.difference):
        cells.append(_with_interval(row, found) if found else "")
    return [*cells, row.paper or "–"]


def _stacked(headings: Sequence[str], cells: Sequence[str]) -> str:
    """Return all cells of a row in lines, each with its heading."""
    parts = zip(headings, cells, strict=False)  # the paper's cell may have no heading
    return "\n".join(f"{name} {cell}" for name, cell in parts if cell).replace("\n[", " [")


def _with_interval(row: Row, found: Average, deviation: str = "") -> str:
    low, high = number(row, found.low), number(row, found.high)
    return f"{number(row, found.mean)}{deviation}\n[{low}, {high}]"


def number(row: Row, value: float) -> str:
    """Format a value in the unit of the row's measure."""
    digits = 3 if row.measure == HARMONY else 1
    scaled = 100 * value if row.measure == SOLVED else value
    return f"{round(scaled, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


@functools.cache
def _paper() -> dict[str, Any]:
    """Return the content of paper.json."""
    text = resources.files(__package__).joinpath("paper.json").read_text(encoding="utf-8")
    return json.loads(text)


def _paper_of(experiment: str) -> dict[str, Any]:
    """Return the paper's results of an experiment: their source, and the variants, if any."""
    return _paper()["experiments"].get(experiment, {"source": None, "variants": {}})
