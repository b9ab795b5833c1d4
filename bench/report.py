"""Turns the benchmarks' results into Markdown tables and a plot.

    pytest bench/ --benchmark-only --benchmark-json=results.json
    python bench/report.py results.json --output docs/measured.md

Each group of benchmarks answers one question and gets a table: for each path the median time, the
fused kernels' time divided by it, and the peak memory. `pytest bench/ --benchmark-only` prints the
same tables at its end. With --output, an SVG file with the same name plots time and memory against
the number of tasks, if the results have several numbers of tasks.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # one benchmark, as pytest-benchmark writes it

# Okabe and Ito's colours, which colour-blind readers can distinguish. Each path also has a shape.
STYLES = {
    "fused": {"color": "#0072B2", "marker": "o"},
    "reference": {"color": "#D55E00", "marker": "s"},
    "compiled": {"color": "#CC79A7", "marker": "^"},
    "vmap": {"color": "#009E73", "marker": "D"},
    "dense": {"color": "#000000", "marker": "x", "linestyle": "--"},
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the file that --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="Markdown file; by default, print text")
    arguments = parser.parse_args()
    report = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.output is None:
        print(text_tables(report), end="")
        return
    measured = tables(report)
    series = by_tasks(report["benchmarks"])
    if series:
        picture = arguments.output.with_suffix(".svg")
        plot(series, picture)
        measured = f"![{title(series[0])}]({picture.name})\n\n{measured}"
    arguments.output.write_text(measured, encoding="utf-8")


def tables(report: dict[str, Any]) -> str:
    """A Markdown table for each question, then a line with the circumstances."""
    parts = [f"### {name}\n\n{markdown(rows)}" for name, rows in questions(report["benchmarks"])]
    return "\n\n".join([*parts, circumstances(report)]) + "\n"


def text_tables(report: dict[str, Any], width: int = 100) -> str:
    """The same as plain text of at most `width` columns."""
    parts = [
        f"{textwrap.fill(name, width)}\n{text(rows, width)}"
        for name, rows in questions(report["benchmarks"])
    ]
    return "\n\n".join([*parts, textwrap.fill(circumstances(report), width)]) + "\n"


@dataclass(frozen=True)
class Row:
    """The measurements of one path in one case of a question.

    Attributes:
        case: the parameters that differ within the question, apart from the path.
        notes: the benchmark's other results: peak_bytes, launches, share_of_floor.
    """

    case: str
    path: str
    median: float
    notes: dict[str, Any]


def questions(results: list[Result]) -> list[tuple[str, list[Row]]]:
    """The groups of benchmarks in order, each with its rows by case, the fused path first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["group"] or result["name"], []).append(result)
    return [(name, _by_case(group)) for name, group in groups.items()]


def _by_case(results: list[Result]) -> list[Row]:
    cases: dict[str, list[Row]] = {}
    for result in results:
        case = case_of(result, results)
        cases.setdefault(case, []).extend(rows_of(result, case))
    return [row for rows in cases.values() for row in sorted(rows, key=lambda r: r.path != "fused")]


def rows_of(result: Result, case: str) -> list[Row]:
    """A benchmark's own row, and the rows of calls that were timed in turn with it.

    If there are such calls, the benchmark's own path is "fused".
    """
    beside = result["extra_info"].get("beside", {})
    name = result["name"].partition("[")[0].removeprefix("bench_").replace("_", " ")
    first = Row(
        case, path(result) or ("fused" if beside else name), median(result), result["extra_info"]
    )
    return [first, *(Row(case, other, n["median"], n) for other, n in beside.items())]


def case_of(result: Result, results: list[Result]) -> str:
    """The parameters in which a benchmark differs from others of its group, without the path."""
    differing = [
        str(value) if isinstance(value, str) else f"{key} {value}"
        for key, value in others(result).items()
        if any(others(r).get(key, value) != value for r in results)
    ]
    extra = result["extra_info"]
    if "mask_bytes" in extra:
        differing.append(f"{size(extra['mask_bytes'])} of masks")
    return ", ".join(differing)


def cells(rows: list[Row]) -> dict[str, list[str]]:
    """The columns of a table, without empty ones."""
    fused = {row.case: row.median for row in rows if row.path == "fused"}

    def ratio(row: Row) -> str:
        baseline = row.path != "fused" and row.case in fused
        return f"{fused[row.case] / row.median:.2f}" if baseline else ""

    columns = {
        "": [row.path for row in rows],
        "time": [seconds(row.median) for row in rows],
        "fused ÷ this": [ratio(row) for row in rows],
        "peak memory": [size(row.notes.get("peak_bytes")) for row in rows],
        "launches": [str(row.notes.get("launches", "")) for row in rows],
        "minimum ÷ time": [share(row.notes.get("share_of_floor")) for row in rows],
    }
    return {head: column for head, column in columns.items() if any(column)}


def markdown(rows: list[Row]) -> str:
    """A table with the case in the first column, on the first of its rows."""
    named = [
        row.case if before is None or row.case != before.case else ""
        for before, row in zip([None, *rows], rows, strict=False)
    ]
    columns = [*cells(rows).items()]
    if any(named):
        columns.insert(0, ("case", named))
    heads, values = zip(*columns, strict=True)
    return plain_table(heads, zip(*values, strict=True))


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table. Columns of numbers are aligned right, except the first."""
    lines = [list(row) for row in rows]
    rule = [
        "---:" if index and all(cell[:1].isdigit() for cell in column if cell) else "---"
        for index, column in enumerate(zip(*lines, strict=True))
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def text(rows: list[Row], width: int) -> str:
    """A table with a line for each case above its paths.

    A path that is too long for its column stands whole on lines above its numbers.
    """
    columns = cells(rows)
    room = width - 2 - sum(max(map(len, (h, *column))) + 2 for h, column in columns.items() if h)
    columns[""] = [row.path if len(row.path) + 2 <= room else "" for row in rows]
    widths = [max(map(len, (head, *column))) + 2 for head, column in columns.items()]
    aligned = [
        line[0].ljust(widths[0]) + "".join(map(str.rjust, line[1:], widths[1:]))
        for line in [tuple(columns), *zip(*columns.values(), strict=True)]
    ]
    lines, case = [f"  {aligned[0]}"], ""
    for row, line in zip(rows, aligned[1:], strict=True):
        if row.case != case:
            lines += textwrap.wrap(row.case, width)
            case = row.case
        if len(row.path) + 2 > room:
            lines += textwrap.wrap(row.path, width, initial_indent="  ", subsequent_indent="  ")
        lines.append(f"  {line}")
    return "\n".join(line.rstrip() for line in lines)


def path(result: Result) -> str:
    return (result["params"] or {}).get("path", "")


def others(result: Result) -> dict[str, Any]:
    """The parameters apart from the path."""
    return {key: value for key, value in (result["params"] or {}).items() if key != "path"}


def median(result: Result) -> float:
    return result["stats"]["median"]


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def size(value: int | None) -> str:
    """A number of bytes as text; "" for None."""
    if value is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def circumstances(report: dict[str, Any]) -> str:
    """The circumstances of the results, in one line."""
    torch, commit, machine = report["torch"], report["commit_info"], report["machine_info"]
    changed = " with changes" if commit.get("dirty") else ""
    return (
        f"{torch['device']} ({machine['cpu'].get('brand_raw', machine['machine'])}, "
        f"{counted(torch['threads'], 'thread')}), PyTorch {torch['version']}, "
        f"Triton {torch['triton'] or 'not installed'}, Python {machine['python_version']}; "
        f"commit {commit.get('id', 'unknown')[:12]}{changed}, {report['datetime'][:10]}."
    )


def by_tasks(results: list[Result]) -> list[Result]:
    """The largest set of benchmarks that differ only in path and number of tasks.

    Only benchmarks with a peak memory count. A set needs at least two numbers of tasks. Of sets
    with equally many, the last one is taken.
    """
    sets: dict[str, list[Result]] = {}
    for result in results:
        if "tasks" in others(result) and "peak_bytes" in result["extra_info"]:
            fixed = {key: value for key, value in others(result).items() if key != "tasks"}
            key = json.dumps([result["name"].partition("[")[0], fixed], default=str)
            sets.setdefault(key, []).append(result)
    largest: list[Result] = []
    for found in sets.values():
        if len(numbers_of_tasks(found)) >= max(2, len(numbers_of_tasks(largest))):
            largest = found
    return largest


def numbers_of_tasks(results: list[Result]) -> list[int]:
    return sorted({others(result)["tasks"] for result in results})


def title(result: Result) -> str:
    """The title of the set that a benchmark belongs to."""
    fixed = [str(value) for key, value in others(result).items() if key not in ("tasks", "d")]
    if "d" in others(result):
        fixed.append(f"d = {others(result)['d']}")
    name = result["name"].partition("[")[0].removeprefix("bench_").replace("_", " ")
    return f"{name}: {', '.join(fixed)}"


def plot(results: list[Result], picture: Path) -> None:
    """Plot time and memory of every path against the number of tasks, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "harmodt", "font.size": 10})  # the same file each time
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title(results[0]))
    tasks = numbers_of_tasks(results)
    for name in dict.fromkeys(path(result) for result in results):
        points = [result for result in results if path(result) == name]
        x = [tasks.index(others(result)["tasks"]) for result in points]
        style = {"label": name, "markerfacecolor": "none", "markersize": 8, **STYLES.get(name, {})}
        time.plot(x, [1e3 * median(result) for result in points], **style)
        memory.plot(x, [result["extra_info"]["peak_bytes"] / 1e6 for result in points], **style)
    extra = {others(result)["tasks"]: result["extra_info"] for result in results}
    if all("mask_bytes" in extra[number] for number in tasks):
        masks = [extra[number]["mask_bytes"] / 1e6 for number in tasks]
        memory.plot(masks, color="#767676", linestyle=":", label="the masks of all tasks")
    for axes, quantity in ((time, "median time of a call [ms]"), (memory, "peak memory [MB]")):
        axes.set_xticks(range(len(tasks)), [tick(number, extra[number]) for number in tasks])
        axes.set_xlabel("tasks")
        axes.set_ylabel(quantity)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def tick(tasks: int, extra: dict[str, Any]) -> str:
    return f"{tasks}\n({counted(extra['groups'], 'group')})" if "groups" in extra else str(tasks)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    main()
