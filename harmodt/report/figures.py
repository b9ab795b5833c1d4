"""Builds the page's plots as Vega-Lite specifications with their data.

A plot's rows name a run by its index among the page's runs. The colours are CSS variables of the
page, which change for a dark screen and for print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..training.costs import PARTS
from .numbers import few_digits
from .runs import ReportedRun

COLOURS = 10
"""Number of run colours in page.css. Further runs use the same colours with dashed lines."""

POINTS = 2400
"""Largest number of points in all lines of a plot together. Longer lines average neighbouring
points."""

Row = list[Any]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """The content of a plot for one choice of the reader.

    Attributes:
        spec: the Vega-Lite specification, without data.
        columns: the names of the entries of a row.
        rows: the data.
        lists: for a column that holds indices, the list that they refer to.
        mirrored: whether a row with x and y also stands for a row with y and x.
    """

    spec: Spec
    columns: Sequence[str]
    rows: Sequence[Row]
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    mirrored: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with a variant for each choice of the reader.

    Attributes:
        name: the name of the plot on the page.
        label: a description for readers who cannot see the plot.
        choice: what the reader chooses: "axis" (steps or time), "run" (a run, by index) or "none".
        variants: the variants by choice.
    """

    name: str
    label: str
    choice: str
    variants: dict[str, Variant]


AXES = {"steps": "step", "time": "minutes of training"}

CONFIG: Spec = {
    "aria": False,  # no label for each of thousands of marks; the whole plot has one label
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": "var(--line)"},
    "axis": {
        "domainColor": "var(--line)",
        "gridColor": "var(--line)",
        "gridOpacity": 0.6,
        "tickColor": "var(--line)",
        "labelColor": "var(--quiet)",
        "titleColor": "var(--ink)",
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 11,
        "labelLimit": 150,
    },
    "legend": {
        "labelColor": "var(--quiet)",
        "titleColor": "var(--ink)",
        "titleFontWeight": "normal",
        "orient": "bottom",
        "labelFontSize": 11,
        "gradientLength": 160,
    },
    "text": {"fill": "var(--ink)", "fontSize": 11},
    "line": {"strokeWidth": 1.8},
}
"""Vega-Lite settings that all plots share."""

# page.js sets the parameter `hidden` to the indices of the runs that the reader hides.
_SHOWN: Spec = {"filter": "indexof(hidden, datum.run) < 0"}
_HIDDEN: Spec = {"name": "hidden", "value": []}


def over_training(
    name: str,
    title: str,
    runs: Sequence[ReportedRun],
    series: Callable[[ReportedRun], list[tuple[int, float]]],
    *,
    from_zero: bool = False,
    unit: bool = False,
    points: bool = False,
) -> Plot | None:
    """Plot a measurement over training, with a line for each run; None if no run has it.

    Args:
        name: the name of the plot.
        title: the name of the measurement.
        runs: all runs of the page.
        series: a function that returns the steps and values of a run.
        from_zero: whether the vertical axis begins at 0.
        unit: whether the vertical axis goes from 0 to 1.
        points: whether each measurement is marked.
    """
    most = points_each(runs)
    rows: list[Row] = []
    for index, run in enumerate(runs):
        for step, value in thinned(series(run), most):
            seconds = run.seconds_at(step)
            minutes = None if seconds is None else few_digits(seconds / 60)
            rows.append([index, step, minutes, few_digits(value, 6)])
    rows = [row for row in rows if row[3] is not None]
    if not rows:
        return None
    values = [row[3] for row in rows]
    scale = {"domain": [0, 1]} if unit else _scale(0.0 if from_zero else min(values), max(values))
    variants = {}
    for axis, column in (("steps", 1), ("time", 2)):
        shown = [[row[0], row[column], row[3]] for row in rows if row[column] is not None]
        spec = _lines(title, AXES[axis], runs, shown, scale, points)
        variants[axis] = Variant(spec, ("run", "x", "value"), shown)
    return Plot(name, f"{title} over training, a line for each run", "axis", variants)


def _lines(
    title: str,
    axis: str,
    runs: Sequence[ReportedRun],
    rows: Sequence[Row],
    scale: Spec,
    points: bool,
) -> Spec:
    """Return the specification of a line for each run, from rows [run, x, value]."""
    return {
        "height": 240,
        "params": [_HIDDEN],
        "transform": [_SHOWN],
        "mark": {
            "type": "line",
            "point": {"size": 36, "opacity": 1 if points else 0, "filled": True},
        },
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": axis,
                "scale": _scale(0.0, max((x for _, x, _ in rows), default=1.0), nice=False),
                "axis": {"grid": False, "tickCount": 5, "labelFlush": True},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "axis": {"tickCount": 5},
            },
            "color": _colour(runs),
            "strokeDash": _dashes(runs),
            "tooltip": _tooltip({"name": "run", "x": axis, "value": title}),
        },
    }


def points_each(runs: Sequence[ReportedRun]) -> int:
    """Return the largest number of points in the line of a run."""
    return max(24, min(300, POINTS // len(runs)))


def thinned(series: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Reduce a series to at most `most` points: the means of groups of neighbouring points.

    The step of a group is the step of its last point.
    """
    together = -(-len(series) // most) if series else 1  # points in a group, rounded up
    groups = (series[i : i + together] for i in range(0, len(series), together))
    return [(group[-1][0], float(np.mean([value for _, value in group]))) for group in groups]


def throughput(run: ReportedRun) -> list[tuple[int, float]]:
    """Return the training steps per second between records, without the time of `PARTS`."""
    found, step, spent = [], 0, 0.0
    for record in run.costs:
        seconds = of_steps(record)
        if record["step"] > step and seconds > spent:
            found.append((int(record["step"]), (record["step"] - step) / (seconds - spent)))
        step, spent = int(record["step"]), seconds
    return found


def of_steps(costs: dict[str, float]) -> float:
    """Return the seconds that training steps took, from a record of costs."""
    return costs["seconds"] - sum(costs.get(f"seconds/{part}", 0.0) for part in PARTS)


def time_by_part(runs: Sequence[ReportedRun]) -> Plot | None:
    """Plot the time of each part of training; None if no run recorded it."""
    rows: list[Row] = []
    timed = [run for run in runs if run.costs]
    for index, run in enumerate(runs):
        if run.costs:
            last = run.costs[-1]
            spent = [of_steps(last), *(last.get(f"seconds/{part}", 0.0) for part in PARTS)]
            rows += [[index, part, few_digits(s / 60)] for part, s in enumerate(spent)]
    if not rows:
        return None
    parts = ("steps", *PARTS)
    spec: Spec = {
        "height": 24 * len(timed),
        "params": [_HIDDEN],
        "transform": [_SHOWN],
        "mark": {"type": "bar", "height": {"band": 0.7}},
        "encoding": {
            "x": {
                "field": "minutes",
                "type": "quantitative",
                "title": "minutes",
                "scale": _scale(0.0, max(run.costs[-1]["seconds"] for run in timed) / 60),
                "axis": {"tickCount": 5, "labelFlush": True},
            },
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None},
            "color": {
                "field": "part",
                "type": "nominal",
                "title": None,
                "scale": {
                    "domain": list(parts),
                    "range": [f"var(--run-{index})" for index in (0, 1, 2, 3)],
                },
                "legend": {"columns": 2},
            },
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": _tooltip({"name": "run", "part": "part", "minutes": "minutes"}),
        },
    }
    rows = [[*row, row[1]] for row in rows]
    variant = Variant(spec, ("run", "part", "minutes", "order"), rows, {"part": parts})
    return Plot("parts", "Minutes by part of training, a bar for each run", "none", {"": variant})


def changed_by_layer(runs: Sequence[ReportedRun]) -> Plot | None:
    """Plot bounds of the share of each layer's mask bits that ever changed; None without data."""
    rows: list[Row] = []
    layers: list[str] = []
    for index, run in enumerate(runs):
        for layer, low, high in layer_changes(run):
            if layer not in layers:
                layers.append(layer)
            rows.append([index, layers.index(layer), few_digits(low), few_digits(high)])
    if not rows:
        return None
    spec: Spec = {
        "height": 16 * len(layers),
        "params": [_HIDDEN],
        "transform": [_SHOWN],
        "encoding": {
            "y": {
                "field": "layer",
                "type": "nominal",
                "title": None,
                "scale": {"domain": layers},
                "axis": {"grid": True},
            },
            "color": _colour(runs),
            "tooltip": _tooltip(
                {
                    "name": "run",
                    "layer": "layer",
                    "low": "changed at least (differ from the start)",
                    "high": "changed at most (sum of all changes)",
                },
                formats={"low": ".4%", "high": ".4%"},
            ),
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.7},
                "encoding": {
                    "x": {
                        "field": "low",
                        "type": "quantitative",
                        "title": "share of the mask bits",
                        "scale": _scale(0.0, max(high for *_, high in rows)),
                        "axis": {"format": "~%", "tickCount": 4, "labelFlush": True},
                    },
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
                "encoding": {"x": {"field": "low", "type": "quantitative"}},
            },
        ],
    }
    variant = Variant(spec, ("run", "layer", "low", "high"), rows, {"layer": layers})
    label = "Share of each layer's mask bits that changed during training"
    return Plot("layers", label, "none", {"": variant})


def layer_changes(run: ReportedRun) -> list[tuple[str, float, float]]:
    """Return each layer with a lower and an upper bound of the share of its bits that changed."""
    changed, differing = run.by_layer("changed/"), run.by_layer("differing/")
    if not changed or run.masks is None:
        return []
    sizes = run.masks.layer_sizes()
    bits = {layer: size * len(run.masks.tasks) for layer, size in sizes.items()}
    sums = {layer: sum(values[layer] for _, values in changed) for layer in changed[-1][1]}
    last = differing[-1][1]
    return [(layer, last[layer] / bits[layer], sums[layer] / bits[layer]) for layer in last]


def overlap(runs: Sequence[ReportedRun]) -> Plot | None:
    """Plot the overlap of each pair of masks, with similar tasks side by side."""
    variants = {}
    for index, run in _with_masks(runs, tasks=2):
        masks = run.masks
        assert masks is not None
        order = masks.order()
        tasks = [masks.tasks[i] for i in order]
        values, beyond = masks.overlap[np.ix_(order, order)], masks.beyond_chance
        beyond = beyond[np.ix_(order, order)]
        upper = np.triu_indices(len(order), 1)
        rows: list[Row] = [
            [int(i), int(j), few_digits(values[i, j], 7), few_digits(beyond[i, j], 3)]
            for i, j in zip(*upper, strict=True)
        ]
        low, high = float(values[upper].min()), float(values[upper].max())
        spec: Spec = {
            "height": max(240, min(18 * len(order), 760)),
            "mark": {"type": "rect"},
            "encoding": {
                "x": _tasks("x", tasks, labels=len(order) <= 12),
                "y": _tasks("y", tasks, labels=True),
                "color": {
                    "field": "overlap",
                    "type": "quantitative",
                    "title": "overlap",
                    "scale": {
                        "scheme": "viridis",
                        "domain": [low, high] if high > low else [low - 1e-3, high + 1e-3],
                        "nice": False,
                        "zero": False,
                    },
                    "legend": {"format": ".4~f", "tickCount": 2, "gradientLength": 200},
                },
                "tooltip": _tooltip(
                    {
                        "y": "task",
                        "x": "and task",
                        "overlap": "overlap",
                        "beyond": "standard deviations beyond chance",
                    },
                    formats={"overlap": ".5f"},
                ),
            },
        }
        lists = {"x": tasks, "y": tasks}
        columns = ("x", "y", "overlap", "beyond")
        variants[str(index)] = Variant(spec, columns, rows, lists, mirrored=True)
    return _by_run("overlap", "Overlap of the masks of each pair of tasks", variants)


def places(runs: Sequence[ReportedRun]) -> Plot | None:
    """Plot the tasks' masks as points in a plane."""
    variants = {}
    for index, run in _with_masks(runs, tasks=3):
        masks = run.masks
        assert masks is not None
        points, _ = masks.places()
        most = float(np.abs(points).max()) * 1.25 or 1.0
        axis = {"scale": {"domain": [-most, most], "nice": False}, "axis": None}
        rows: list[Row] = [[i, *map(few_digits, map(float, p))] for i, p in enumerate(points)]
        layers: list[Spec] = [
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.85}}
        ]
        if len(points) <= 15:
            layers.append(
                {
                    "mark": {"type": "text", "dy": -11},
                    "encoding": {"text": {"field": "task"}},
                }
            )
        spec: Spec = {
            "width": 360,
            "height": 360,
            "encoding": {
                "x": {"field": "x", "type": "quantitative", **axis},
                "y": {"field": "y", "type": "quantitative", **axis},
                "color": {"value": "var(--accent)"},
                "tooltip": _tooltip({"task": "task"}),
            },
            "layer": layers,
        }
        variants[str(index)] = Variant(spec, ("task", "x", "y"), rows, {"task": masks.tasks})
    return _by_run("places", "The tasks' masks as points in a plane", variants)


def density(runs: Sequence[ReportedRun]) -> Plot | None:
    """Plot the share of active weights of each layer and task."""
    variants = {}
    for index, run in _with_masks(runs, tasks=1):
        assert run.masks is not None
        densities = run.masks.densities()
        rows: list[Row] = [
            [layer, task, few_digits(float(share))]
            for layer, shares in enumerate(densities.values())
            for task, share in enumerate(shares)
        ]
        spec: Spec = {
            "height": 16 * len(densities),
            "mark": {"type": "rect"},
            "encoding": {
                "x": _tasks("task", run.masks.tasks, labels=len(run.masks.tasks) <= 12),
                "y": _tasks("layer", tuple(densities), labels=True),
                "color": {
                    "field": "density",
                    "type": "quantitative",
                    "title": "share of active weights",
                    "scale": {"scheme": "viridis", "zero": False, "nice": False},
                    "legend": {"format": "~%", "tickCount": 3},
                },
                "tooltip": _tooltip(
                    {"layer": "layer", "task": "task", "density": "active"},
                    formats={"density": ".3%"},
                ),
            },
        }
        lists = {"task": run.masks.tasks, "layer": tuple(densities)}
        variants[str(index)] = Variant(spec, ("layer", "task", "density"), rows, lists)
    return _by_run("density", "Share of active weights of each layer and task", variants)


def _by_run(name: str, label: str, variants: dict[str, Variant]) -> Plot | None:
    return Plot(name, label, "run", variants) if variants else None


def _with_masks(runs: Sequence[ReportedRun], tasks: int) -> Iterable[tuple[int, ReportedRun]]:
    """Yield the index and the run of each run with masks of at least `tasks` tasks."""
    for index, run in enumerate(runs):
        if run.masks is not None and len(run.masks.tasks) >= tasks:
            yield index, run


def _tasks(name: str, values: Sequence[str], labels: bool) -> Spec:
    """Return an axis of names that keeps their order."""
    axis: Spec = {"labels": labels, "ticks": False, "domain": False, "labelOverlap": True}
    if len(values) > 24:
        axis["labelFontSize"] = 9
    return {
        "field": name,
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(values)},
        "axis": axis,
    }


def _scale(low: float, high: float, nice: bool = True) -> Spec:
    """Return a scale that stays the same when runs are hidden."""
    padding = 0.0 if high > low else abs(high) * 0.1 or 1.0
    return {"domain": [low - padding * (low != 0), high + padding], "nice": nice, "zero": False}


def _colour(runs: Sequence[ReportedRun]) -> Spec:
    return {
        "field": "run",
        "type": "nominal",
        "scale": {
            "domain": list(range(len(runs))),
            "range": [f"var(--run-{index % COLOURS})" for index in range(len(runs))],
        },
        "legend": None,
    }


def _dashes(runs: Sequence[ReportedRun]) -> Spec:
    styles = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
    chosen = [styles[index // COLOURS % len(styles)] for index in range(len(runs))]
    scale = {"domain": list(range(len(runs))), "range": chosen}
    return {"field": "run", "type": "nominal", "scale": scale, "legend": None}


def _tooltip(titles: dict[str, str], formats: dict[str, str] | None = None) -> list[Spec]:
    formats = formats or {}
    return [
        {"field": name, "title": title} | ({"format": formats[name]} if name in formats else {})
        for name, title in titles.items()
    ]
