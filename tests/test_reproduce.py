"""Experiments: what they come to, how they are run, and the tables that they end in."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_experiment
import torch
from rich.console import Console

from harmodt import train
from harmodt.algorithms import ALGORITHMS
from harmodt.checkpoint import checkpoint_steps
from harmodt.cores import share
from harmodt.devices import Execution
from harmodt.environments import FAMILIES, family
from harmodt.errors import UserError
from harmodt.files import json_checksum, owned
from harmodt.progress import PlainConsole
from harmodt.reproduce import __main__ as command
from harmodt.reproduce import experiments, jobs
from harmodt.reproduce.estimate import seconds_per_step
from harmodt.reproduce.execute import Work, find_slots
from harmodt.reproduce.experiments import BUDGETS, EXPERIMENTS, Variant
from harmodt.reproduce.figure import describe
from harmodt.reproduce.jobs import Collect, Evaluate, Folder, Train, find_result, jobs_of
from harmodt.reproduce.plan import make_plan
from harmodt.reproduce.tables import Outcome, _training, tabulate
from harmodt.rollout import Request
from harmodt.rundir import RunDirectory
from harmodt.settings import change, settings
from harmodt.training.records import Records
from harmodt.training.stop import Stop

NAMES = tuple(EXPERIMENTS)
DEADLINE = 120  # seconds in which whatever a test waits for has happened, on a busy machine


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy experiment, here and in all commands that a test starts."""
    monkeypatch.setitem(FAMILIES, "toy", "toy_family:Toy")
    monkeypatch.setitem(EXPERIMENTS, "toy", tiny_experiment.TOY)
    monkeypatch.setitem(BUDGETS, "toy", tiny_experiment.BUDGET)
    monkeypatch.setenv("PYTHONPATH", tiny_experiment.children()["PYTHONPATH"])


# Definitions and plans


@pytest.mark.parametrize("budget", ["smoke", "small", "cores", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_every_definition_is_of_algorithms_and_settings_there_are(name, budget):
    found = make_plan(name, budget)
    experiment, seeds = EXPERIMENTS[name], BUDGETS[budget].seeds
    assert len(found.cells) == len(experiment.columns) * len(experiment.variants)
    assert all(len(cell.runs) == len(seeds) for cell in found.cells)
    assert all(run.config.data.tasks_per_step <= len(run.tasks) for run in found.runs)
    assert {v.algorithm for v in experiment.variants} <= ALGORITHMS.keys()
    assert experiment.reference in {variant.name for variant in experiment.variants}
    for names in ([v.name for v in experiment.variants], [c.name for c in experiment.columns]):
        assert len({*names}) == len(names)
    for cell in found.cells:
        values = dict(settings(cell.runs[0].config))
        unread = cell.column.settings.keys() - values.keys()
        sizeless = cell.variant.algorithm in ("mtbc", "mtiql", "mtdiff-p")
        assert unread <= ({"size"} if sizeless else set())
        assert values.get("surgery", "none") == "none" or values["tasks_per_step"] > 1


@pytest.mark.parametrize(
    ("variant", "error", "says"),
    [
        (Variant("x", "harmodt-g"), UserError, "did you mean harmodt"),
        (Variant("x", "mtdt", {"eta_max": 3}), ValueError, "x: mtdt has no eta_max"),
        (Variant("x", "mtdt", {"size": "1.5M"}), UserError, "Invalid enum value '1.5M'"),
        (Variant("x", "harmodt-r", {"sparsity": 1.5}), UserError, "<.* 1"),
    ],
)
def test_a_definition_of_what_there_is_not_is_refused(monkeypatch, variant, error, says):
    toy = replace(tiny_experiment.TOY, variants=(variant,))
    monkeypatch.setitem(EXPERIMENTS, "toy", toy)
    with pytest.raises(error, match=says):
        make_plan("toy", "toy")


def test_expansion_into_runs_and_data():
    found = make_plan("table2", "paper")
    # Three sets of tasks, two compositions, three seeds, six variants.
    assert len(found.runs) == 3 * 2 * 3 * 6
    assert [c.name for c in found.collections] == [
        "metaworld-near-optimal", "metaworld-sub-optimal"
    ]  # fmt: skip
    assert [c.wanted["episodes"] for c in found.collections] == [2000, 1000]
    assert all(len(c.tasks) == 50 for c in found.collections)
    seeds = [run.config.run.seed for run in found.runs]
    assert seeds == sorted(seeds)  # all of the first seed before any of the second
    assert {len(run.tasks) for run in found.runs} == {5, 30, 50}
    assert {run.steps for run in found.runs} == {1_000_000}
    assert make_plan("table2", "paper", seeds=[7, 7]).seeds == (7,)


def test_a_columns_settings_are_of_the_algorithms_that_have_them():
    runs = {cell.variant.name: cell.runs[0] for cell in make_plan("methods", "small").cells}
    sizes = {name: dict(settings(run.config)).get("size") for name, run in runs.items()}
    assert {sizes.pop(name) for name in ("MTBC", "MTIQL", "MTDIFF-P, 1.15 M")} == {None}
    assert {*sizes.values()} == {"0.48M"}


def test_a_note_says_which_methods_read_what_in_a_step():
    mlps = "MTBC, MTIQL: 800 steps of 8 tasks × 160 single steps"
    diffusion = "MTDIFF-P, 1.15 M: 2,000 steps of 8 tasks × 16 windows"
    said = f"800 steps of 8 tasks × 8 windows ({mlps}; {diffusion})"
    assert _training(make_plan("methods", "small")) == said
    assert _training(make_plan("table3", "paper")) == "1,000,000 steps of 1 task × 8 windows"


def test_more_episodes_at_the_end_than_on_the_way_are_a_job_of_their_own(tmp_path):
    jobs = jobs_of(make_plan("length", "cores", [0]), Folder(tmp_path))[2:4]
    name = "mt50-sub-optimal-harmodt-f-size-0.48M-seed-0"
    assert [job.name for job in jobs] == [name, f"{name}-final"]
    assert jobs[1].needs == (name,)
    run = str(tmp_path / "runs" / name)
    assert jobs[1].words() == ["harmodt.evaluate", run, "--episodes", "20"]
    assert [line for line in jobs[0].words() if line == "5"]  # episodes on the way
    assert len(jobs_of(make_plan("fifty", "small", [0]), Folder(tmp_path))) == 2 + 8  # no such job


def test_data_are_taken_in_another_order_of_tasks(reproduced):
    (found,) = make_plan("toy", "toy").collections
    for tasks, done in ((["slow", "quick"], True), (["quick", "slow"], True), (["quick"], False)):
        collect = Collect(
            Folder(reproduced), replace(found, wanted={**found.wanted, "tasks": tasks})
        )
        if done:
            assert collect.is_done()
        else:
            with pytest.raises(UserError, match="has tasks ="):
                collect.is_done()


def test_the_budgets_settings_are_scaled_to_the_tasks():
    by_tasks = {len(run.tasks): run for run in make_plan("table2", "small").runs}
    steps = {tasks: run.steps for tasks, run in by_tasks.items()}
    at_once = {tasks: run.config.data.tasks_per_step for tasks, run in by_tasks.items()}
    every = {n: dict(settings(run.config))["mask_update_every"] for n, run in by_tasks.items()}
    assert steps == {5: 800, 30: 2400, 50: 4000}
    assert at_once == {5: 5, 30: 8, 50: 8}
    assert every == {5: 100, 30: 300, 50: 500}
    (intervals,) = (c for c in make_plan("figure4", "paper").cells if c.variant.name == "t_m × 4")
    assert dict(settings(intervals.runs[0].config))["mask_update_every"] == 4 * 5000


def test_names_are_stable_and_tell_what_differs_from_the_budget():
    names = {run.name for run in make_plan("table3", "small", [0]).runs}
    assert "mt50-near-optimal-harmodt-f-seed-0" in names  # 1.47M, as in table2
    assert "mt30-near-optimal-mtdt-size-0.48M-seed-0" in names
    names = {run.name for run in make_plan("figure4", "paper", [2]).runs}
    assert "mt50-near-optimal-harmodt-f-eta_max-10000-seed-2" in names
    assert "mt50-near-optimal-harmodt-f-mask_update_every-1250-seed-2" in names
    assert "mt50-near-optimal-harmodt-f-balance-0.1-seed-2" in names
    names = {run.name for run in make_plan("table4", "small", [0]).runs}
    assert "cheetah-vel-train-near-optimal-mtdt-return_scale-500-seed-0" in names


def test_one_name_is_one_run_in_all_experiments():
    found: dict[str, object] = {}
    for name in NAMES:
        for run in make_plan(name, "small").runs:
            assert found.setdefault(run.name, run) == run
    assert len(found) < sum(len(make_plan(name, "small").runs) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_command_means_its_settings(name):
    """As `harmodt.train` reads it; of each variant the run on the first column."""
    cells = make_plan(name, "smoke").cells
    first = {cell.variant.name: cell.runs[0] for cell in reversed(cells)}
    for run in first.values():
        job = Train(Folder(Path("x")), run)
        module, *words = job.words()
        assert module == "harmodt.train"
        preset_name, config = train._begun(words)
        places = {"data": Path("x/data") / run.collection.name, "output": job.directory}
        assert (preset_name, config) == (run.preset, change(run.config, places))


def test_unseen_tasks_are_met_after_training():
    jobs = jobs_of(make_plan("table4", "small", [0]), Folder(Path("x")))
    evaluations = [job for job in jobs if isinstance(job, Evaluate)]
    trained = [job for job in jobs if isinstance(job, Train)]
    assert (len(trained), len(evaluations)) == (9, 12)  # HarmoDT-F under two masks
    assert all(t.run.config.evaluation.evaluation_episodes == 0 for t in trained)
    words = " ".join(evaluations[-1].words())
    assert words == (
        "harmodt.evaluate x/runs/ant-dir-train-near-optimal-harmodt-f-return_scale-500-seed-0 "
        "--episodes 20 --unseen x/data/ant-dir-near-optimal --tasks "
        f"{' '.join(evaluations[-1].question.tasks)} --mask nearest"
    )
    assert len(evaluations[-1].question.tasks) == 5
    places = [job.name for job in jobs]
    for job in jobs:
        assert all(places.index(need) < places.index(job.name) for need in job.needs)


def test_the_papers_figures_are_of_the_rows_and_columns_there_are():
    content = json.loads((Path(experiments.__file__).parent / "paper.json").read_text())
    ours = {"HarmoDT-F, nearest mask"}  # is not the paper's
    for name in ("table1", "table2", "table3", "table4"):
        found = content["experiments"][name]["variants"]
        assert found.keys() == {v.name for v in EXPERIMENTS[name].variants} - ours
        columns = {column.name for column in EXPERIMENTS[name].columns}
        assert all(variant["results"].keys() == columns for variant in found.values())
    cells = [
        *(("table1", "MTIQL", "MT50 sub-optimal", "43.28 ± 0.90"),),
        *(("table2", "HarmoDT-M", "MT5 sub-optimal", "74.00 ± 4.79"),),
        *(("table3", "Prompt-DT", "MT50, 0.48 M", "36.07 ± 2.5"),),
        *(("table4", "MTDT", "Cheetah-vel", "-170.11 ± 5.7"),),
    ]
    for name, variant, column, result in cells:
        assert content["experiments"][name]["variants"][variant]["results"][column] == result


# Jobs on devices


@dataclass(frozen=True)
class Stub:
    """A command of tests/children in place of a training run; it is done when its file is there."""

    file: Path
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    status: int = 0

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def directory(self) -> Path:
        return self.file.parent / f"{self.name}.directory"

    def is_done(self) -> bool:
        return self.file.exists()

    def words(self) -> list[str]:
        numbers = [f"--seconds={self.seconds}", f"--status={self.status}"]
        return ["stub_command", str(self.file), *numbers]


def do(folder: Path, jobs: Sequence[Stub], slots: int = 1) -> Work:
    work = Work(jobs, find_slots("cpu", slots), Folder(folder), PlainConsole(quiet=True))
    work.do(Stop())
    return work


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begun(file: Path) -> int:
    """The process of a stub that has begun."""
    return int(file.with_suffix(".begun").read_text().split()[0])


def test_jobs_are_done_in_order_and_only_once(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    jobs = [Stub(a, seconds=1), Stub(b, needs=("a",)), Stub(c)]
    assert do(tmp_path, jobs, slots=2).failed == {}
    assert b.with_suffix(".begun").stat().st_mtime > a.stat().st_mtime
    times = [job.file.stat().st_mtime_ns for job in jobs]
    do(tmp_path, jobs)
    assert [job.file.stat().st_mtime_ns for job in jobs] == times
    log = Folder(tmp_path).log("b")
    assert log.read_text() == f"$ python -m stub_command {b} --seconds=0.0 --status=0\n"


def test_a_failure_does_not_end_the_rest(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    work = do(tmp_path, [Stub(a, status=3), Stub(b, needs=("a",)), Stub(c)])
    assert work.failed == {"a": "ended with status 3", "b": "not begun, because it needs a"}
    assert c.exists() and not b.exists()
    assert do(tmp_path, [Stub(a), Stub(b, needs=("a",)), Stub(c)]).failed == {}


def test_as_many_jobs_at_a_time_as_there_are_slots(tmp_path):
    """Each of two waits for the other, so that both must run at once."""
    a, b, c = (tmp_path / name for name in "abc")
    jobs = [Stub(a, seconds=1.5), Stub(b, seconds=1.5), Stub(c)]
    do(tmp_path, jobs, slots=2)
    starts = {f: f.with_suffix(".begun").stat().st_mtime for f in (a, b, c)}
    ends = {f: f.stat().st_mtime for f in (a, b, c)}
    assert starts[c] > min(ends[a], ends[b])


def test_a_job_that_leaves_nothing_has_failed(tmp_path):
    class Forgetful(Stub):
        def is_done(self) -> bool:
            return False

    work = do(tmp_path, [Forgetful(tmp_path / "a")])
    assert work.failed == {"a": "ended without a result"}


@pytest.fixture
def twelve_cores(monkeypatch):
    """On a machine of twelve cores, with no share of them and no number of threads set."""
    monkeypatch.setattr("harmodt.reproduce.execute.count_cores", lambda: 12)
    for name in share(1):
        monkeypatch.delenv(name, raising=False)


def test_every_gpu_has_its_runs_and_the_cpu_those_of_one_without(monkeypatch, twelve_cores):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_slots("auto", 1) == [{"CUDA_VISIBLE_DEVICES": ""}]
    with pytest.raises(UserError, match="there is no GPU here"):
        find_slots("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in find_slots("auto", 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,GPU-4")
    gpus = [slot["CUDA_VISIBLE_DEVICES"] for slot in find_slots("cuda", 2)]
    assert gpus == ["GPU-7", "GPU-4", "GPU-7", "GPU-4"]
    assert find_slots("cpu", 1) == [{"CUDA_VISIBLE_DEVICES": ""}]


@pytest.mark.parametrize(("gpus", "jobs", "each"), [(0, 2, 6), (0, 5, 2), (0, 13, 1), (2, 2, 3)])
def test_jobs_at_a_time_share_the_cores(monkeypatch, twelve_cores, gpus, jobs, each):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    slots = find_slots("auto", jobs)
    assert len(slots) == jobs * max(1, gpus)
    for slot in slots:
        assert slot["OMP_NUM_THREADS"] == slot["HARMODT_CORES"] == str(each)


def test_a_number_of_threads_that_was_chosen_stays(monkeypatch, twelve_cores):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("HARMODT_CORES", "12")  # of which each has half
    slot = find_slots("cpu", 2)[0]
    assert "OMP_NUM_THREADS" not in slot
    assert (slot["MKL_NUM_THREADS"], slot["HARMODT_CORES"]) == ("6", "6")


def test_a_job_that_shares_the_machine_simulates_on_its_share(tmp_path, monkeypatch):
    """As the stub's process counts the cores that there are for it."""
    monkeypatch.setattr("harmodt.reproduce.execute.count_cores", lambda: 2)
    do(tmp_path, [Stub(tmp_path / "a")], slots=2)
    assert (tmp_path / "a.begun").read_text().split()[-1] == "1"


def test_a_signal_ends_what_runs_and_waits_for_it(tmp_path):
    stop, file = Stop(), tmp_path / "a"
    work = Work(
        [Stub(file, seconds=1000), Stub(tmp_path / "b")],
        find_slots("cpu", 1), Folder(tmp_path), PlainConsole(quiet=True),
    )  # fmt: skip

    class Watching(Stop):
        @property
        def signal(self):
            return signal.SIGINT if file.with_suffix(".begun").exists() else None

        @signal.setter
        def signal(self, value):
            pass

    stop = Watching()
    work.do(stop)
    assert file.with_suffix(".ended").read_text() == str(int(signal.SIGTERM))
    assert not lives(begun(file)) and not (tmp_path / "b").exists()


def test_what_a_killed_reproduction_began_ends_by_itself_and_is_waited_for(tmp_path):
    file = tmp_path / "a"
    script = (
        "import sys; from pathlib import Path; from test_reproduce import Stub, do\n"
        "file = Path(sys.argv[1]); do(file.parent, [Stub(file, seconds=1000)])"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(file)]) as process:
        wait_for(file.with_suffix(".begun").exists)
        os.kill(process.pid, signal.SIGKILL)
    wait_for(file.with_suffix(".ended").exists)
    wait_for(lambda: not lives(begun(file)))
    job = Stub(file)
    job.directory.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; "
         "from harmodt.files import owned\nwith owned(Path(sys.argv[1])): print(flush=True); "
         "time.sleep(2)", str(job.directory)], stdout=subprocess.PIPE,
    ) as owner:  # fmt: skip
        owner.stdout.readline()
        do(tmp_path, [job])
        assert owner.poll() is not None  # the job began when the other had let go


# Whole reproductions


TOY = [sys.executable, "-m", "harmodt.reproduce", "toy", "--budget", "toy", "--output"]


def reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOY, str(folder)], capture_output=True, text=True)


def begin(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*TOY, str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished reproduction, never to be changed."""
    folder = tmp_path_factory.mktemp("reproduced") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", tiny_experiment.children()["PYTHONPATH"])
        result = reproduce(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "printed").write_text(result.stdout)
    return folder


@pytest.fixture
def reproduced(finished, tmp_path) -> Path:
    """A finished reproduction of its own."""
    return Path(shutil.copytree(finished, tmp_path / "reproduced"))


def go_on(monkeypatch, folder: Path, *more: str) -> None:
    """Run the command in this process, which has imported everything; its jobs are processes."""
    monkeypatch.setattr(sys, "argv", ["harmodt.reproduce", *TOY[3:], str(folder), *more])
    command.main()


def in_process(monkeypatch, capsys, folder: Path, *more: str) -> str:
    """The command in this process, where nothing is left to be started."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a job begins"))
    go_on(monkeypatch, folder, *more)
    return capsys.readouterr().out


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("toy.json", "toy.csv", "toy.md", "toy.svg")
    }


def table(path):
    """A table's JSON file, whose checksum is right."""
    content = json.loads(path.read_text())
    assert content.pop("crc32") == json_checksum(content)
    return content


def test_a_reproduction_ends_in_a_table_of_its_runs(finished):
    text = (finished / "printed").read_text()
    assert text.count(": done, ") == 5 and "FAILED" not in text
    assert {path.name for path in (finished / "runs").iterdir()} == {
        f"both-near-optimal-{algorithm}-seed-{seed}"
        for algorithm in ("prompt-dt", "harmodt-f") for seed in (0, 1)
    }  # fmt: skip
    content = table(finished / "toy.json")
    assert content["budget"] == "toy"
    folder, found = Folder(finished), make_plan("toy", "toy")
    for cell, row in zip(found.cells, content["rows"], strict=True):
        results = [find_result(folder, run, cell.question) for run in cell.runs]
        returns = np.stack([result.returns for result in results])
        assert row["mean"]["mean"] == pytest.approx(returns.mean())
        assert row["deviation"] == pytest.approx(abs(np.diff(returns.mean((1, 2)))[0]) / 2**0.5)
        assert (row["tasks"], row["episodes"], row["seeds"]) == (2, 2, [0, 1])
        means = dict(zip(cell.question.tasks, returns.mean(2).T.tolist(), strict=True))
        assert row["by_task"] == means and len(means) == 2
        mean = f"{returns.mean():.1f}".replace("-0.0", "0.0")
        assert f"{mean} ± {row['deviation']:.1f}" in text
    first, second = content["rows"]
    assert first["difference"] is None
    gained = second["mean"]["mean"] - first["mean"]["mean"]
    assert second["difference"]["mean"] == pytest.approx(gained)
    with open(finished / "toy.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["Prompt-DT", "HarmoDT-F"]
    figure = ElementTree.parse(finished / "toy.svg").getroot()
    drawn = "".join(figure.itertext())
    assert all(name in drawn for name in ("Points", "Prompt-DT", "HarmoDT-F", "toy: "))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", (finished / "toy.svg").read_text())
    page = (finished / "toy.html").read_text()
    assert all(path.name in page for path in (finished / "runs").iterdir())
    assert float(rows[1]["difference_low"]) == second["difference"]["low"]


def test_what_is_done_is_skipped(reproduced, monkeypatch, capsys):
    before = outputs(reproduced)
    (reproduced / "toy.csv").unlink()
    (reproduced / "toy.md").unlink()
    (reproduced / "toy.svg").unlink()
    assert "HarmoDT-F" in in_process(monkeypatch, capsys, reproduced)
    assert outputs(reproduced) == before


def test_seeds_are_added_or_left_out(reproduced, monkeypatch, capsys):
    in_process(monkeypatch, capsys, reproduced, "--seeds", "1")
    content = table(reproduced / "toy.json")
    assert [row["seeds"] for row in content["rows"]] == [[1], [1]]
    assert content["rows"][0]["deviation"] is None


@pytest.mark.parametrize("what", ["the reproduction", "a run"])
def test_a_kill_loses_nothing(finished, reproduced, monkeypatch, what):
    """Of a run that is under way: its last steps are to be taken again, or its evaluation."""
    run = reproduced / "runs" / "both-near-optimal-harmodt-f-seed-0"
    shutil.rmtree(run / "checkpoints" / "00000008")
    shutil.rmtree(run / "evaluation")
    log = Folder(reproduced).log(run.name)
    log.unlink()
    with begin(reproduced) as process:
        wait_for(lambda: log.exists() and "run: " in log.read_text())
        (lock,) = run.glob(".lock")
        child = int(lock.read_text())
        os.kill(process.pid if what == "the reproduction" else child, signal.SIGKILL)
        printed = process.communicate()[0]
    if what == "a run":
        assert process.returncode == 1
        assert f"FAILED {run.name}: killed by SIGKILL" in printed
        data = reproduced / "data" / "toy-near-optimal"
        again = f"python -m harmodt.train --resume {run} --data {data}"
        assert f"log: {log}\n  repeat it with: {again}" in printed
        assert "1 of 4 results are still missing" in printed
        wait_for(lambda: not lives(child))
        reproduced = reproduced.rename(reproduced.with_name("moved"))  # which loses nothing either
    go_on(monkeypatch, reproduced)
    assert outputs(reproduced) == outputs(finished)


def test_ctrl_c_ends_the_run_with_a_checkpoint(finished, reproduced, monkeypatch):
    run = reproduced / "runs" / "both-near-optimal-harmodt-f-seed-0"
    shutil.rmtree(run)
    with begin(reproduced) as process:
        wait_for((run / "metrics.jsonl").exists)
        child = int((run / ".lock").read_text())
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGINT and not lives(child)
    again = f"toy --budget toy --output {reproduced}"
    assert f"stopped by SIGINT; go on with: python -m harmodt.reproduce {again}" in printed
    assert checkpoint_steps(RunDirectory(run))
    go_on(monkeypatch, reproduced)
    assert outputs(reproduced) == outputs(finished)


def test_only_one_reproduction_at_a_time(reproduced, monkeypatch, capsys):
    with owned(reproduced), pytest.raises(UserError, match="in use by another command"):
        in_process(monkeypatch, capsys, reproduced)


# What is there, and is another's


def refused(folder: Path, monkeypatch, capsys) -> str:
    with pytest.raises(UserError) as error:
        in_process(monkeypatch, capsys, folder)
    return str(error.value)


def test_a_run_of_other_settings_is_refused(reproduced, monkeypatch, capsys):
    budget = replace(
        tiny_experiment.BUDGET, settings={**tiny_experiment.BUDGET.settings, "learning_rate": 0.5}
    )
    monkeypatch.setitem(BUDGETS, "toy", budget)
    run = reproduced / "runs" / "both-near-optimal-prompt-dt-seed-0"
    assert refused(reproduced, monkeypatch, capsys) == (
        f"the run {run} was trained with learning_rate = 0.001 instead of 0.5: move it away, or "
        "name another --output"
    )
    changes = [{"step": 3, "setting": "learning_rate", "from": 0.5, "to": 0.001}]
    for path in (reproduced / "runs").iterdir():
        RunDirectory(path).update({"changes": changes})
    in_process(monkeypatch, capsys, reproduced)  # what a person has changed is theirs


def test_data_of_other_settings_are_refused_and_imported_ones_are_taken(
    reproduced, monkeypatch, capsys
):
    budget = replace(tiny_experiment.BUDGET, episodes={"near-optimal": 5})
    monkeypatch.setitem(BUDGETS, "toy", budget)
    store = reproduced / "data" / "toy-near-optimal"
    says = f"the store {store} has episodes = 4 instead of 5: move it away, or name another"
    assert refused(reproduced, monkeypatch, capsys).startswith(says)
    found = make_plan("toy", "toy").collections[0]
    from harmodt import sealed
    from harmodt.data.store import DataStore, read_manifest

    manifest = read_manifest(store / "manifest.json")
    sealed.write(store / "manifest.json", {**manifest, "provenance": {"import": {}}})
    assert Collect(Folder(reproduced), found).is_done()
    wanting = replace(found, tasks=("slow", "quick", "third"))
    with pytest.raises(UserError, match="lacks third: move it away"):
        Collect(Folder(reproduced), wanting).is_done()
    assert "import" in DataStore.open(store).provenance


def test_a_damaged_result_is_named(reproduced, monkeypatch, capsys):
    run = reproduced / "runs" / "both-near-optimal-harmodt-f-seed-1"
    (path,) = (run / "evaluation").glob("*.json")
    path.write_text(path.read_text().replace("0", "1", 1))
    message = refused(reproduced, monkeypatch, capsys)
    assert str(path) in message and "its checksum fails" in message


def test_plans_that_were_drawn_in_another_way_are_left_alone(tmp_path, monkeypatch):
    from test_results import PROTOCOL, RETURNS, SUCCESSES, EvaluationResult

    found = make_plan("table2", "small")
    cell = next(cell for cell in found.cells if cell.variant.name == "MTDIFF")
    (run, *_), tasks, folder = cell.runs, cell.question.tasks, Folder(tmp_path)
    names = ("sampler", "sampling_steps", "guidance", "temperature", "replan_every")
    own = {name: dict(settings(run.config))[name] for name in names}
    assert own["sampler"] == "ddim"

    metaworld = family("metaworld").spec
    description = {"id": "a", "tasks": tasks, "environment": metaworld.to_json(), "config": {}}
    directory = folder.run(run)
    directory.path.mkdir(parents=True)
    directory.write({**description, "store": "0", "conditioning": "0"})
    monkeypatch.setattr(jobs, "own_targets", lambda run: dict.fromkeys(tasks, 1.0))

    def save(plans):
        protocol = replace(
            PROTOCOL, tasks=tasks, target_returns=(1.0,) * len(tasks), checkpoint=run.steps,
            episodes=cell.question.episodes, mask="none", plans=plans,
            seed=Request().seed, goal_seed=Request().goal_seed, environment=metaworld,
        )  # fmt: skip
        shape = (len(tasks), cell.question.episodes)
        values = np.resize(SUCCESSES, shape), np.resize(RETURNS, shape)
        EvaluationResult(protocol, *values, 1.0, {}).save(folder.run(run).evaluation)

    for plans in (own | {"sampling_steps": 2}, own | {"sampler": "ddpm", "sampling_steps": 200}):
        save(plans)
        assert find_result(folder, run, cell.question) is None
    save(own)
    assert find_result(folder, run, cell.question).protocol.plans == own


def test_what_is_no_run_is_left_alone(reproduced, monkeypatch, capsys):
    run = reproduced / "runs" / "both-near-optimal-harmodt-f-seed-1"
    (run / "run.json").unlink()
    assert refused(reproduced, monkeypatch, capsys).startswith(f"{run} is not empty")


def test_evaluations_of_other_kinds_are_left_alone(reproduced, monkeypatch, capsys):
    """Of the same run and size, but with other goals: not the one that is asked for."""
    before = outputs(reproduced)
    run = make_plan("toy", "toy").runs[0]
    folder = Folder(reproduced)
    asked = find_result(folder, run, make_plan("toy", "toy").cells[0].question)
    spec = asked.protocol.environment
    changes = {
        "goal_seed 3 instead of": {"goal_seed": 3},
        "target_returns 7 instead of the run's own": {"target_returns": (7.0, 7.0)},
        f"episode_length 2 instead of {spec.episode_length}": {
            "environment": replace(spec, episode_length=2)
        },
    }
    for other in changes.values():
        protocol = replace(asked.protocol, **other)
        replace(asked, protocol=protocol, returns=asked.returns + 9).save(
            folder.run(run).evaluation
        )
    in_process(monkeypatch, capsys, reproduced)
    assert outputs(reproduced)["toy.csv"] == before["toy.csv"]
    notes = table(reproduced / "toy.json")["notes"]
    left_out = [note for note in notes if note.startswith("Left out")]
    assert len(left_out) == 3 and all(f": {run.name} with " in note for note in left_out)
    assert all(any(how in note for note in left_out) for how in changes)
    twice = replace(asked, protocol=replace(asked.protocol, backend="other"))
    twice.save(folder.run(run).evaluation)
    assert "are evaluations of the same last step" in refused(reproduced, monkeypatch, capsys)


def test_a_run_that_fails_is_named_and_the_rest_is_done(reproduced, finished, monkeypatch, capsys):
    """One whose checkpoint is damaged; of the next one the evaluation was deleted."""
    run, last = (
        reproduced / "runs" / f"both-near-optimal-{name}"
        for name in ("prompt-dt-seed-0", "harmodt-f-seed-1")
    )
    for directory in (run, last):
        shutil.rmtree(directory / "evaluation")
    (run / "checkpoints" / "00000008" / "state.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        go_on(monkeypatch, reproduced)
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "Traceback" not in printed.out + printed.err
    lines = printed.out.splitlines()
    place = lines.index(f"FAILED {run.name}: ended with status 2")
    damaged = f"{run}/checkpoints/00000008/state.safetensors is damaged (its checksum fails)"
    assert lines[place + 1].startswith(f"  error: {damaged}")
    assert lines[place + 3] == f"  repeat it with: python -m harmodt.evaluate {run} --episodes 2"
    assert "1 of 4 results are still missing." in lines
    (path,) = (last / "evaluation").glob("*.json")
    before = finished / path.relative_to(reproduced)
    again, first = (json.loads(p.read_text())["tasks"] for p in (path, before))
    assert again == first


# What is printed


def test_a_table_reads_well_in_eighty_columns_and_in_fifty(finished):
    outcome = tabulate(make_plan("toy", "toy"), Folder(finished))
    for width in (80, 50):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(outcome.table(width))
        lines = console.export_text().splitlines()
        assert all(len(line.rstrip()) <= width for line in lines)
        assert not [line for line in lines if "…" in line]
    assert outcome.notes[0] == "Budget toy: a few steps of points on a line."


@pytest.fixture
def table2(monkeypatch) -> Outcome:
    """With results made up: HarmoDT-F solves every other task in three episodes of four."""
    from test_results import PROTOCOL, SUCCESSES, EvaluationResult

    def found(folder, run, question):
        successes = np.resize(SUCCESSES, (len(question.tasks), 4)) & ("harmodt-f" in run.name)
        return EvaluationResult(PROTOCOL, successes, successes * 9.0, 1.0, {})

    monkeypatch.setattr("harmodt.reproduce.tables.find_result", found)
    return tabulate(make_plan("table2", "small"), Folder(Path("nowhere")))


def test_success_is_shown_in_percent_beside_the_papers(table2):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table2.table(100))
    text = console.export_text()
    row = re.search(r"  HarmoDT-F +37\.5 ± 0\.0 +37\.5 +82\.20 ± 0\.40", text)
    assert row, text
    assert "paper, Table 2" in text and "success in %" in text
    mtdt = next(row for row in table2.rows if (row.variant, row.tasks) == ("MTDT", 30))
    assert mtdt.mean.mean == 0 and mtdt.difference.mean == -0.375
    assert any("Meta-World v3" in note for note in table2.notes)


def test_a_table_in_markdown_has_a_part_for_each_column(table2):
    lines = table2.to_markdown().splitlines()
    assert lines[0].startswith("# table2: ") and lines[0].endswith("; success in %")
    head = lines.index(
        "| MT30 sub-optimal | mean | middle half | minus HarmoDT-F | paper, Table 2 |"
    )
    assert lines[head + 1] == "| --- | --: | --: | --: | --: |"
    assert lines[head + 7].startswith("| HarmoDT-F | 37.5 ± 0.0 [")
    assert lines[head + 7].endswith(" |  | 65.00 ± 0.92 |") and lines[head + 8] == ""
    assert lines[-1] == f"- {table2.notes[-1]}"


def test_averages_of_the_columns_stand_beside_the_papers(monkeypatch):
    from test_results import PROTOCOL, EvaluationResult

    def found(folder, run, question):
        if "ant-dir" in run.name and "mtdt" in run.name:
            return None
        each = {"cheetah-dir": 10.0, "cheetah-vel": -40.0, "ant-dir": 60.0}
        value = next(value for name, value in each.items() if name in run.name)
        value += 3.0 * ("harmodt" in run.name)
        returns = np.full((len(question.tasks), 2), value)
        return EvaluationResult(PROTOCOL, None, returns, 1.0, {})

    monkeypatch.setattr("harmodt.reproduce.tables.find_result", found)
    notes = tabulate(make_plan("table4", "small"), Folder(Path("nowhere"))).notes
    (averages,) = (note for note in notes if note.startswith("Average"))
    assert averages.endswith("MTDT – (219.2), Prompt-DT 10.0 (362.1), HarmoDT-F 13.0 (396.8).")


def test_a_figure_has_the_differences_from_the_reference(table2):
    drawn = [p for p in describe(table2)["data"]["values"] if p["column"] == "MT30 sub-optimal"]
    assert [point["variant"] for point in drawn] == [row.variant for row in table2.rows[18:24]]
    assert drawn[-1] == {
        "column": "MT30 sub-optimal", "variant": "HarmoDT-F", "mean": "37.5", "zero": 0,
        "difference": 0,
    }  # fmt: skip
    assert drawn[-2]["difference"] == -37.5 and drawn[-2]["paper"] == pytest.approx(63.67 - 65)
    assert drawn[-2]["low"] < -37.5 < drawn[-2]["high"] < 0


def test_a_figures_title_is_no_wider_than_its_panels(table2):
    def title(columns: int) -> dict[str, list[str]]:
        plan = table2.plan
        few = replace(
            plan.experiment, columns=plan.experiment.columns[:columns], title="word " * 60
        )
        return describe(replace(table2, plan=replace(plan, experiment=few)))["title"]

    assert 40 < max(map(len, title(1)["text"])) <= 56 < max(map(len, title(2)["text"])) <= 112
    assert max(map(len, title(1)["subtitle"])) <= 56


def test_the_others_are_compared_with_the_variant_that_is_asked_for(
    reproduced, monkeypatch, capsys
):
    before = outputs(reproduced)
    text = in_process(monkeypatch, capsys, reproduced, "--reference", "HarmoDT-F")
    usual = table(reproduced / "toy.json")
    asked = table(reproduced / "toy-minus-harmodt-f.json")
    assert outputs(reproduced) == before and "minus HarmoDT-F" in text
    assert (usual["reference"], asked["reference"]) == ("Prompt-DT", "HarmoDT-F")
    differences = [
        {row["variant"]: row["difference"] for row in content["rows"]} for content in (usual, asked)
    ]
    assert differences[0]["Prompt-DT"] is differences[1]["HarmoDT-F"] is None
    forth, back = differences[0]["HarmoDT-F"], differences[1]["Prompt-DT"]
    assert forth["mean"] == pytest.approx(-back["mean"]) and forth["mean"] != 0


def test_without_what_draws_there_is_the_table(reproduced, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for kind in (".svg", ".html"):
        (reproduced / f"toy{kind}").unlink()
    text = in_process(monkeypatch, capsys, reproduced)
    missing = "plots need the package vl-convert-python: pip install 'harmodt[report]'"
    assert f"figure: {missing}" in text and f"all runs side by side: {missing}" in text
    assert (reproduced / "toy.csv").exists() and not (reproduced / "toy.svg").exists()


def test_harmony_is_averaged_over_training(tmp_path, monkeypatch):
    toy = replace(tiny_experiment.TOY, measure="harmony")
    monkeypatch.setitem(EXPERIMENTS, "toy", toy)
    found, folder = make_plan("toy", "toy"), Folder(tmp_path)
    monkeypatch.setattr("harmodt.reproduce.tables._is_trained", lambda *_: True)
    for cell in found.cells:
        for seed, run in enumerate(cell.runs):
            path = folder.run(run).metrics
            path.parent.mkdir(parents=True)
            records = Records(path, 0, timed=False)
            records.write({"step": 0, "harmony": 0.1 + seed})
            records.write({"step": 1, "loss": 3.0})
            last = 0.3 + seed + (cell.variant.algorithm == "harmodt-f")
            records.write({"step": 4, "harmony": last})
            records.close()
    prompt_dt, harmodt_f = tabulate(found, folder).rows
    assert prompt_dt.mean.mean == pytest.approx(0.7)
    assert harmodt_f.difference.mean == pytest.approx(0.5)


def test_a_dry_run_measures_and_writes_nothing(reproduced, monkeypatch, capsys):
    shutil.rmtree(reproduced / "runs" / "both-near-optimal-harmodt-f-seed-1")
    before = sorted(reproduced.rglob("*"))
    text = in_process(monkeypatch, capsys, reproduced, "--dry-run")
    assert sorted(reproduced.rglob("*")) == before
    assert "4 runs and 1 collections" in " ".join(text.split())
    rows = [line for line in text.splitlines() if "Points" in line]
    assert "100%" in rows[0] and re.search(r" 50% +\d+ ms +\d+ s", rows[1])


class Clock:
    """A device that computes later than it is told to, and the time that passes meanwhile."""

    def __init__(self):
        self.now = self.queued = 0.0

    def wait(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self.now += self.queued
        self.queued = 0.0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_dry_run_times_what_a_long_run_repeats(monkeypatch, device):
    """On a GPU three steps run as usual, the fourth is recorded and the others are replayed.

    Each of them, and the first mask update, takes longer than those that follow; and a call returns
    before the GPU has computed.
    """
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", clock.wait)
    step_seconds, update_seconds = iter([900.0, 3, 3, 500, 1, 2, 1.5]), iter([700.0, 24, 16])

    class FakeTrainer:
        def __init__(self, *_):
            self.step = 0

        def train_step(self):
            self.step += 1
            self._compute(next(step_seconds))

        def before_step(self):
            assert self.step == 0  # where a mask update is due
            self._compute(next(update_seconds))

        def _compute(self, seconds):
            if device == "cuda":
                clock.queued += seconds
            else:
                clock.now += seconds

    monkeypatch.setattr("harmodt.reproduce.estimate.Trainer", FakeTrainer)
    chosen = replace(Execution.choose("cpu", False, "fp32"), device=torch.device(device))
    runs = {run.config.algorithm: run for run in make_plan("toy", "toy").runs}
    options = runs["harmodt-f"].config.run
    asked = (options.device, options.fused, options.precision, options.graph)
    monkeypatch.setattr(Execution, "choose", lambda *given: {asked: chosen}[given])
    (every,) = {dict(settings(runs["harmodt-f"].config))["mask_update_every"]}
    assert seconds_per_step(runs["harmodt-f"]) == 1 + 16 / every
    step_seconds = iter([900.0, 3, 3, 500, 1, 2, 1.5])
    assert seconds_per_step(runs["prompt-dt"]) == 1


def test_the_list_has_every_experiment(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harmodt.reproduce", "--list"])
    command.main()
    text, budgets = capsys.readouterr().out, ("smoke", "small", "cores", "paper")
    for name in NAMES:
        runs = [str(len(make_plan(name, budget).runs)) for budget in budgets]
        assert re.search(rf"^ +{name} .* {' +'.join(runs)} ", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no experiment is named: name one of table1"),
        (["tabel2"], "no experiment 'tabel2': did you mean 'table2'?"),
        (["table2", "--budget", "papers"], "no budget 'papers': did you mean 'paper'?"),
        (["table2", "--reference", "prompt-dt"], "of table2 'prompt-dt': did you mean 'Prompt-DT'"),
        (["table2", "--jobs", "0"], "jobs is 0: give 1 or more"),
        (["table2", "--seeds", "-1"], "seeds is -1: give 0 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harmodt.reproduce", *words])
    with pytest.raises(UserError, match=re.escape(says)):
        command.main()
    assert not list(tmp_path.iterdir())
