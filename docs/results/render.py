"""Make figures, CSV files and the tables of README.md and docs/results.md from the JSON files here.

    python docs/results/render.py

`python -m harmodt.reproduce` wrote these files, except for `others.json`. That file holds further
numbers of two tables: measurements of checkpoints, and differences from a second reference. In a
text, a table follows the comment `<!-- table: NAME -->`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harmodt import sealed
from harmodt.reproduce.figure import write_figure
from harmodt.reproduce.plan import make_plan
from harmodt.reproduce.tables import FORMAT, VERSION, Outcome, Row, number
from harmodt.statistics import Average

HERE = Path(__file__).parent
TEXTS = (HERE.parents[1] / "README.md", HERE.parent / "results.md")
EXPERIMENTS = ("methods", "controls", "gradients", "movement", "longer", "soft", "fifty")

BOTH = {"MT10 near-optimal": "near-optimal", "MT10 sub-optimal": "sub-optimal"}
FIFTY = {f"MT50 {name}": name for name in ("near-optimal, 1.47 M", "sub-optimal, 0.48 M")}

Lines = list[list[str]]


def read(name: str) -> dict[str, Any]:
    """Read a JSON file here.

    Raises:
        UserError: it was changed after it was written.
    """
    form = "harmodt-others" if name == "others" else FORMAT
    again = "write it with the version of HarmoDT that reads it"
    kind = sealed.Kind(f"{form} in JSON", form, VERSION, "give a file of docs/results", again)
    return sealed.read(HERE / f"{name}.json", dict[str, Any], kind)


@functools.cache
def outcome(name: str) -> Outcome:
    """Read the results of an experiment."""
    content = read(name)
    plan = make_plan(name, content["budget"], content["seeds"], content["reference"])
    for row in content["rows"]:
        row["seeds"] = tuple(row["seeds"])
        for key in ("mean", "middle", "difference"):
            row[key] = row[key] and Average(**row[key])
    return Outcome(plan, tuple(Row(**row) for row in content["rows"]), tuple(content["notes"]))


def row_of(name: str, column: str, variant: str) -> Row:
    """Return the row of an experiment's variant on a column."""
    rows = {(row.column, row.variant): row for row in outcome(name).rows}
    return rows[column, variant]


def percent(row: Row) -> str:
    """The mean alone."""
    assert row.mean is not None
    return f"{number(row, row.mean.mean)} %"


def with_deviation(row: Row) -> str:
    assert row.mean is not None and row.deviation is not None
    return f"{number(row, row.mean.mean)} ± {number(row, row.deviation)}"


def difference(row: Row) -> str:
    """Return the difference from the reference with its interval; nothing for the reference."""
    found = row.difference
    return "" if found is None else interval(*(number(row, getattr(found, n)) for n in BOUNDS))


BOUNDS = ("mean", "low", "high")


def interval(middle: str, low: str, high: str) -> str:
    return f"{middle} ({low} to {high})".replace("-", "−")


def compared(
    name: str,
    columns: Mapping[str, str],
    variants: Mapping[str, str],
    cell: Callable[[Row], str] = with_deviation,
    rule: str = "---",
) -> Lines:
    """Return a table's lines: each variant's mean, and its difference from the reference.

    Args:
        columns, variants: the name in the table of each of the experiment's, in the table's order.
        cell: what stands for a mean.
        rule: below the headings of means.
    """
    minus = f"minus {outcome(name).plan.experiment.reference}"
    lines = [["", *(h for column in columns.values() for h in (column, minus))]]
    lines.append(["---", *(part for _ in columns for part in (rule, "---"))])
    for variant, shown in variants.items():
        rows = [row_of(name, column, variant) for column in columns]
        lines.append([shown, *(text for row in rows for text in (cell(row), difference(row)))])
    return lines


def beside(lines: Lines, columns: Lines) -> Lines:
    """Insert further columns after the first column of a table."""
    return [[*line[:1], *more, *line[1:]] for line, more in zip(lines, columns, strict=True)]


def methods() -> Lines:
    shown = {
        "HarmoDT-F": "HarmoDT-F, learned masks",
        "HarmoDT-M": "HarmoDT-M, learned masks",
        "HarmoDT-R": "HarmoDT-R, random masks",
        "HarmoDT-R, one mask for all": "HarmoDT-R, one mask for all",
        "Prompt-DT": "Prompt-DT",
        "Prompt-DT + PCGrad": "Prompt-DT + PCGrad",
        "MTDT": "MTDT, 0.34 M",
        "MTBC": "MTBC, 1.71 M",
        "MTIQL": "MTIQL, 1.65 M",
        "MTDIFF-P, 1.15 M": "MTDiff-P, 1.15 M, 2000 steps",
    }
    return compared("methods", BOTH, shown)


def methods_by_task() -> Lines:
    """Return the table of success in % on the hard tasks."""
    tasks = ("reach", "push", "pick-place", "peg-insert-side")
    names = ["HarmoDT-F", "HarmoDT-R", "HarmoDT-R, one mask for all", "Prompt-DT"]
    names += ["Prompt-DT + PCGrad", "MTDT", "MTBC", "MTIQL", "MTDIFF-P, 1.15 M"]
    lines = [["", *tasks], ["---", *("--:" for _ in tasks)]]
    for name in names:
        by_task = row_of("methods", "MT10 sub-optimal", name).by_task
        values = [by_task[f"{task}-v3"] for task in tasks]
        solved = [f"{100 * sum(seeds) / len(seeds):.0f}" for seeds in values]
        lines.append([name.replace("MTDIFF-P, 1.15 M", "MTDiff-P"), *solved])
    return lines


def controls() -> Lines:
    shown = {
        "HarmoDT-R": "HarmoDT-R, random masks, S = 0.2",
        "HarmoDT-R, S = 0.05": "S = 0.05",
        "HarmoDT-R, S = 0.5": "S = 0.5",
        "HarmoDT-R, embedding": "with an embedding",
        "HarmoDT-R, one mask for all": "one mask for all",
        "HarmoDT-F": "HarmoDT-F",
        "HarmoDT-F, embedding": "with an embedding",
        "Prompt-DT": "Prompt-DT",
        "Prompt-DT, embedding": "with an embedding",
        "MTDT": "MTDT",
    }
    return compared("controls", BOTH, shown)


def gradients() -> Lines:
    shown = {
        "Prompt-DT": "Prompt-DT",
        "Prompt-DT + PCGrad": "+ PCGrad",
        "Prompt-DT + CAGrad": "+ CAGrad, c = 0.4",
        "Prompt-DT + GradDrop": "+ GradDrop",
        "HarmoDT-R": "HarmoDT-R, random masks",
    }
    return compared("gradients", BOTH, shown)


def movement() -> Lines:
    measured = read("others")["movement"]
    names = [row.variant for row in outcome("movement").rows if row.column == "MT10 near-optimal"]
    shown = {name: name.replace("HarmoDT-R", "HarmoDT-R, never") for name in names}
    columns = [["moved", "other at the end", "overlap"], ["--:", "--:", "--:"]]
    for name in names:
        found = measured[name]
        columns.append([f"{found['moved']:,}", f"{found['other']:,}", f"{found['overlap']:.3f}"])
    return beside(compared("movement", BOTH, shown), columns)


def longer() -> Lines:
    """Return the results after ten times as many steps, beside those of the shorter runs."""
    column = "MT10 sub-optimal"
    from_second = read("others")["longer minus Prompt-DT"]
    names = ["HarmoDT-F", "HarmoDT-R", "HarmoDT-R, one mask for all", "Prompt-DT"]
    table = compared("longer", {column: "8000 steps"}, {name: name for name in names})
    short = [with_deviation(row_of("methods", column, name)) for name in names]
    table = beside(table, [["800 steps"], ["---"], *([text] for text in short)])
    found = [from_second.get(name) for name in names]
    last = ["" if values is None else interval(*map(str, values)) for values in found]
    ends = ["minus Prompt-DT", "---", *last]
    return [[*line, end] for line, end in zip(table, ends, strict=True)]


def soft() -> Lines:
    names = ("HarmoDT-F", "HarmoDT-R", "Soft masks")
    return compared("soft", BOTH, {name: name for name in names})


def fifty() -> Lines:
    names = ("HarmoDT-F", "HarmoDT-R", "MTDT", "Prompt-DT")
    return compared("fifty", FIFTY, {name: name for name in names}, rule="--:")


def fifty_in_readme() -> Lines:
    shown = {
        "HarmoDT-F": "HarmoDT-F, learned masks",
        "HarmoDT-R": "HarmoDT-R, random masks",
        "MTDT": "MTDT, a task embedding",
        "Prompt-DT": "Prompt-DT, no masks",
    }
    lines = compared("fifty", FIFTY, shown, percent, "--:")
    lines[0][0] = "two seeds, 2000 episodes"
    return lines


TABLES: dict[str, Callable[[], Lines]] = {
    "methods": methods,
    "methods by task": methods_by_task,
    "controls": controls,
    "gradients": gradients,
    "movement": movement,
    "longer": longer,
    "soft": soft,
    "fifty": fifty,
    "fifty in README": fifty_in_readme,
}
"""The name of every table in the texts, and the function that returns its lines."""


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = (" | ".join(line) for line in lines)
    return "".join(f"| {row} |\n".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def with_tables(text: str) -> str:
    """Return a text with all its tables made from the JSON files."""
    marked = re.compile(r"(<!-- table: (.+) -->\n\n)(?:\|.*\n)+")
    return marked.sub(lambda found: found[1] + to_markdown(TABLES[found[2]]()), text)


def main() -> None:
    """Run the command line."""
    for name in EXPERIMENTS:
        (HERE / f"{name}.csv").write_text(outcome(name).to_csv(), encoding="utf-8")
        write_figure(outcome(name), HERE / f"{name}.svg")
    for text in TEXTS:
        text.write_text(with_tables(text.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
