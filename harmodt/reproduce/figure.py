"""Draws an experiment: the difference of each variant from the reference, with intervals."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from ..files import clear_temporaries, write_bytes
from ..report.page import check_packages
from .tables import SOLVED, Outcome, Row, number

# These colours are legible on white and on black.
_INK, _OURS, _GRID = "#6e7781", "#1f7ae0", "#8b949e55"
_WIDTH = 270
_LETTERS = 56  # letters that fit above a panel and its labels

Spec = dict[str, Any]

_CONFIG: Spec = {
    "background": None,
    "padding": {"left": 24, "top": 5, "right": 12, "bottom": 5},  # a viewer's font may be wider
    "font": "sans-serif",
    "title": {"anchor": "start", "color": _INK, "subtitleColor": _INK, "offset": 12},
    "header": {"labelColor": _INK, "labelFontSize": 12, "labelFontWeight": "bold"},
    "view": {"stroke": _GRID},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "titleFontWeight": "normal",
        "gridColor": _GRID,
        "domainColor": _GRID,
        "tickColor": _GRID,
        "labelLimit": 260,
        "labelFlush": False,
        "labelOverlap": True,
    },
}


def write_figure(outcome: Outcome, path: Path) -> None:
    """Write an SVG file, whole or not at all.

    Raises:
        UserError: a package of harmodt[report] is missing.
    """
    check_packages()
    import vl_convert

    clear_temporaries(path)
    write_bytes(path, vl_convert.vegalite_to_svg(describe(outcome)).encode())


def describe(outcome: Outcome) -> Spec:
    """Return the figure in Vega-Lite: a panel for each column, with a line for each variant."""
    experiment = outcome.plan.experiment
    references = {r.column: r for r in outcome.rows if r.variant == experiment.reference}
    points = [_point(row, references[row.column]) for row in outcome.rows]
    legend = "paired differences with 95 % intervals; means at the right"
    if any("paper" in point for point in points):
        legend += "; ◇ the paper's differences at its own budget"
    letters = _LETTERS * min(2, len(experiment.columns))  # a wider text would be cut off
    title = f"{outcome.rows[0].measure}, minus {experiment.reference}"
    panel = [
        _layer("rule", "zero", title, strokeDash=[2, 3], color=_INK),
        _layer("rule", "low", title, x2={"field": "high"}, strokeWidth=2, color=_OURS, opacity=0.6),
        _layer("point", "difference", title, filled=True, size=60, color=_OURS, opacity=1),
        _layer("point", "paper", title, shape="diamond", size=50, color=_INK),
        {
            "mark": {"type": "text", "x": _WIDTH + 8, "align": "left", "color": _INK},
            "encoding": {"text": {"field": "mean"}},
        },
    ]
    lines = {
        "field": "variant",
        "sort": [variant.name for variant in experiment.variants],
        "title": None,
    }
    return {
        "title": {
            "text": wrap(f"{outcome.plan.name}: {experiment.title}", letters),
            "subtitle": wrap(legend, letters),
        },
        "data": {"values": points},
        "facet": {
            "field": "column",
            "sort": [column.name for column in experiment.columns],
            "title": None,
        },
        "columns": 2,
        "spacing": 60,
        "spec": {
            "width": _WIDTH,
            "height": {"step": 22},
            "encoding": {"y": lines},
            "layer": panel,
        },
        "config": _CONFIG,
    }


def _point(row: Row, reference: Row) -> Spec:
    """Return the values of a row that the figure draws. Missing values are left out."""
    scale = 100 if row.measure == SOLVED else 1
    point: Spec = {"column": row.column, "variant": row.variant, "mean": "–"}
    if row is reference:
        point["zero"] = point["difference"] = 0
    if row.mean is not None:
        point["mean"] = number(row, row.mean.mean)
    if row.difference is not None:
        found = row.difference
        point |= {"difference": scale * found.mean}
        point |= {"low": scale * found.low, "high": scale * found.high}
    if row.paper and reference.paper and row is not reference:
        value, base = (float(p.partition(" ± ")[0]) for p in (row.paper, reference.paper))
        point["paper"] = value - base
    return point


def _layer(mark: str, field: str, title: str, x2: Spec | None = None, **style: Any) -> Spec:
    """Return marks at the values of a field. The mark of the field zero spans all lines."""
    encoding: Spec = {"x": {"field": field, "type": "quantitative", "title": title}}
    encoding |= {"x2": x2} if x2 else {}
    encoding |= {"y": None} if field == "zero" else {}
    return {
        "transform": [{"filter": f"isValid(datum.{field})"}],
        "mark": {"type": mark, **style},
        "encoding": encoding,
    }
