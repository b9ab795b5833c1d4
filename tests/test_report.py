"""Pages of runs: what they say is what the runs' files say, in a browser too."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vl_convert
from browser import CHROMIUM, Page, browser
from runs import begin, final, small_flags
from safetensors.numpy import load_file
from scipy.stats import hypergeom
from tiny import TASKS, make_store

from harmodt import train
from harmodt.data.store import DataStore
from harmodt.environments import METAWORLD, family
from harmodt.errors import UserError
from harmodt.report import __main__ as command
from harmodt.report import tables, write_report
from harmodt.report.masks import Masks, count_shared
from harmodt.report.runs import read_runs
from harmodt.results import EvaluationResult
from harmodt.rollout import make_protocol
from harmodt.rundir import RunDirectory
from harmodt.training import trainer as training

TEST_FLAGS = ("--evaluate-every", "6", "--evaluation-episodes", "4", "--harmony-every", "4")


def play(policy, request, console):
    """In place of an evaluation in environments: chance by step and task."""
    protocol = make_protocol(policy, request)
    rng = np.random.default_rng(policy.step)
    solved = rng.random((len(protocol.tasks), protocol.episodes)) < 0.6
    returns = rng.normal(1000, 300, solved.shape)
    return EvaluationResult(protocol, solved, returns, 1.0, {})


def make_runs(
    folder: Path, store: DataStore, algorithms: tuple[str, ...], *more: str
) -> list[Path]:
    """Runs of a few steps, evaluated by chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "play", play)
        for algorithm in algorithms:
            begin(store, folder / algorithm, *TEST_FLAGS, *more, algorithm=algorithm)
    return [folder / algorithm for algorithm in algorithms]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store", TASKS)


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_runs(folder, store, ("harmodt-f", "harmodt-r", "prompt-dt"))


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, path)
    return path


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A run of its own, of HarmoDT-F."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


class Parsed(HTMLParser):
    """A page's tables by their names, as texts of cells, its words, and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self.references: list[str] = []
        self.content: dict[str, Any] = {}
        self._rows: list[list[str]] = []
        self._json = self._quiet = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.references += [found[name] or "" for name in ("src", "href") if name in found]
        if tag == "div" and found.get("class") == "scroll":
            self._rows = self.tables.setdefault(found["aria-label"] or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        self._json = found.get("id") == "content"
        self._quiet = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._quiet = self._json = False
        if tag == "table":
            self._rows = []

    def handle_data(self, data: str) -> None:
        if self._json:
            self.content = json.loads(data)
        elif not self._quiet:
            self.words += data
            if self._rows and self._rows[-1]:
                self._rows[-1][-1] += data

    def plot(self, name: str, choice: str = "") -> list[dict[str, Any]]:
        """The rows of a plot as objects, runs and lists by name."""
        (plot,) = (plot for plot in self.content["plots"] if plot["name"] == name)
        found = plot["variants"][choice]
        lists = {**found["lists"], "run": self.content["names"]}
        return [
            {
                c: lists[c][v] if c in lists else v
                for c, v in zip(found["columns"], row, strict=True)
            }
            for row in found["rows"]
        ]


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(run: Path) -> dict[str, Any]:
    """The last evaluation's file."""
    files = (json.loads(path.read_text()) for path in (run / "evaluation").glob("*.json"))
    return max(files, key=lambda found: found["protocol"]["checkpoint"])


LIBRARY = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


# What the page says


def test_curves_are_the_metrics_and_costs(runs, page):
    parsed = Parsed(page)
    for run in runs:
        metrics, costs = records(run / "metrics.jsonl"), records(run / "costs.jsonl")
        for plot, key in (("loss", "loss"), ("harmony", "harmony"), ("success", "success")):
            expected = [(r["step"], r[key]) for r in metrics if key in r]
            shown = [r for r in parsed.plot(plot, "steps") if r["run"] == run.name]
            assert [(r["x"], r["value"]) for r in shown] == [
                (step, pytest.approx(value, rel=1e-5)) for step, value in expected
            ], (run.name, plot)
            assert expected
        minutes = [r["x"] for r in parsed.plot("loss", "time") if r["run"] == run.name]
        steps = [r["step"] for r in metrics if "loss" in r]
        after = [next(c["seconds"] for c in costs if c["step"] >= step) for step in steps]
        assert minutes == pytest.approx([seconds / 60 for seconds in after], rel=1e-4)


def test_results_are_those_of_the_last_evaluation(runs, page):
    heading, *rows = Parsed(page).tables["Success on 3 tasks"]
    assert len(rows) == 4
    for column, run in enumerate(runs, 1):
        found = latest(run)
        assert heading[column] == f"{run.name}step 12, 4 episodes"
        for row, task in zip(rows, (*found["tasks"], found["average"]), strict=True):
            assert row[0] == task["task"]
            rate, low, high = (task[f"success_{name}"] for name in ("rate", "low", "high"))
            assert row[column] == f"{rate:.2f}{low:.2f} – {high:.2f}"


def test_evaluations_whose_plans_were_drawn_otherwise_stand_side_by_side():
    from test_results import PLANS, make_result

    ways = [PLANS, PLANS | {"sampling_steps": 2}]
    run = SimpleNamespace(
        name="run",
        evaluations=[make_result(plans=plans) for plans in ways],
        measure=None,
        measure_of=lambda result: result.protocol.measure({}),
    )
    (columns,) = tables.evaluations([run])
    assert [column.result.protocol.plans for column in columns] == ways
    _, html = tables.success(columns)
    assert "4 episodes, ddim of 10 steps<" in html and "4 episodes, ddim of 2 steps<" in html
    assert tables.protocol_notes(columns) == []


SHORT = replace(family(METAWORLD).spec, episode_length=7)
UNKNOWN = replace(family(METAWORLD).spec, episode_length=30, reward_version=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"success_rule": "last"}, "success_rule last instead of any"),
        ({"goal_seed": 5}, "goal_seed 5 instead of 240518080"),
        ({"seed": 5}, "seed 5 instead of 0"),
        ({"target_returns": (7.0,) * 3}, "target_returns 7 instead of the run's own"),
        ({"episodes": 5}, "episodes 5 instead of 4"),
        ({"environment": SHORT}, "episode_length 7 instead of 30"),
        ({"environment": UNKNOWN}, "reward_version unknown instead of v2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_measured_in_another_way_replaces_nothing(runs, run, tmp_path, change, said):
    """An evaluation of the last step, in which nothing is solved, beside those of three runs."""
    three = [run, *runs[1:]]
    before, page = tmp_path / "before.html", tmp_path / "page.html"
    write_report(three, before)
    (path,) = (run / "evaluation").glob("step-12-*.json")
    usual = EvaluationResult.load(path)
    protocol = replace(usual.protocol, **change)
    shape = (3, protocol.episodes)
    EvaluationResult(protocol, np.zeros(shape, bool), np.zeros(shape), 1.0, {}).save(path.parent)
    write_report(three, page)
    old, new = Parsed(before), Parsed(page)
    (name,) = (name for name in old.tables if name.startswith("Overview"))
    assert new.tables[name] == old.tables[name]
    assert new.plot("success", "steps") == old.plot("success", "steps")
    assert "Left out here" not in old.words
    how = f"in another way: results with {said} (run at step 12)."
    assert f"Left out here, because they were measured {how}" in new.words
    assert new.words.count("Measured: ") == 2 and old.words.count("Measured: ") == 1
    rows = new.tables["Success on 3 tasks"]
    assert rows[:5] == old.tables["Success on 3 tasks"]
    assert [row[1][:4] for row in rows[6:]] == 4 * ["0.00"] and len(rows) == 10


def test_the_measure_that_most_runs_have_is_compared(runs, tmp_path):
    copies = [Path(shutil.copytree(path, tmp_path / path.name)) for path in runs]
    for number, path in enumerate(copies[:2]):
        (file,) = (path / "evaluation").glob("step-12-*.json")
        usual = EvaluationResult.load(file)
        protocol = replace(usual.protocol, success_rule="last")
        replace(usual, protocol=protocol, successes=np.full((3, 4), bool(number))).save(file.parent)
    for path in copies[1:]:
        for file in (path / "evaluation").glob("step-*-any-*"):
            file.unlink()
    write_report(copies, tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    heading, *rows = parsed.tables["Overview of the runs"]
    shown = {row[0]: row[heading.index("success")][:4] for row in rows}
    assert shown == {"harmodt-f": "0.00", "harmodt-r": "1.00", "prompt-dt": "–"}
    assert "Without an evaluation that can be compared here: prompt-dt." in parsed.words
    assert "success_rule any instead of last (harmodt-f at step 6, harmodt-f at step 12)" in (
        parsed.words
    )
    assert {(r["run"], r["x"], r["value"]) for r in parsed.plot("success", "steps")} == {
        ("harmodt-f", 12, 0), ("harmodt-r", 12, 1),
    }  # fmt: skip
    assert "Evaluations during training were measured in another way and are left out" in (
        parsed.words
    )


def test_the_overview_has_what_each_run_is_and_took(runs, page):
    heading, *rows = Parsed(page).tables["Overview of the runs"]
    for row, run in zip(rows, runs, strict=True):
        cells = dict(zip(heading, row, strict=True))
        description, costs = (
            json.loads((run / "run.json").read_text()),
            records(run / "costs.jsonl"),
        )
        assert cells["run"] == cells["algorithm"] == run.name
        assert cells["parameters"] == f"{description['parameters']:,}"
        assert cells["success"].startswith(f"{latest(run)['average']['success_rate']:.2f}")
        losses = [r["loss"] for r in records(run / "metrics.jsonl") if "loss" in r]
        assert float(cells["loss"]) == pytest.approx(losses[-1], rel=0.01)
        held = costs[-1]["peak_memory"]  # by the tests before this one as well
        shown = f"{held / 1e6:.1f} MB" if held < 999.95e6 else f"{held / 1e9:.1f} GB"
        assert cells["memory"] == shown


def test_all_settings_are_there_and_differences_are_marked(runs, page):
    parsed = Parsed(page)
    rows = {row[0]: row[1:] for row in parsed.tables["Settings of the runs"]}
    configs = [json.loads((run / "run.json").read_text())["config"] for run in runs]
    assert rows["learning_rate"] == [str(c["optimisation"]["learning_rate"]) for c in configs]
    assert rows["algorithm≠"] == [run.name for run in runs]
    assert rows["sparsity≠"] == ["0.2", "0.2", "–"]
    assert rows["mask_update_every≠"] == ["4", "–", "–"]
    names = {name.rstrip("≠") for name in rows}
    for config in configs:
        groups = [config["own"], config["own"]["model"], config["run"], config["optimisation"]]
        assert {n for g in groups for n, v in g.items() if not isinstance(v, dict)} <= names
    assert f"only the {sum('≠' in name for name in rows)} that differ" in parsed.words


def unpacked(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").astype(np.float64)


def test_masks_are_those_of_the_last_checkpoint(runs, page):
    masks = unpacked(final(runs[0])["masks"].numpy())
    parsed, tasks = Parsed(page), json.loads((runs[0] / "run.json").read_text())["tasks"]
    shown = {(r["x"], r["y"]): r["overlap"] for r in parsed.plot("overlap", "0")}
    assert len(shown) == 3  # each stands for two places
    for (x, y), value in shown.items():
        a, b = masks[tasks.index(x)], masks[tasks.index(y)]
        assert value == pytest.approx(np.minimum(a, b).sum() / np.maximum(a, b).sum(), rel=1e-6)
    sizes = {"attention_norm": 64, "qkv": 3 * 32 * 33, "attention_out": 32 * 33, "mlp_norm": 64}
    sizes |= {"mlp_up": 128 * 33, "mlp_down": 32 * 129}
    layers = {f"blocks.0.{name}": size for name, size in sizes.items()} | {"final_norm": 64}
    dense = {(r["layer"], r["task"]): r["density"] for r in parsed.plot("density", "0")}
    assert len(dense) == 3 * len(layers)
    for i, task in enumerate(tasks):
        active = sum(dense[(layer, task)] * size for layer, size in layers.items())
        assert active == pytest.approx(masks[i].sum(), rel=1e-4)


def test_a_plane_shows_the_masks_first_two_principal_components(runs, page):
    masks = unpacked(final(runs[0])["masks"].numpy())
    centred = masks - masks.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.array([[r["x"], r["y"]] for r in Parsed(page).plot("places", "0")])
    np.testing.assert_allclose(np.abs(points), np.abs(left * values)[:, :2], rtol=1e-4)
    share = (values[:2] ** 2).sum() / (values**2).sum()
    assert f"The plane shows {100 * share:.0f} % of the masks' variance" in Parsed(page).words


def test_masks_drawn_at_random_do_not_overlap_beyond_chance():
    """Standard deviations of what chance gives, against draws; a mask and its copy are far off."""
    rng = np.random.default_rng(0)
    sizes, counts = np.array([400, 60, 7]), np.array([300, 20, 7])
    drawn = []
    for _ in range(40):
        parts = [rng.permutation(n) < k for n, k in zip(sizes, counts, strict=True)]
        drawn.append(np.concatenate(parts))
    drawn[1] = drawn[0]
    flat = np.pad(np.array(drawn), ((0, 0), (0, -sizes.sum() % 32)))
    bits = np.packbits(flat, axis=1, bitorder="little").view(np.uint32)
    shared = count_shared(bits)
    np.testing.assert_array_equal(shared, flat.astype(int) @ flat.T.astype(int))
    names = tuple(map(str, range(40)))
    masks = Masks(
        names, ("a.weight", "b.weight", "c.bias"), sizes, np.tile(counts, (40, 1)), shared
    )
    beyond = masks.beyond_chance
    assert beyond[0, 1] > 8
    chance = [hypergeom(n, k, k) for n, k in zip(sizes[:2], counts[:2], strict=True)]
    excess = shared[2, 3] - sizes[2] - sum(part.mean() for part in chance)
    assert beyond[2, 3] == pytest.approx(excess / np.sqrt(sum(part.var() for part in chance)))
    assert excess
    by_chance = beyond[2:, 2:][np.triu_indices(38, 1)]
    assert abs(by_chance.mean()) < 0.15 and abs(by_chance.std() - 1) < 0.15
    order = masks.order()
    assert abs(order.index(0) - order.index(1)) == 1


def test_masks_that_cannot_differ_are_no_chance():
    full = np.full((2, 1), 32)
    masks = Masks(("a", "b"), ("w",), np.array([32]), full, np.full((2, 2), 32))
    assert not masks.beyond_chance.any() and masks.places()[1] == 0
    assert masks.order() == [0, 1]


def test_what_mask_updates_log_is_what_they_did(store, tmp_path):
    """By layer, from the masks of a checkpoint of every step."""
    more = ("--checkpoint-every", "1", "--keep-checkpoints", "20", "--log-every", "1")
    begin(store, tmp_path / "run", *more)
    lines = [r for r in records(tmp_path / "run" / "metrics.jsonl") if "harmony" in r]
    masks = {}
    for step in (1, 4, 5, 8, 9):
        name = RunDirectory(tmp_path / "run").checkpoint(step) / "state.safetensors"
        masks[step] = unpacked(load_file(name)["masks"])
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert not lines[0]["moved_weights"]  # so the first checkpoint has the masks of the start
    # The blocks' rows are of 32 weights or a multiple: where layers begin, from their sizes.
    ends = np.cumsum([64, 96 * 32 + 96, 32 * 32 + 32, 64, 128 * 32 + 128, 32 * 128 + 32, 64])
    layers = ["attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_up", "mlp_down"]
    names = [*(f"blocks.0.{layer}" for layer in layers), "final_norm"]
    for line in lines[1:]:
        step = int(line["step"])
        for kind, before in (("changed", step), ("differing", 1)):
            flipped = np.abs(masks[step + 1] - masks[before]).sum(0)
            assert len(flipped) == ends[-1]
            expected = [part.sum() for part in np.split(flipped, ends[:-1])]
            assert [line[f"{kind}/{name}"] for name in names] == expected
    assert sum(lines[1][f"changed/{name}"] for name in names) > 0


def test_how_many_ever_moved_lies_between_what_differs_and_all_changes(runs, page):
    lines = [r for r in records(runs[0] / "metrics.jsonl") if "moved_weights" in r]
    parsed = Parsed(page)
    shown = {r["layer"]: (r["low"], r["high"]) for r in parsed.plot("layers")}
    bits = 3 * (3 * 32 * 33)
    changed = sum(line["changed/blocks.0.qkv"] for line in lines)
    low, high = lines[-1]["differing/blocks.0.qkv"] / bits, changed / bits
    assert shown["blocks.0.qkv"] == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))
    assert 0 < low <= high
    _, row = parsed.tables["Weights that mask updates moved"]
    assert row[:3] == ["harmodt-f", "3", f"{sum(line['moved_weights'] for line in lines):.0f}"]


def test_the_sparsity_of_soft_masks_is_shown_where_it_changes(store, runs, page, tmp_path):
    (soft,) = make_runs(tmp_path, store, ("soco-dt",))
    write_report([runs[0], soft], tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    lines = [r for r in records(soft / "metrics.jsonl") if "moved_weights" in r]
    means = [np.mean([line[f"sparsity/{task}"] for task in TASKS]) for line in lines]
    shown = [row["value"] for row in parsed.plot("sparsity", "steps")]
    assert shown == pytest.approx(means, rel=1e-4)
    assert len(set(means)) > 1
    _, row = parsed.tables["Weights that mask updates moved"][1:]
    assert row[:2] == ["soco-dt", "3"]
    assert row[-2:] == ["–", "–"]  # as many weights enter a mask as leave it in the other run alone
    assert "plot-sparsity" not in page.read_text()


def test_the_same_runs_make_the_same_page(runs, page, tmp_path):
    again = tmp_path / "again.html"
    write_report(runs, again)
    assert again.read_bytes() == page.read_bytes()
    again.write_bytes(page.read_bytes()[:2000])
    write_report(runs[:1], again)  # a page of runs may be written over
    assert Parsed(again).content["names"] == ["harmodt-f"]
    assert list(tmp_path.iterdir()) == [again]


def test_a_page_needs_nothing_else_and_is_small(page):
    parsed = Parsed(page)
    assert parsed.references and all(address.startswith("#") for address in parsed.references)
    assert page.stat().st_size < 2_000_000
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text.partition("<script")[0])


def test_names_cannot_break_out(run, store, tmp_path):
    """Of a run and of a place, in HTML, in an attribute and in JSON."""
    odd = "<img src=x onerror=alert(1)>\"'&amp; \u202e\x1b[31m"
    moved = run.rename(tmp_path / odd)
    directory = RunDirectory(moved)
    config = directory.read().config
    config["data"]["data"] = "/tmp/</script><script>alert(1)</script><!--"
    directory.update({"config": config})
    write_report([moved, Path(shutil.copytree(moved, tmp_path / "other"))], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text().replace(LIBRARY, "")
    assert "<img" not in text and text.count("<script") == 3 == text.count("</script>")
    assert "\u202e" not in text and "\x1b" not in text
    parsed = Parsed(tmp_path / "p.html")
    shown = odd.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b")
    assert parsed.content["names"] == [shown, "other"]
    assert parsed.tables["Overview of the runs"][1][0] == shown
    data = next(r for r in parsed.tables["Settings of the runs"] if r[0] == "data")
    assert data[1] == config["data"]["data"]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(run, tmp_path / folder / "run")
    write_report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "p.html")
    assert Parsed(tmp_path / "p.html").content["names"] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="is named more than once"):
        write_report([run, run.parent / "." / run.name], tmp_path / "p.html")


# What is missing


def test_what_a_run_lacks_is_said(run, tmp_path, monkeypatch):
    """As of an earlier version, whose metrics have no layers, and before any evaluation."""
    (run / "costs.jsonl").unlink()
    shutil.rmtree(run / "evaluation")
    write_report([run], tmp_path / "p.html")
    parsed = Parsed(tmp_path / "p.html")
    assert "Time and memory were not recorded: run." in parsed.words
    assert "Not evaluated yet: run." in parsed.words
    names = {plot["name"] for plot in parsed.content["plots"]}
    assert "loss" in names and not names & {"speed", "parts"}
    (plot,) = (plot for plot in parsed.content["plots"] if plot["name"] == "loss")
    assert plot["variants"]["time"]["rows"] == []


def test_a_run_that_has_just_begun_is_shown(run, tmp_path):
    for name in ("costs.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    for name in ("evaluation", "checkpoints"):
        shutil.rmtree(run / name)
    write_report([run], tmp_path / "p.html")
    parsed = Parsed(tmp_path / "p.html")
    assert parsed.content["plots"] == []
    assert "Without metrics of training: run." in parsed.words
    assert "None of these runs has masks, or a checkpoint with them." in parsed.words
    assert "Settings of the runs" in parsed.tables


def test_without_its_packages_a_report_says_what_to_install(runs, tmp_path, monkeypatch):
    for package in ("vl_convert", "scipy.cluster.hierarchy"):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=r"pip install 'harmodt\[report\]'"):
                write_report(runs, tmp_path / "p.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "costs.jsonl", "conditioning.safetensors", "evaluation/*",
             "checkpoints/00000012/state.safetensors"]
)  # fmt: skip
def test_a_damaged_file_is_named(run, tmp_path, name):
    path = next(p for p in sorted(run.glob(name)) if p.suffix != ".csv")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        write_report([run], tmp_path / "p.html")
    assert path.name in str(error.value) or path.parent.name in str(error.value)
    assert not (tmp_path / "p.html").exists()


def test_what_is_no_page_is_not_written_over(runs, tmp_path):
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<!doctype html>\nyears of work")
    for place in (thesis, tmp_path):
        with pytest.raises(UserError, match="name another --output"):
            write_report(runs, place)
    assert thesis.read_text() == "<!doctype html>\nyears of work"


@pytest.mark.parametrize("episodes", [2, 8])
def test_of_the_measures_of_one_run_that_of_most_episodes_is_compared(runs, tmp_path, episodes):
    path = Path(shutil.copytree(runs[0], tmp_path / "run"))
    (file,) = (path / "evaluation").glob("step-12-*.json")
    usual = EvaluationResult.load(file)
    tasks = len(usual.protocol.tasks)
    replace(
        usual,
        protocol=replace(usual.protocol, episodes=episodes),
        successes=np.full((tasks, episodes), True),
        returns=np.full((tasks, episodes), 5.0),
    ).save(file.parent)
    (run,) = read_runs([path])
    expected = max(episodes, usual.protocol.episodes)
    assert tables.final_evaluation(run).protocol.episodes == expected


# The command


def test_the_line_that_training_ends_with_works_as_printed(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(store.path), "--output", "a run's", *small_flags()]
    train.main(arguments)
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.partition(": ")[2])
    assert words[:3] == ["python", "-m", "harmodt.report"]
    monkeypatch.setattr(sys, "argv", words[2:])
    command.main()
    assert re.fullmatch(r"written to report\.html, .* [kM]B\n", capsys.readouterr().out)
    assert Parsed(tmp_path / "report.html").content["names"] == ["a run's"]


def test_no_run_is_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harmodt.report"])
    with pytest.raises(UserError, match="no run is named: give the directories of one"):
        command.main()


# In a browser

DRAWN = "document.documentElement?.dataset.drawn"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def opened(chromium, page) -> Page:
    """The page of three runs in a wide, light window."""
    chromium.view(1280)
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.open(page, "false || location.protocol == 'file:' && " + DRAWN)
    return chromium


def plots_without_marks(page: Page) -> list[str]:
    marks = ".mark-rect path, .mark-line path, .mark-symbol path"
    return page.run(
        "[...document.querySelectorAll('.plot')]"
        f".filter(plot => !plot.querySelector('svg :is({marks})')).map(plot => plot.id)"
    )


@needs_browser
def test_every_plot_is_drawn_without_a_request_or_a_complaint(opened, page):
    names = {plot["name"] for plot in Parsed(page).content["plots"]}
    expected = {"loss", "success", "harmony", "overlap", "places", "density", "moved", "layers"}
    assert names == expected | {"speed", "parts"}
    assert opened.run(f"Number({DRAWN})") == len(names)
    assert plots_without_marks(opened) == []
    assert opened.run("document.querySelectorAll('#plot-overlap .role-mark path').length") == 6
    assert opened.requests == [page.as_uri()]
    assert opened.complaints == []


@needs_browser
def test_a_mark_under_the_mouse_is_explained(opened, runs):
    opened.run("document.querySelector('#plot-success').scrollIntoView({block: 'center'})")
    mark = "document.querySelector('#plot-success .mark-symbol path').getBoundingClientRect()"
    x, y, width, height = (opened.run(f"{mark}.{n}") for n in ("x", "y", "width", "height"))
    opened.point(x + width / 2 - 30, y + 40)
    opened.point(x + width / 2, y + height / 2)
    opened.wait("document.querySelector('#vg-tooltip-element.visible')")
    said = opened.run("document.querySelector('#vg-tooltip-element').textContent")
    assert any(run.name in said for run in runs) and "success" in said


def order_of(page: Page, column: int) -> list[str]:
    return page.run(
        "[...document.querySelectorAll('#tasks tbody tr')]"
        f".map(row => row.cells[{column}].dataset.value ?? row.cells[{column}].textContent)"
    )


@needs_browser
def test_tables_are_sorted_with_the_keyboard_alone(opened):
    before = order_of(opened, 0)
    opened.run("document.querySelectorAll('#tasks thead button')[1].focus()")
    opened.press("Enter")
    falling = list(map(float, order_of(opened, 1)))
    assert falling == sorted(falling, reverse=True)
    opened.press("Enter")
    rising = list(map(float, order_of(opened, 1)))
    assert rising == falling[::-1]
    heading = "document.querySelectorAll('#tasks thead th')[1].getAttribute('aria-sort')"
    assert opened.run(heading) == "ascending"
    opened.press("Tab")
    assert opened.run("document.activeElement.closest('th').cellIndex") == 2
    assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.run("document.querySelector('#tasks thead button').click()")
    assert order_of(opened, 0) == sorted(before)
    last = opened.run("document.querySelector('#tasks tfoot').textContent")
    assert last.startswith("average")


@needs_browser
def test_choices_change_what_is_shown(opened):
    axis = "document.querySelector('#plot-loss .role-axis-title text').textContent"
    assert opened.run(axis) == "step"
    choose = "(s => {{ s.value = {!r}; s.dispatchEvent(new Event('change')) }})({})"
    opened.run(choose.format("time", "document.querySelector('select[data-choice=axis]')"))
    opened.wait(f"{axis.replace(').t', ')?.t')} == 'minutes of training'")
    opened.run(choose.format("1", "document.querySelector('select[data-choice=run]')"))
    opened.wait("document.querySelector('p[data-run=\"0\"]').hidden")
    lines = "document.querySelectorAll('#plot-loss .mark-line path').length"
    opened.wait(f"{lines} == 3")
    opened.run("document.querySelector('#key button').click()")
    opened.wait(f"{lines} == 2")
    assert plots_without_marks(opened) == ["plot-moved", "plot-layers"]  # of that run alone
    rows = "[...document.querySelectorAll('#all-settings tbody tr')].filter(r => r.offsetParent)"
    shown = opened.run(f"{rows}.length")
    opened.run("document.querySelector('#differences').click()")
    assert 0 < opened.run(f"{rows}.length") < shown
    assert opened.complaints == []


OVERFLOWING = """[...document.querySelectorAll('main *, header *, #key')]
  .filter(e => !e.closest('.scroll table, .plot svg') && e.getBoundingClientRect().right > 360.5)
  .map(e => e.outerHTML.slice(0, 100))"""


@needs_browser
def test_nothing_overflows_a_narrow_window(opened):
    opened.view(360, 740)
    assert opened.run("document.documentElement.scrollWidth") == 360
    assert opened.run(OVERFLOWING) == []
    wide = "[...document.querySelectorAll('.plot svg')].filter(s => s.clientWidth > 340).length"
    assert opened.run(wide) == 0


@needs_browser
def test_a_dark_screen_and_a_printer_are_followed(opened):
    light = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#plot-loss .role-axis-title text')).fill"
    before = opened.run(light), opened.run(ink)
    opened.view(1280, dark=True)
    after = opened.run(light), opened.run(ink)

    def brightness(colour: str) -> int:
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness(before[0]) > 600 > 200 > brightness(after[0])
    assert brightness(before[1]) < 200 < 600 < brightness(after[1])
    opened.view(794, dark=True, media="print")
    assert brightness(opened.run(ink)) < 200
    assert opened.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert opened.run("document.documentElement.scrollWidth") == 794


@needs_browser
def test_fifty_tasks_stay_readable_and_open_soon(chromium, tmp_path):
    names = family(METAWORLD).resolve_tasks(["mt50"])
    store = make_store(tmp_path / "store", names, lengths=(12,), prompt_lengths=(8,))
    flags = ("--steps", "3", "--tasks-per-step", "5", "--layers", "6", "--checkpoint-every", "3")
    paths = make_runs(tmp_path, store, ("harmodt-f",), *flags)
    write_report(paths, tmp_path / "p.html")
    assert (tmp_path / "p.html").stat().st_size < 3_000_000
    chromium.call("Performance.enable")
    chromium.view(1280)
    chromium.complaints.clear()
    chromium.open(tmp_path / "p.html", "location.pathname.endsWith('/p.html') && " + DRAWN)
    found = {m["name"]: m["value"] for m in chromium.call("Performance.getMetrics")["metrics"]}
    assert found["ThreadTime"] < 2  # seconds of computing, however busy the machine is
    assert plots_without_marks(chromium) == [] == chromium.complaints
    labels = chromium.run(
        "[...document.querySelectorAll('#plot-overlap .role-axis-label text')]"
        ".map(t => [t.textContent, t.getBoundingClientRect().top])"
    )
    assert {text for text, _ in labels} == set(names)
    tops = sorted(top for _, top in labels)
    assert min(np.diff(tops)) > 9
    chromium.view(360, 740)
    assert chromium.run(OVERFLOWING) == []
