"""Builds the page: one file with all sections, styles and scripts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import clear_temporaries, write_bytes
from . import figures, tables
from .figures import CONFIG, Plot
from .numbers import percent
from .runs import ReportedRun, read_runs
from .tables import text

START = "<!doctype html>\n<!-- Runs of HarmoDT -->\n"
"""The beginning of every page. A file with another beginning is never overwritten."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"
"""The page's security policy: the browser loads nothing from elsewhere. It allows 'unsafe-eval',
because Vega compiles functions from text."""

PACKAGES = {"vl_convert": "vl-convert-python", "scipy.cluster.hierarchy": "scipy"}
"""The modules that draw plots and cluster masks, and their packages."""


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write a page of some runs, whole or not at all. The same runs give the same page.

    Args:
        runs: the directories of the runs.
        output: the HTML file. An older page of runs is replaced.

    Raises:
        UserError: a package of harmodt[report] is missing; a directory holds no run or is named
            twice; a file of a run is damaged; or `output` exists and is not a page of runs.
    """
    check_packages()
    _check_place(output)
    content = _page(read_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    clear_temporaries(output)
    write_bytes(output, content.encode())


def check_packages() -> None:
    """Raise UserError if a package of harmodt[report] is missing."""
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"plots need the package {package}: pip install 'harmodt[report]'"
            ) from error


def _check_place(output: Path) -> None:
    if not output.exists():
        return
    start = START.encode()
    if output.is_file():
        with open(output, "rb") as file:
            if file.read(len(start)) == start:
                return
    raise UserError(f"{output} exists and is not a page of runs: name another --output")


def _page(runs: Sequence[ReportedRun]) -> str:
    import vl_convert  # an optional dependency

    plots: list[Plot] = []
    sections = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{content}</section>"
        for name, title, content in (
            (name, title, make(runs, plots)) for name, (title, make) in SECTIONS.items()
        )
        if content
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in SECTIONS.items())
    files = resources.files(__package__)
    style, program = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    content = {
        "config": CONFIG,
        "names": [run.name for run in runs],
        "plots": [_as_json(plot) for plot in plots],
    }
    return (
        f'{START}<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>HarmoDT: {text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#overview">Skip to the overview</a>\n'
        f'<header><h1>{text(title)}</h1><nav aria-label="Sections">{links}</nav></header>\n'
        f"{_key(runs)}\n<main>{sections}</main>\n"
        "<noscript><p>The plots need JavaScript; the tables do not.</p></noscript>\n"
        f'<script type="application/json" id="content">{_safe_json(content)}</script>\n'
        f"<script>{library}</script>\n<script>\n{program}</script>\n</body>\n</html>\n"
    )


def _safe_json(content: Any) -> str:
    """Return JSON that opens and closes no HTML element, whatever names it holds."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _as_json(plot: Plot) -> dict[str, Any]:
    variants = {
        choice: {
            "spec": variant.spec,
            "columns": variant.columns,
            "rows": variant.rows,
            "lists": {name: list(values) for name, values in variant.lists.items()},
            "mirrored": variant.mirrored,
        }
        for choice, variant in plot.variants.items()
    }
    return {"name": plot.name, "choice": plot.choice, "variants": variants}


def _key(runs: Sequence[ReportedRun]) -> str:
    """Return a button for each run, in its colour, that hides or shows it in the plots."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-run="{index}">'
        f"{tables.run_heading(index, run.name)}</button>"
        for index, run in enumerate(runs)
    )
    return f'<div id="key" role="group" aria-label="Runs shown in the plots">{buttons}</div>'


def _figure(
    plot: Plot | None, plots: list[Plot], title: str, caption: str, kind: str = "half"
) -> str:
    """Add a plot to the page's plots, and return the HTML element that shows it.

    Args:
        plot: the plot; None gives an empty string.
        plots: the page's plots so far.
        title, caption: the texts above and below the plot.
        kind: the width of the element: "half" of the page, or "wide".
    """
    if plot is None:
        return ""
    plots.append(plot)
    return (
        f'<figure class="{kind}"><h3>{title}</h3>'
        f'<div class="plot" id="plot-{plot.name}" role="img" aria-label="{text(plot.label)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _notes(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="note">{text(sentence)}</p>' for sentence in sentences)


def _lacking(
    runs: Sequence[ReportedRun], has: Callable[[ReportedRun], Any], what: str
) -> list[str]:
    """Return a list with a sentence that names the runs which lack something, or an empty list.

    Args:
        runs: the runs.
        has: tells whether a run has the thing.
        what: the beginning of the sentence.
    """
    names = [run.name for run in runs if not has(run)]
    if len(names) == len(runs) > 1:
        return [f"{what}: all of these runs."]
    return [f"{what}: {', '.join(names)}."] if names else []


def _choice(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    """Return an HTML element that chooses between variants; nothing for fewer than two options."""
    if len(options) < 2:
        return ""
    items = "".join(f'<option value="{value}">{text(shown)}</option>' for value, shown in options)
    return f'<label class="choice">{label} <select data-choice="{name}">{items}</select></label>'


# The sections


def _overview(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    what = "Without an evaluation that can be compared here"
    unevaluated = _lacking(runs, tables.final_evaluation, what)
    return tables.overview(runs) + _notes([*tables.left_out(runs), *unevaluated])


def _training(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    timed = any(run.costs for run in runs)
    axes = [("steps", "training steps"), ("time", "time")] if timed else []
    found = [
        _figure(
            figures.over_training("loss", "loss", runs, lambda run: run.series("loss")),
            plots,
            "Loss",
            "Mean over the steps since the last record and over the tasks of each step"
            f"{'; a point is the mean of neighbouring records' if _thinned(runs) else ''}.",
        ),
        _figure(
            figures.over_training(
                "success", "success", runs, _scores("success"), unit=True, points=True
            ),
            plots,
            "Success",
            "Share of the episodes that were solved, over all tasks.",
        ),
        _figure(
            figures.over_training("return", "mean return", runs, _scores("return"), points=True),
            plots,
            "Mean return",
            "Mean return of the episodes of all tasks.",
        ),
    ]
    notes = _lacking(runs, lambda run: run.metrics, "Without metrics of training")
    notes += _lacking(
        runs,
        lambda run: run.measure in (None, run.own_measure) or not run.series("mean_return"),
        "Evaluations during training were measured in another way and are left out",
    )
    notes += _lacking(runs, lambda run: run.costs, "Earlier versions did not record the time")
    return (
        _choice("axis", "against", axes)
        + f'<div class="grid">{"".join(found)}</div>'
        + _notes(notes)
    )


def _thinned(runs: Sequence[ReportedRun]) -> bool:
    return any(len(run.series("loss")) > figures.points_each(runs) for run in runs)


def _scores(kind: str) -> Callable[[ReportedRun], list[tuple[int, float]]]:
    """Return a function that gives the scores of a run's evaluations, by step.

    It includes only evaluations with the measure that is compared.

    Args:
        kind: "success", or "return" for runs whose environments do not report success.
    """

    def scores(run: ReportedRun) -> list[tuple[int, float]]:
        solves = bool(run.description.environment.get("success"))
        if solves != (kind == "success"):
            return []
        found = {}
        if run.measure in (None, run.own_measure):
            found = dict(run.series("success" if solves else "mean_return"))
        for result in run.compared:
            score = result.success_rate if solves else result.mean_return
            assert score is not None
            found[result.protocol.checkpoint] = score
        return sorted(found.items())

    return scores


def _success(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    found = []
    for columns in tables.evaluations(runs):
        title, table = tables.success(columns)
        notes = _notes([tables.how_measured(columns, runs), *tables.protocol_notes(columns)])
        found.append(f"<h3>{text(title)}</h3>{table}{notes}")
    unevaluated = _lacking(runs, lambda run: run.evaluations, "Not evaluated yet")
    caption = (
        "All intervals are 95 % intervals: Wilson's for the success of a task, a bootstrap's for "
        "returns and for the average. The bootstrap resamples tasks and episodes."
    )
    return "".join(found) + (_notes([caption]) if found else "") + _notes(unevaluated)


def _harmony(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    plot = figures.over_training("harmony", "harmony", runs, lambda run: run.series("harmony"))
    figure = _figure(
        plot,
        plots,
        "Averaged harmony score",
        "How far the tasks' gradients agree with their mean, from −1 to 1 (Definition 3.2, Figure "
        "2a of the paper). Runs with masks compare masked gradients, runs without masks dense "
        "gradients.",
        "wide",
    )
    lacking = _lacking(runs, lambda run: run.series("harmony"), "Not logged (--harmony-every)")
    return f'<div class="grid">{figure}</div>{_notes(lacking)}'


def _masks(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    having = [(str(i), run.name) for i, run in enumerate(runs) if run.masks is not None]
    if not having:
        return _notes(["None of these runs has masks, or a checkpoint with them."])
    found = [
        _figure(
            figures.overlap(runs),
            plots,
            "Overlap between tasks",
            "Of the weights that are active in at least one of two tasks, the share active in both "
            "(Jaccard's index). Similar tasks are side by side; rows and columns have the same "
            "order. The colours span the values of this run, even if these are close together.",
        ),
        _figure(
            figures.places(runs),
            plots,
            "Masks as points in a plane",
            "Classical scaling of the Hamming distances, in place of the t-SNE of the paper's "
            "Figure 5. It keeps the distances as well as two axes can.",
        ),
        _figure(
            figures.density(runs),
            plots,
            "Density by layer and task",
            "Share of a layer's weights that are active. Columns are the tasks in the run's order.",
            "wide",
        ),
    ]
    facts = "".join(
        f'<p class="note" data-run="{index}">{text(_facts(run))}</p>'
        for index, run in enumerate(runs)
        if run.masks is not None
    )
    without = _lacking(runs, lambda run: run.masks is not None, "Without masks or a checkpoint")
    grid = f'<div class="grid">{"".join(found)}</div>'
    return _choice("run", "masks of", having) + facts + grid + _notes(without)


def _facts(run: ReportedRun) -> str:
    """Return sentences that sum up the plots of a run's masks."""
    masks = run.masks
    assert masks is not None
    tasks, active = len(masks.tasks), np.diag(masks.shared) / masks.sizes.sum()
    share, number = percent(active.mean(), 1), "1 mask" if tasks == 1 else f"{tasks} masks"
    said = f"{run.name}: {number}, {share} of the weights active in each."
    if tasks == 1:
        return said
    upper = np.triu_indices(tasks, 1)
    overlap, beyond = masks.overlap[upper], masks.beyond_chance[upper]
    said += (
        f" Two masks overlap by {overlap.mean():.4f} on average, {overlap.min():.4f} to "
        f"{overlap.max():.4f}. In {int((np.abs(beyond) > 3).sum())} of {len(beyond)} pairs, the "
        "number of shared weights is more than three standard deviations from the mean of random "
        "masks with the same densities."
    )
    if tasks > 2:
        said += f" The plane shows {percent(masks.places()[1])} of the masks' variance."
    return said


def _moved(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    updating = [run for run in runs if run.series("moved_weights")]
    if not updating:
        return _notes(["None of these runs has learned masks."])
    found = [
        _figure(
            figures.over_training(
                "moved",
                "weights moved",
                runs,
                lambda run: run.series("moved_weights"),
                from_zero=True,
            ),
            plots,
            "Weights moved by each mask update",
            "Number of weights that left a task's mask; as many entered it. With soft masks, the "
            "number of weights whose mask value changed. The plot shows the task with the largest "
            "number.",
        ),
        _figure(
            figures.changed_by_layer(runs),
            plots,
            "How many ever moved, by layer",
            "Share of a layer's mask bits, over all tasks. A point shows the bits that differ from "
            "the start; at least these have changed. A line ends at the sum of all changes; no "
            "more bits can have changed. A point without a line means that each bit changed at "
            "most once.",
        ),
        _figure(
            figures.over_training("sparsity", "sparsity", runs, _sparsity),
            plots,
            "Sparsity",
            "Share of inactive weights, mean over the tasks. Only updates of soft masks change it.",
        ),
    ]
    lacking = _lacking(
        updating, figures.layer_changes, "Layers were not logged, or there is no checkpoint"
    )
    return tables.changes(runs) + f'<div class="grid">{"".join(found)}</div>' + _notes(lacking)


def _sparsity(run: ReportedRun) -> list[tuple[int, float]]:
    """Return the mean sparsity over the tasks after each mask update that may change it."""
    return [(step, fmean(values.values())) for step, values in run.by_layer("sparsity/")]


def _costs(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    found = [
        _figure(
            figures.over_training("speed", "steps/s", runs, figures.throughput, from_zero=True),
            plots,
            "Throughput",
            "Training steps per second, without the time of mask updates, evaluations and "
            "checkpoints.",
        ),
        _figure(
            figures.time_by_part(runs),
            plots,
            "Time by part",
            "Wall-clock time. Work that a kill has lost is left out.",
        ),
    ]
    notes = _lacking(runs, lambda run: run.costs, "Time and memory were not recorded")
    memory = (
        "Memory is the largest amount that the training process held, without the workers of "
        "evaluations."
    )
    table = tables.costs(runs)
    return (
        table + f'<div class="grid">{"".join(found)}</div>' + _notes([memory] * bool(table) + notes)
    )


def _settings(runs: Sequence[ReportedRun], plots: list[Plot]) -> str:
    table, different = tables.all_settings(runs)
    if len(runs) == 1:
        return table
    only = (
        '<label class="choice"><input type="checkbox" id="differences"> only the '
        f"{different} that differ between the runs</label>"
    )
    return only + table


SECTIONS: dict[str, tuple[str, Callable[[Sequence[ReportedRun], list[Plot]], str]]] = {
    "overview": ("Overview", _overview),
    "training": ("Training", _training),
    "tasks": ("Tasks", _success),
    "harmony": ("Harmony", _harmony),
    "masks": ("Masks", _masks),
    "moved": ("Weights moved", _moved),
    "costs": ("Time and memory", _costs),
    "settings": ("Settings", _settings),
}
"""The title of each section, and the function that returns its HTML and adds its plots."""
