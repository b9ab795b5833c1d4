"""Turn the benchmarks' results into Markdown tables and a plot.

    pytest bench/ --benchmark-only --benchmark-json=results.json
    python bench/report.py results.json --output docs/measured.md

A table per group of benchmarks: median time, its ratio to the reference and to the dense path, peak
memory. With --output, a plot of time and memory against the number of tasks goes beside the tables,
as an SVG file of the same name, if the results hold several numbers of tasks.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # one benchmark, as pytest-benchmark writes it

# Okabe and Ito's colours, which colour-blind readers tell apart; the shapes say the same again.
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
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="Markdown file; by default the terminal")
    arguments = parser.parse_args()
    report = json.loads(arguments.results.read_text(encoding="utf-8"))
    text = tables(report)
    if arguments.output is None:
        print(text)
        return
    series = by_tasks(report["benchmarks"])
    if series:
        picture = arguments.output.with_suffix(".svg")
        plot(series, picture)
        text = f"![{title(series[0])}]({picture.name})\n\n{text}"
    arguments.output.write_text(text, encoding="utf-8")


def tables(report: dict[str, Any]) -> str:
    """Every group as a table, and below them what the figures depend on."""
    groups: dict[str, list[Result]] = {}
    for result in report["benchmarks"]:
        groups.setdefault(result["group"] or result["name"], []).append(result)
    parts = [f"### {name}\n\n{table(results)}" for name, results in groups.items()]
    return "\n\n".join([*parts, circumstances(report)]) + "\n"


def table(results: list[Result]) -> str:
    """One group; a column that would be empty is left out."""
    columns: dict[str, Callable[[Result], str]] = {
        "": lambda r: label(r, results),
        "median": lambda r: seconds(median(r)),
        "÷ reference": lambda r: ratio(r, results, "reference"),
        "÷ dense": lambda r: ratio(r, results, "dense"),
        "peak memory": lambda r: size(r, "peak_bytes"),
        "share of the floor": lambda r: share(r),
        **{f"÷ {name}": functools.partial(beside, name=name) for name in names_beside(results)},
    }
    cells = {name: [cell(r) for r in results] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    rows = [list(cells), ["---", *["---:"] * (len(cells) - 1)], *zip(*cells.values(), strict=True)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    extra = results[0]["extra_info"]
    if "mask_bytes" in extra:
        text += (
            f"\n\n{size(results[0], 'mask_bytes')} of masks; {counted(extra['groups'], 'group')}."
        )
    return text


def label(result: Result, results: list[Result]) -> str:
    """What tells a benchmark from the others of its group."""
    name = result["name"].partition("[")[0].removeprefix("bench_")
    differing = [
        f"{key} {value}"
        for key, value in others(result).items()
        if any(others(r).get(key, value) != value for r in results)
    ]
    return ", ".join([path(result) or name, *differing])


def ratio(result: Result, results: list[Result], to: str) -> str:
    """The median over that of the path `to`, under the same other parameters."""
    for other in results:
        if path(other).startswith(to) and others(other) == others(result):
            return f"{median(result) / median(other):.2f}"
    return ""


def names_beside(results: list[Result]) -> list[str]:
    """What the benchmarks were timed beside, call by call."""
    return list(dict.fromkeys(name for r in results for name in r["extra_info"].get("beside", {})))


def beside(result: Result, name: str) -> str:
    """The median over that of what was timed beside it."""
    other = result["extra_info"].get("beside", {}).get(name)
    return "" if other is None else f"{median(result) / other:.2f}"


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


def size(result: Result, key: str) -> str:
    """A number of bytes in the benchmark's own notes, or nothing."""
    value = result["extra_info"].get(key)
    if value is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def share(result: Result) -> str:
    value = result["extra_info"].get("share_of_floor")
    return "" if value is None else f"{value:.1%}"


def circumstances(report: dict[str, Any]) -> str:
    """What the figures depend on, in one line."""
    torch, commit, machine = report["torch"], report["commit_info"], report["machine_info"]
    changed = " with changes" if commit.get("dirty") else ""
    return (
        f"{torch['device']} ({machine['cpu'].get('brand_raw', machine['machine'])}, "
        f"{counted(torch['threads'], 'thread')}), PyTorch {torch['version']}, "
        f"Triton {torch['triton'] or 'not installed'}, Python {machine['python_version']}; "
        f"commit {commit.get('id', 'unknown')[:12]}{changed}, {report['datetime'][:10]}."
    )


def by_tasks(results: list[Result]) -> list[Result]:
    """The benchmarks, with their memory, that differ in path and number of tasks alone.

    Of several such sets, it is the one with most numbers of tasks, and the last of those; none if
    there is no set with two.
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
    """The set that a benchmark belongs to."""
    fixed = [str(value) for key, value in others(result).items() if key not in ("tasks", "d")]
    if "d" in others(result):
        fixed.append(f"d = {others(result)['d']}")
    name = result["name"].partition("[")[0].removeprefix("bench_").replace("_", " ")
    return f"{name}: {', '.join(fixed)}"


def plot(results: list[Result], picture: Path) -> None:
    """Draw time and memory of every path against the number of tasks, as SVG."""
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
