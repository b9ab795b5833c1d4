"""The tables and the plot that bench/report.py makes of benchmark results, and where they end."""

from __future__ import annotations

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "report.py"
REPORT = runpy.run_path(str(SCRIPT))


def result(group: str, name: str, median: float, params: Any, **extra: Any) -> dict[str, Any]:
    stats = {"median": median}
    return {"group": group, "name": name, "params": params, "extra_info": extra, "stats": stats}


def layer(tasks: int, path: str, median: float, peak: int) -> dict[str, Any]:
    params = {"passes": "forward", "d": 128, "tasks": tasks, "path": path}
    extra = {"peak_bytes": peak, "mask_bytes": 8256 * tasks, "groups": min(tasks, 2)}
    return result(f"layer, {tasks}", f"bench_layer[{tasks}-{path}]", median, params, **extra)


def step(path: str, dropout: float, median: float) -> dict[str, Any]:
    return result("step", f"bench_step[{path}]", median, {"path": path, "dropout": dropout})


LAYERS = [
    layer(1, "fused", 25e-6, 999),
    layer(1, "reference", 100e-6, 4_000_000),
    layer(1, "dense", 20e-6, 1500),
    layer(3, "fused", 50e-6, 1500),
    layer(3, "reference", 1.25, 9_000_000_000),
]
STEPS = [
    step("dense", 0.0, 0.1),
    step("dense", 0.1, 0.2),
    step("fused", 0.0, 0.3),
    step("fused", 0.1, 0.4),
    result("step", "bench_sampling", 0.0021, None, share_of_floor=0.1234),
]
IN_TURN = result(
    "linear layers",
    "bench_linear[8]",
    1e-3,
    {"rows": 8},
    peak_bytes=5,
    launches=3,
    beside={"dense, one": {"median": 2e-3, "peak_bytes": 7000, "launches": 9}},
)


def report(*benchmarks: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmarks": list(benchmarks),
        "torch": {"version": "2.13.0", "threads": 1, "device": "A GPU", "triton": None},
        "machine_info": {"cpu": {"brand_raw": "A CPU"}, "machine": "x86", "python_version": "3.11"},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
    }


def test_a_question_is_a_table_of_medians_ratios_and_memory() -> None:
    assert REPORT["tables"](report(*LAYERS[:3])) == (
        "### layer, 1\n"
        "\n"
        "| case |  | time | fused ÷ this | peak memory |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| 8.26 kB of masks | fused | 25 µs |  | 999 B |\n"
        "|  | reference | 100 µs | 0.25 | 4 MB |\n"
        "|  | dense | 20 µs | 1.25 | 1.5 kB |\n"
        "\n"
        "A GPU (A CPU, 1 thread), PyTorch 2.13.0, Triton not installed, Python 3.11; "
        "commit 0123456789ab with changes, 2026-01-02.\n"
    )


def test_ratios_are_to_the_fused_kernels_in_the_same_case() -> None:
    rows = REPORT["tables"](report(*STEPS)).splitlines()[2:9]
    assert rows == [
        "| case |  | time | fused ÷ this | minimum ÷ time |",
        "| --- | --- | ---: | ---: | ---: |",
        "| dropout 0.0 | fused | 300 ms |  |  |",
        "|  | dense | 100 ms | 3.00 |  |",
        "| dropout 0.1 | fused | 400 ms |  |  |",
        "|  | dense | 200 ms | 2.00 |  |",
        "|  | sampling | 2.1 ms |  | 12.3% |",
    ]


def test_what_was_timed_in_turn_is_a_row_of_its_own() -> None:
    assert REPORT["tables"](report(IN_TURN)).splitlines()[2:6] == [
        "|  | time | fused ÷ this | peak memory | launches |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| fused | 1 ms |  | 5 B | 3 |",
        "| dense, one | 2 ms | 0.50 | 7 kB | 9 |",
    ]


@pytest.mark.parametrize("width", [60, 100])
def test_the_text_holds_the_same_in_the_width_that_there_is(width: int) -> None:
    in_turn = {**IN_TURN, "group": "linear layers " * 6}
    [noted] = IN_TURN["extra_info"]["beside"].values()
    long = "dense, " + " ".join(["one"] * 30)
    in_turn["extra_info"] = {**IN_TURN["extra_info"], "beside": {long: noted}}
    shown = REPORT["text_tables"](report(*STEPS, in_turn), width)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.startswith(
        "step\n"
        "                time  fused ÷ this  minimum ÷ time\n"
        "dropout 0.0\n"
        "  fused       300 ms\n"
        "  dense       100 ms          3.00\n"
    )
    words = " ".join(shown.split())  # the long path is whole, on lines above its numbers
    assert f"{long} 2 ms 0.50 7 kB 9" in words


@pytest.mark.full
def test_the_benchmarks_end_in_the_tables(tmp_path: Path) -> None:
    """Piped, with the JSON that was asked for; comparisons stay as pytest-benchmark makes them."""
    results, bench = tmp_path / "results.json", SCRIPT.parent / "bench_masked_adamw.py"
    command = [sys.executable, "-m", "pytest", bench, "-k", "1458720 and not fused", "-q"]
    command += ["--benchmark-only", f"--benchmark-storage={tmp_path}"]
    # As from a shell: benchmarks are not timed by tests that run side by side.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options: dict[str, Any] = {"check": True, "capture_output": True, "encoding": "utf-8"}
    run = functools.partial(subprocess.run, env=alone, **options)
    shown = run([*command, f"--benchmark-json={results}", "--benchmark-save=one"]).stdout
    table = run([sys.executable, SCRIPT, results]).stdout.partition("\n\n")[0]
    assert table.startswith("masked AdamW: 1.46 M weights\n") and "dense" in table
    before, after = shown.split(table)
    assert "OPS" not in before and after.startswith("\n\n") and len(after.splitlines()) <= 6
    compared = run([*command, "--benchmark-compare"]).stdout
    assert "OPS" in compared and "0001_one" in compared


def test_benchmarks_that_begin_too_late_are_left_out() -> None:
    bench = SCRIPT.parent / "bench_masked_adamw.py"
    command = [sys.executable, "-m", "pytest", bench, "-k", "1458720 and dense", "-q"]
    run = subprocess.run([*command, "--most-seconds=0"], capture_output=True, encoding="utf-8")
    assert "1 skipped" in run.stdout and "--most-seconds have passed" in run.stdout


def test_groups_keep_their_order() -> None:
    text = REPORT["tables"](report(*STEPS, *LAYERS))
    assert re.findall("^### (.*)$", text, re.MULTILINE) == ["step", "layer, 1", "layer, 3"]


@pytest.mark.parametrize(
    ("benchmarks", "plotted"), [(LAYERS, LAYERS), (LAYERS[:3], []), (STEPS, [])]
)
def test_the_plot_takes_a_set_with_several_numbers_of_tasks(
    benchmarks: list[dict[str, Any]], plotted: list[dict[str, Any]]
) -> None:
    other = layer(1, "fused", 1.0, 1)
    other["params"]["d"] = 256
    assert REPORT["by_tasks"]([*STEPS, *benchmarks, other]) == plotted


def test_the_command_writes_the_tables_and_the_plot(tmp_path: Path) -> None:
    results, output = tmp_path / "results.json", tmp_path / "measured.md"
    results.write_text(json.dumps(report(*LAYERS)))
    command = [sys.executable, SCRIPT, results]
    printed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    assert printed == REPORT["text_tables"](report(*LAYERS))
    assert sorted(tmp_path.iterdir()) == [results]
    subprocess.run([*command, "--output", output], check=True)
    text, picture = output.read_text(), (tmp_path / "measured.svg").read_text()
    assert text.endswith(REPORT["tables"](report(*LAYERS)))
    assert text.startswith("![layer: forward, d = 128](measured.svg)\n")
    shown = re.findall("<!-- (.*?) -->", picture)  # every text of the plot
    assert {"layer: forward, d = 128", "fused", "reference", "dense", "(2 groups)"} <= set(shown)
