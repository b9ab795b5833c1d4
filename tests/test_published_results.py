"""Figures that README, docs and the package print are those of the files that they come from."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from harmodt.errors import UserError
from harmodt.reproduce import experiments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"

# Success in % as the paper prints it, typed a second time: near-optimal, sub-optimal, parameters.
TABLE_1 = """
MTBC: 60.39 0.86, 34.53 1.25, 1.74
MTIQL: 56.21 1.39, 43.28 0.90, 1.74
MTDIFF-P: 59.53 1.12, 48.67 1.32, 5.32
MTDIFF-P-ONEHOT: 61.32 0.89, 48.94 0.95, 5.32
MTDT, 0.87 M: 20.99 2.66, 20.63 2.21, 0.87
MTDT: 65.80 1.02, 42.33 1.89, 1.47
Prompt-DT, 0.87 M: 45.68 1.84, 39.76 2.79, 0.87
Prompt-DT: 69.33 0.89, 48.40 0.16, 1.47
HarmoDT-R: 75.39 1.18, 53.80 1.07, 1.47
HarmoDT-M: 80.33 0.97, 57.20 0.73, 1.47
HarmoDT-F: 82.20 0.40, 57.20 0.68, 1.47
"""
# MT5, MT30, MT50, each near-optimal and sub-optimal.
TABLE_2 = """
MTDIFF: 100.0 0.0, 66.30 2.31, 67.52 0.35, 54.21 1.10, 61.32 0.89, 48.94 0.95
MTDT: 100.0 0.0, 64.67 5.25, 71.89 0.95, 49.33 2.05, 65.80 1.02, 42.33 1.89
Prompt-DT: 100.0 0.0, 66.50 2.74, 74.10 0.69, 53.78 0.63, 69.33 0.89, 48.40 0.16
HarmoDT-R: 100.0 0.0, 66.14 3.00, 82.65 2.11, 61.22 2.16, 75.39 1.18, 53.80 1.07
HarmoDT-M: 100.0 0.0, 74.00 4.79, 84.67 0.84, 63.67 0.73, 80.33 0.97, 57.20 0.73
HarmoDT-F: 100.0 0.0, 77.67 3.25, 88.00 0.96, 65.00 0.92, 82.20 0.40, 57.20 0.68
"""
# 30 tasks, then 50, by size: 0.48, 0.87, 1.47 and 2.06 M parameters.
TABLE_3 = """
MTDT: 35.78 0.9, 64.01 1.4, 71.89 1.0, 74.33 0.7, 31.93 3.4, 58.13 3.6, 65.80 1.0, 68.33 1.1
Prompt-DT: 42.10 3.1, 69.56 1.0, 74.10 0.7, 77.67 1.7, 36.07 2.5, 61.93 0.4, 69.33 0.9, 71.00 0.9
HarmoDT-F: 59.33 1.5, 77.67 1.6, 88.00 1.0, 88.00 1.6, 58.20 1.9, 72.80 1.6, 82.20 0.4, 83.33 0.6
"""
# Return: Cheetah-dir, Cheetah-vel, Ant-dir, and their average.
TABLE_4 = """
MTDT: 662.40 1.3, -170.11 5.7, 165.29 0.4, 219.2
Prompt-DT: 935.3 2.6, -127.7 9.9, 278.7 38.7, 362.1
HarmoDT-F: 958.5 1.5, -66.51 1.2, 298.3 1.0, 396.8
"""
DATA = ("near-optimal", "sub-optimal")
COLUMNS = {
    "table1": [f"MT50 {data}" for data in DATA],
    "table2": [f"{tasks} {data}" for tasks in ("MT5", "MT30", "MT50") for data in DATA],
    "table3": [f"{t}, {s} M" for t in ("MT30", "MT50") for s in ("0.48", "0.87", "1.47", "2.06")],
    "table4": ["Cheetah-dir", "Cheetah-vel", "Ant-dir"],
}


def transcribed(name: str) -> Iterator[tuple[str, list[str]]]:
    """The cells of each row of a table of the paper."""
    table = {"table1": TABLE_1, "table2": TABLE_2, "table3": TABLE_3, "table4": TABLE_4}[name]
    for line in table.strip().splitlines():
        variant, _, cells = line.partition(": ")
        yield variant, [cell.replace(" ", " ± ") for cell in cells.split(", ")]


def papers() -> dict[str, dict]:
    text = (Path(experiments.__file__).parent / "paper.json").read_text(encoding="utf-8")
    return json.loads(text)["experiments"]


def test_the_papers_tables_are_as_they_were_typed_a_second_time() -> None:
    expected: dict[str, dict] = {}
    for name, columns in COLUMNS.items():
        rows = expected[name] = {}
        for variant, cells in transcribed(name):
            found = rows[variant] = {"results": dict(zip(columns, cells, strict=False))}
            (last,) = cells[len(columns) :] or [None]
            if name == "table1":
                found["parameters"] = float(last)
            if name == "table4":
                found["average"] = last
    with_figures = {n: table["variants"] for n, table in papers().items() if table["variants"]}
    assert with_figures == expected


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", RESULTS / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_stands_in_one_of_the_texts_as_it_is_rendered(render) -> None:
    texts = [text.read_text(encoding="utf-8") for text in render.TEXTS]
    for text in texts:
        assert render.with_tables(text) == text
    marked = [name for text in texts for name in re.findall("<!-- table: (.+) -->", text)]
    assert sorted(marked) == sorted(render.TABLES)


def test_tables_csv_and_svg_follow_from_the_json_files(render, tmp_path: Path) -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == {*render.EXPERIMENTS, "others"}
    for name in render.EXPERIMENTS:
        outcome = render.outcome(name)
        assert (RESULTS / f"{name}.csv").read_text(encoding="utf-8") == outcome.to_csv()
        render.write_figure(outcome, tmp_path / "figure.svg")
        assert (RESULTS / f"{name}.svg").read_bytes() == (tmp_path / "figure.svg").read_bytes()


def test_a_changed_figure_is_found_in_text_and_json(render, tmp_path, monkeypatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| 92.5 % |" in readme
    changed = readme.replace("| 92.5 % |", "| 99.5 % |")
    assert render.with_tables(changed) == readme
    content = (RESULTS / "fifty.json").read_text(encoding="utf-8")
    (tmp_path / "fifty.json").write_text(content.replace("0.9245", "0.9945"), encoding="utf-8")
    monkeypatch.setattr(render, "HERE", tmp_path)
    with pytest.raises(UserError, match=r"fifty\.json is damaged \(its checksum fails\)"):
        render.read("fifty")


def test_means_and_deviations_are_those_of_the_tasks_and_seeds(render) -> None:
    for name in render.EXPERIMENTS:
        references = {}
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            by_task = np.array([*row["by_task"].values()])  # [tasks, seeds]
            assert by_task.shape == (row["tasks"], len(row["seeds"]))
            assert row["mean"]["mean"] == pytest.approx(by_task.mean())
            deviation = np.sqrt(
                np.square(by_task.mean(0) - by_task.mean()).sum() / (len(row["seeds"]) - 1)
            )
            assert row["deviation"] == pytest.approx(deviation, abs=1e-9)
            references[row["column"], row["variant"]] = by_task
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row in content["rows"]:
            reference = references[row["column"], content["reference"]]
            ours = references[row["column"], row["variant"]]
            if row["difference"] is None:
                assert row["variant"] == content["reference"]
            else:
                assert row["difference"]["mean"] == pytest.approx(
                    (ours - reference).mean(), abs=1e-9
                )


# Decimals of the prose that no table of their section shows, typed a second time: differences
# between two rows neither of which is the reference, sizes, and what single runs came to.
IN_PROSE_ALONE = {
    "Do masks help, and does learning them?": {"0.48"},
    "Every kind of method on ten tasks": {
        *("0.47", "9.7", "0.7", "5.7", "14.0", "9.0", "7.2", "1.2", "2.7")
    },
    "What does a mask add beyond identifying the task?": {"4.2", "13.3", "11.2", "3.2"},
    "Does learning the masks help when more weights move?": {"0.05", "0.907"},
    "Does learning the masks help in longer runs?": {"14.7"},
    "Soft masks": {"5.7", "13.2"},
    "Unseen tasks (the paper's Table 4)": {"25.4"},
    # the paper's Table 3
    "As many steps as the paper's": {"0.48", "31.9", "36.1", "58.2"},
}


def test_decimals_of_the_prose_stand_in_the_tables_of_their_section() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    beyond = {}
    for section in re.split(r"^###? ", text, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        shown = "\n".join(line for line in lines if line.startswith("|"))
        prose = "\n".join(line for line in lines if not line.startswith("|"))
        tables, said = (set(re.findall(r"\d+\.\d+", part)) for part in (shown, prose))
        if said - tables:
            beyond[title] = said - tables
    assert beyond == IN_PROSE_ALONE


def test_readme_sums_up_what_the_methods_came_to(render) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = " ".join(readme.partition("## What masks do")[2].partition("\n## ")[0].split())

    def solved(column: str, variants: tuple[str, ...]) -> list[int]:
        rows = [render.row_of("methods", f"MT10 {column}", variant) for variant in variants]
        return sorted(round(100 * row.mean.mean) for row in rows)

    untold = ("HarmoDT-R, one mask for all", "Prompt-DT", "Prompt-DT + PCGrad", "MTDIFF-P, 1.15 M")
    told = ("MTDT", "MTBC", "MTIQL")
    (ours,) = solved("sub-optimal", ("HarmoDT-F",))
    (least, *_, most), (low, *_, high) = (solved("sub-optimal", v) for v in (untold, told))
    assert f"{ours} %" in section
    assert f"{least} to {most} %" in section and f"{low} to {high} %" in section
    rows = [render.row_of("methods", "MT10 near-optimal", v) for v in untold + told]
    ahead = sorted(round(-100 * row.difference.mean) for row in rows)
    assert f"{ahead[0]} to {ahead[-1]} points" in section
    reaching = sum(row.difference.low <= 0 <= row.difference.high for row in rows)
    assert (reaching, len(rows)) == (3, 7)
    assert "three of the seven 95 % intervals of this lead include zero" in section


def test_returns_on_unseen_tasks_are_those_of_the_csv_file_and_the_paper() -> None:
    with open(RESULTS / "unseen.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-")
    table = text.partition("| | mask | Cheetah-dir |")[2].partition("\n\n")[0].splitlines()[2:]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    algorithm, compared = "", 0
    paper = dict(transcribed("table4"))
    for name, mask, *cells in lines:
        algorithm = name or algorithm
        if algorithm.startswith("paper: "):
            assert cells == paper[algorithm.removeprefix("paper: ")][:3]
            continue
        if algorithm == "the expert, over all goals":
            continue
        for family, cell in zip(("cheetah-dir", "cheetah-vel", "ant-dir"), cells, strict=True):
            under = mask.removesuffix(" (ours)").replace("–", "none")
            asked = (family, algorithm.lower(), under)
            returns = [
                float(row["mean_return"])
                for row in rows
                if (row["family"], row["algorithm"], row["mask"]) == asked
            ]
            mean, low, high = map(float, re.findall(r"-?\d+\.\d", cell))
            assert mean == pytest.approx(np.mean(returns), abs=0.051) and low < mean < high
            compared += 1
    assert compared == 30
