"""Builds the page's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import printable
from ..results import EvaluationResult, Measure
from ..settings import settings
from ..training.costs import PARTS
from . import numbers
from .figures import COLOURS, of_steps
from .runs import ReportedRun

Format = Callable[[float | None], str]


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: the text of the cell.
        value: the number by which rows are sorted; None sorts them by the text.
        before, after: HTML before and after the text.
    """

    text: str
    value: float | None = None
    before: str = ""
    after: str = ""


def text(words: object) -> str:
    """Escape a name or a sentence for HTML."""
    return escape(printable(words))


def table(
    name: str,
    headings: Sequence[str | tuple[str, str]],
    rows: Sequence[Sequence[Cell]],
    last: Sequence[Cell] = (),
) -> str:
    """Return a table that a reader can sort by any column. The first column names the rows.

    Args:
        name: the table's name for readers who cannot see it.
        headings: the headings of the columns as HTML, some with HTML below the heading.
        rows: the rows that can be sorted.
        last: a row that stays at the end.
    """
    head = "".join(
        f'<th scope="col"><button type="button">{heading}</button>{below}</th>'
        for heading, below in (h if isinstance(h, tuple) else (h, "") for h in headings)
    )
    body = "".join(_row(row) for row in rows)
    foot = f"<tfoot>{_row(last)}</tfoot>" if last else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}'
        "</table></div>"
    )


def _row(cells: Sequence[Cell]) -> str:
    found = []
    for index, cell in enumerate(cells):
        tag = 'th scope="row"' if index == 0 else "td"
        value = f' data-value="{cell.value!r}"' if cell.value is not None else ""
        number = ' class="number"' if cell.value is not None else ""
        end = tag.partition(" ")[0]
        found.append(f"<{tag}{value}{number}>{cell.before}{text(cell.text)}{cell.after}</{end}>")
    return f"<tr>{''.join(found)}</tr>"


def run_heading(index: int, name: str) -> str:
    """Return a run's colour and name as HTML."""
    return _swatch(index) + text(name)


def _swatch(index: int) -> str:
    return f'<span class="swatch run-{index % COLOURS}" aria-hidden="true"></span>'


# The results of runs


def final_evaluation(run: ReportedRun) -> EvaluationResult | None:
    """Return the last of the run's compared evaluations; None if there is none."""
    return run.compared[-1] if run.compared else None


def left_out(runs: Sequence[ReportedRun]) -> list[str]:
    """Return a sentence for each measure that is not compared.

    It says how the measure differs and which runs have results with it.
    """
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for result in run.of_itself:
            if run.measure is not None and run.measure_of(result) != run.measure:
                how = ", ".join(run.measure.differences(run.measure_of(result)))
                where = f"{run.name} at step {result.protocol.checkpoint:,}"
                found.setdefault(how, {})[where] = None
    return [
        f"Left out here, because they were measured in another way: results with {how} "
        f"({', '.join(places)})."
        for how, places in found.items()
    ]


def overview(runs: Sequence[ReportedRun]) -> str:
    """Return a table with a row for each run: its settings, its results and its costs."""
    headings = ["run", "algorithm", "tasks", "steps", "parameters", "success", "mean return"]
    headings += ["loss", "time", "steps/s", "memory"]
    rows = []
    for index, run in enumerate(runs):
        result = final_evaluation(run)
        success = None if result is None else result.success_rate
        mean_return = None if result is None else result.mean_return
        losses, costs = run.series("loss"), run.costs[-1] if run.costs else None
        seconds = None if costs is None else costs["seconds"]
        speed = None if costs is None else costs["step"] / max(of_steps(costs), 1e-9)
        memory = None if costs is None else costs.get("peak_device_memory", costs["peak_memory"])
        rows.append(
            [
                Cell(run.name, before=_swatch(index)),
                Cell(run.description.config["algorithm"]),
                _number(len(run.description.tasks), numbers.count),
                _number(run.step, numbers.count),
                _number(run.description.parameters, numbers.count),
                _with_bounds(success, _rate, result),
                _with_bounds(mean_return, numbers.measured, result if success is None else None),
                _number(losses[-1][1] if losses else None, numbers.measured),
                _number(seconds, numbers.duration),
                _number(speed, numbers.measured),
                _number(memory, numbers.size),
            ]
        )
    shown = [i for i in range(len(headings)) if any(row[i].text != numbers.MISSING for row in rows)]
    kept = [[row[i] for i in shown] for row in rows]
    return table("Overview of the runs", [headings[i] for i in shown], kept)


def _with_bounds(value: float | None, form: Format, result: EvaluationResult | None) -> Cell:
    """Return the cell of an evaluation's mean and interval."""
    if value is None or result is None:
        return _number(value, form)
    low, high = form(result.average.low), form(result.average.high)
    return Cell(form(value), value, after=f"<small>{low} – {high}</small>")


def _rate(share: float | None) -> str:
    return numbers.MISSING if share is None else f"{share:.2f}"


def _number(value: float | None, form: Format) -> Cell:
    return Cell(form(value), value)


# Success by task


@dataclass(frozen=True)
class Column:
    """A column of a table that compares evaluations.

    Attributes:
        run: the index of the evaluation's run.
        label: the run's name.
        result: the evaluation.
    """

    run: int
    label: str
    result: EvaluationResult


def evaluations(runs: Sequence[ReportedRun]) -> list[list[Column]]:
    """Return the evaluations to compare: a list for each measure, the runs' own tasks first.

    A run may have several evaluations with the same measure, tasks, mask and way to draw plans. Of
    these, only the one with the latest checkpoint is kept.
    """
    groups: dict[Measure, list[Column]] = {}
    for index, run in enumerate(runs):
        chosen: dict[tuple[Any, ...], EvaluationResult] = {}
        for result in sorted(run.evaluations, key=lambda result: result.protocol.checkpoint):
            protocol = result.protocol
            plans = frozenset((protocol.plans or {}).items())
            key = run.measure_of(result), protocol.mask, plans, frozenset(protocol.tasks)
            chosen[key] = result
        for (measure, *_), result in chosen.items():
            groups.setdefault(measure, []).append(Column(index, run.name, result))
    compared = {run.measure for run in runs}

    def order(measure: Measure) -> tuple[Any, ...]:
        unseen, returns = measure.unseen is not None, measure.success_rule is None
        return unseen, returns, measure not in compared, -len(groups[measure]), repr(measure)

    return [groups[measure] for measure in sorted(groups, key=order)]


def how_measured(columns: Sequence[Column], runs: Sequence[ReportedRun]) -> str:
    """Return a sentence that describes the measure of some evaluations."""
    first = columns[0]
    measure = runs[first.run].measure_of(first.result)
    rule = {"any": "solved at any step, ", "last": "solved at the last step, ", None: ""}
    targets = measure.target_returns
    asked = "each run's own" if targets is None else ", ".join(f"{t:,.6g}" for t in targets)
    return (
        f"Measured: {rule[measure.success_rule]}{measure.episodes} episodes per task of "
        f"{measure.environment.episode_length} steps, goal seed {measure.goal_seed}, prompt seed "
        f"{measure.seed}, target return: {asked}."
    )


def success(columns: Sequence[Column]) -> tuple[str, str]:
    """Return a title, and a table with a row for each task and a column for each evaluation."""
    summaries = [{row["task"]: row for row in column.result.summary()} for column in columns]
    tasks = dict.fromkeys(task for c in columns for task in c.result.protocol.tasks)
    bounds = [_interval_of(row) for summary in summaries for row in summary.values()]
    first = columns[0].result
    scale = (0.0, 1.0)
    if first.successes is None:
        scale = (min(low for low, _, _ in bounds), max(high for _, _, high in bounds))
    rows = [
        [Cell(task), *(_interval_cell(summary.get(task), scale) for summary in summaries)]
        for task in (*tasks, "average")
    ]
    measure = "Mean return" if first.successes is None else "Success"
    unseen = "unseen " * bool(first.protocol.unseen)
    title = f"{measure} on {len(tasks)} {unseen}task{'s'[: len(tasks) > 1]}"
    return title, table(title, ["task", *map(_heading, columns)], rows[:-1], rows[-1])


def _heading(column: Column) -> tuple[str, str]:
    """Return a run's name and, below it, how it was evaluated.

    The run's own masks are not mentioned.
    """
    protocol = column.result.protocol
    how = f"step {protocol.checkpoint:,}, {protocol.episodes} episodes"
    if protocol.unseen or protocol.mask == "voted":
        how += f", {'no' if protocol.mask == 'none' else protocol.mask} mask"
    if protocol.plans:
        how += f", {protocol.plans['sampler']} of {protocol.plans['sampling_steps']} steps"
    return run_heading(column.run, column.label), f"<small>{text(how)}</small>"


def protocol_notes(columns: Sequence[Column]) -> list[str]:
    """Return sentences on how the protocols differ, beyond what the columns' headings show."""
    shown = (
        *("checkpoint", "episodes", "mask", "plans"),
        *("tasks", "target_returns", "backend", "device"),
    )
    found = [column.result.protocol.to_json() for column in columns]
    first, notes = found[0], []
    if any(set(protocol["tasks"]) != set(first["tasks"]) for protocol in found):
        notes.append(
            "Not all evaluations have the same tasks: an average is over the tasks of its column."
        )
    different = [n for n in first if n not in shown and any(p[n] != first[n] for p in found)]
    if different:
        notes.append(f"The protocols of these evaluations differ in {', '.join(different)}.")
    return notes


def _interval_of(row: dict[str, Any]) -> tuple[float, float, float]:
    if "success_rate" in row:
        return row["success_low"], row["success_rate"], row["success_high"]
    return row["return_low"], row["mean_return"], row["return_high"]


def _interval_cell(row: dict[str, Any] | None, scale: tuple[float, float]) -> Cell:
    """Return a cell with the mean, its interval as text, and a mark of both on a scale.

    Args:
        row: the row of the summary; None gives a cell without a result.
        scale: the lowest and the highest value of the scale.
    """
    if row is None:
        return Cell(numbers.MISSING)
    low, mean, high = _interval_of(row)
    form = _rate if "success_rate" in row else numbers.measured
    span = scale[1] - scale[0] or 1.0
    left, at, right = ((x - scale[0]) / span * 100 for x in (low, mean, high))
    after = (
        f"<small>{text(form(low))} – {text(form(high))}</small>"
        f'<span class="interval" aria-hidden="true" style="--low:{left:.2f}%;--at:{at:.2f}%;'
        f'--width:{max(right - left, 0):.2f}%"><i></i><b></b></span>'
    )
    return Cell(form(mean), mean, after=after)


# Costs and settings


def costs(runs: Sequence[ReportedRun]) -> str:
    """Return a table with time by part, throughput and memory of the runs that recorded them."""
    headings = ["run", "in all", "steps", *PARTS, "steps/s", "memory", "GPU memory"]
    rows = []
    for index, run in enumerate(runs):
        if not run.costs:
            continue
        last = run.costs[-1]
        device = last.get("peak_device_memory")
        rows.append(
            [
                Cell(run.name, before=_swatch(index)),
                _number(last["seconds"], numbers.duration),
                _number(of_steps(last), numbers.duration),
                *(_number(last.get(f"seconds/{part}", 0.0), numbers.duration) for part in PARTS),
                _number(last["step"] / max(of_steps(last), 1e-9), numbers.measured),
                _number(last["peak_memory"], numbers.size),
                _number(device, numbers.size),
            ]
        )
    if rows and all(row[-1].value is None for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return table("Time and memory of the runs", headings, rows) if rows else ""


def changes(runs: Sequence[ReportedRun]) -> str:
    """Return a table on how many weights the mask updates of each run moved."""
    headings = ["run", "mask updates", "moved per task, in all", "at most in an update"]
    headings += ["differ from the start", "share of a mask"]
    rows = []
    for index, run in enumerate(runs):
        moved = run.series("moved_weights")
        if not moved:
            continue
        differing = run.by_layer("differing/")
        tasks = len(run.description.tasks)
        active = sum(run.description.active_weights) / tasks  # 0 if their number changes
        # Each move changes two bits: one weight leaves the mask, and another weight enters it.
        differ = sum(differing[-1][1].values()) / 2 / tasks if differing and active else None
        share = None if differ is None else differ / active
        rows.append(
            [
                Cell(run.name, before=_swatch(index)),
                _number(len(moved), numbers.count),
                _number(sum(value for _, value in moved), numbers.count),
                _number(max(value for _, value in moved), numbers.count),
                _number(differ, numbers.count),
                Cell(numbers.MISSING if share is None else numbers.percent(share, 3), share),
            ]
        )
    return table("Weights that mask updates moved", headings, rows) if rows else ""


def all_settings(runs: Sequence[ReportedRun]) -> tuple[str, int]:
    """Return all settings of all runs as HTML, and how many of them differ between runs."""
    values: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        for name, value in _settings_of(run).items():
            values.setdefault(name, [numbers.MISSING] * len(runs))[index] = value
    rows, different = [], 0
    for name, row in values.items():
        differs = len(set(row)) > 1
        different += differs
        mark = '<span class="differs" title="differs between the runs">≠</span>' if differs else ""
        cells = "".join(f"<td>{text(value)}</td>" for value in row)
        kind = ' class="different"' if differs else ""
        rows.append(f'<tr{kind}><th scope="row">{text(name)}{mark}</th>{cells}</tr>')
    head = "".join(
        f'<th scope="col">{run_heading(index, run.name)}</th>' for index, run in enumerate(runs)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Settings of the runs">'
        f'<table id="all-settings"><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        different,
    )


def _settings_of(run: ReportedRun) -> dict[str, str]:
    """Return the settings of a run, and everything else that its result depends on, by name."""
    description = run.description
    found: dict[str, Any] = {"algorithm": run.config.algorithm, "preset": description.preset}
    found |= dict(settings(run.config))
    found["tasks"] = ", ".join(description.tasks)
    found |= {"environment": description.environment.get("family"), "store": description.store}
    parts = description.parts
    found["computed on"] = _over_parts([(part.step, part.device) for part in parts])
    found["kernels"] = _over_parts([(part.step, part.backend) for part in parts])
    for name in dict.fromkeys(name for part in parts for name in part.versions):
        versions = [(part.step, part.versions.get(name, numbers.MISSING)) for part in parts]
        found[f"version of {name}"] = _over_parts(versions)
    found["changed on resuming"] = "; ".join(
        f"{c.get('setting')} from {c.get('from')} to {c.get('to')} at step {c.get('step')}"
        for c in description.changes
    )
    return {name: _plain(value) for name, value in found.items()}


def _over_parts(values: Sequence[tuple[int, str]]) -> str:
    """Return the values of a run's parts as text, with the step after which each change came."""
    (_, first), *later = values
    found, before = [first], first
    for step, value in later:
        if value != before:
            found.append(f"{value} after step {step}")
        before = value
    return ", ".join(found)


def _plain(value: Any) -> str:
    if value is None or value == "" or value == ():
        return numbers.MISSING
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value) if not isinstance(value, bool) else json.dumps(value)
