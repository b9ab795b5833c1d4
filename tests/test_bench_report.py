"""The tables and the plot that bench/report.py makes of benchmark results."""

from __future__ import annotations

import json
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
    step("dense (no masks)", 0.0, 0.1),
    step("dense (no masks)", 0.1, 0.2),
    step("reference", 0.0, 0.3),
    step("reference", 0.1, 0.4),
    result("step", "bench_sampling", 0.0021, None, share_of_floor=0.1234),
]


def report(*benchmarks: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmarks": list(benchmarks),
        "torch": {"version": "2.13.0", "threads": 1, "device": "A GPU", "triton": None},
        "machine_info": {"cpu": {"brand_raw": "A CPU"}, "machine": "x86", "python_version": "3.11"},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
    }


def test_a_group_is_a_table_of_medians_ratios_and_memory() -> None:
    assert REPORT["tables"](report(*LAYERS[:3])) == (
        "### layer, 1\n"
        "\n"
        "|  | median | ÷ reference | ÷ dense | peak memory |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| fused | 25 µs | 0.25 | 1.25 | 999 B |\n"
        "| reference | 100 µs | 1.00 | 5.00 | 4 MB |\n"
        "| dense | 20 µs | 0.20 | 1.00 | 1.5 kB |\n"
        "\n"
        "8.26 kB of masks; 1 group.\n"
        "\n"
        "A GPU (A CPU, 1 thread), PyTorch 2.13.0, Triton not installed, Python 3.11; "
        "commit 0123456789ab with changes, 2026-01-02.\n"
    )


def test_ratios_are_to_the_path_under_the_same_other_parameters() -> None:
    rows = REPORT["tables"](report(*STEPS)).splitlines()[2:9]
    assert rows == [
        "|  | median | ÷ reference | ÷ dense | share of the floor |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| dense (no masks), dropout 0.0 | 100 ms | 0.33 | 1.00 |  |",
        "| dense (no masks), dropout 0.1 | 200 ms | 0.50 | 1.00 |  |",
        "| reference, dropout 0.0 | 300 ms | 1.00 | 3.00 |  |",
        "| reference, dropout 0.1 | 400 ms | 1.00 | 2.00 |  |",
        "| sampling | 2.1 ms |  |  | 12.3% |",
    ]


def test_what_was_timed_beside_is_a_column() -> None:
    first = result("linear", "bench_linear[8]", 1e-3, {"rows": 8}, beside={"dense, one": 2e-3})
    second = result("linear", "bench_linear[9]", 3e-3, {"rows": 9}, beside={"another": 2e-3})
    assert REPORT["tables"](report(first, second)).splitlines()[2:6] == [
        "|  | median | ÷ dense, one | ÷ another |",
        "| --- | ---: | ---: | ---: |",
        "| linear, rows 8 | 1 ms | 0.50 |  |",
        "| linear, rows 9 | 3 ms |  | 1.50 |",
    ]


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
    assert printed.rstrip() == REPORT["tables"](report(*LAYERS)).rstrip()
    assert sorted(tmp_path.iterdir()) == [results]
    subprocess.run([*command, "--output", output], check=True)
    text, picture = output.read_text(), (tmp_path / "measured.svg").read_text()
    assert text.endswith(printed.rstrip() + "\n")
    assert text.startswith("![layer: forward, d = 128](measured.svg)\n")
    shown = re.findall("<!-- (.*?) -->", picture)  # every text of the plot
    assert {"layer: forward, d = 128", "fused", "reference", "dense", "(2 groups)"} <= set(shown)
