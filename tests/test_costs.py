"""What a run's directory says of the time and memory that the run took."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE
from runs import assert_same, begin, play
from tiny import TASKS, make_store

from harmodt import train
from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.files import checksum
from harmodt.rundir import RunDirectory
from harmodt.training import trainer as module
from harmodt.training.costs import PARTS, Costs
from harmodt.training.records import Records, read_records
from harmodt.training.trainer import Trainer

NAP = 0.05


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store", TASKS[:2])


@pytest.fixture
def slow(monkeypatch) -> None:
    """An evaluation and a mask update that take their time."""

    def slow_play(policy, request, console):
        time.sleep(NAP)
        return play(policy, request, console)

    def slow_before_step(trainer):
        if trainer.step % 4 == 0:
            time.sleep(2 * NAP)
        return before_step(trainer)

    before_step = Trainer.before_step
    monkeypatch.setattr(module, "play", slow_play)
    monkeypatch.setattr(Trainer, "before_step", slow_before_step)


EVALUATED = ("--evaluate-every", "4", "--evaluation-episodes", "1")


def test_time_is_told_by_what_it_went_to(store, tmp_path, slow):
    began = time.monotonic()
    begin(store, tmp_path / "run", *EVALUATED)
    took = time.monotonic() - began
    lines = [json.loads(line) for line in (tmp_path / "run" / "costs.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 4, 4, 4, 6, 8, 8, 8, 9, 12, 12, 12]
    last = lines[-1]
    assert {f"seconds/{part}" for part in PARTS} < last.keys()
    assert last["seconds/evaluations"] >= 3 * NAP
    assert last["seconds/masks and harmony"] >= 3 * 2 * NAP
    assert last["seconds/checkpoints"] > 0
    assert sum(last[f"seconds/{part}"] for part in PARTS) < last["seconds"] < took
    for name in ("seconds", *(f"seconds/{part}" for part in PARTS), "peak_memory"):
        assert np.all(np.diff([line[name] for line in lines]) >= 0), name
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert last["peak_memory"] == pytest.approx(1024 * peak, rel=0.05)


def test_a_run_that_goes_on_adds_to_what_its_checkpoint_had_cost(store, tmp_path, monkeypatch):
    def interrupted(trainer):
        result = train_step(trainer)
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit):
        begin(store, tmp_path / "run")
    monkeypatch.undo()
    directory = RunDirectory(tmp_path / "run")
    shutil.rmtree(directory.checkpoint(6))  # as if it had been killed before
    before = read_records(directory.costs, timed=True)
    assert before[-1]["step"] == 6
    at_checkpoint = [record for record in before if record["step"] == 4]
    train.main(["--resume", str(tmp_path / "run")])
    after = read_records(directory.costs, timed=True)
    kept = [record for record in before if record["step"] <= 4]
    assert after[: len(kept)] == kept
    assert [record["step"] for record in after[len(kept) :]] == [6, 8, 8, 9, 12, 12]
    assert after[len(kept)]["seconds"] > at_checkpoint[-1]["seconds"]
    first, spent = after[len(kept)], at_checkpoint[-1]["seconds/checkpoints"]
    assert first["seconds/checkpoints"] == spent > 0  # no checkpoint was written since
    assert after[-1]["seconds/checkpoints"] > spent


def test_the_most_memory_is_that_of_all_parts_of_a_run(tmp_path, monkeypatch):
    directory, cpu = RunDirectory(tmp_path), torch.device("cpu")
    for begun, held, most in ((0, 900, 900), (4, 300, 900), (8, 1000, 1000)):
        used = SimpleNamespace(ru_maxrss=held)  # in KiB
        monkeypatch.setattr("resource.getrusage", lambda who, used=used: used)
        with contextlib.closing(Costs(directory, begun, cpu)) as costs:
            costs.write(begun + 4)
        assert read_records(directory.costs, timed=True)[-1]["peak_memory"] == 1024 * most


def test_time_changes_nothing_else(store, tmp_path, slow):
    """Metrics and all else are the same whatever a run takes, and with costs of none before."""
    begin(store, tmp_path / "whole", *EVALUATED)
    begin(store, tmp_path / "cut", *EVALUATED)
    (tmp_path / "cut" / "costs.jsonl").unlink()
    shutil.rmtree(RunDirectory(tmp_path / "cut").checkpoint(12))
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    (first, *_) = read_records(tmp_path / "cut" / "costs.jsonl", timed=True)
    assert first["step"] > 8


def test_records_of_the_other_kind_are_refused(store, tmp_path):
    begin(store, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    for path, other in ((directory.metrics, directory.costs), (directory.costs, directory.metrics)):
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        with pytest.raises(UserError, match=f"{path.name} holds the records of another file"):
            train.main(["--resume", str(tmp_path / "run")])
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["costs", "metrics"])
def test_a_damaged_line_is_named_and_nothing_changes(store, tmp_path, name):
    begin(store, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    shutil.rmtree(directory.checkpoint(12))  # a resumed run drops later lines of both files
    path = getattr(directory, name)
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 5', 1))
    before = {file: file.read_bytes() for file in directory.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=rf"line \d of {path} is damaged"):
        train.main(["--resume", str(tmp_path / "run")])
    after = {file: file.read_bytes() for file in directory.path.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "record",
    [
        {"step": 1, "seconds": 2.0},
        {"step": 1, "seconds": math.nan, "peak_memory": 5},
        {"step": 1, "seconds": 2.0, "peak_memory": math.inf},
    ],
)
def test_what_was_not_measured_is_refused(tmp_path, record):
    path = tmp_path / "costs.jsonl"
    with contextlib.closing(Records(path, 0, timed=True)) as records:
        records.write({"step": 0, "seconds": 1.0, "peak_memory": 4})
        records.write(record)
    with pytest.raises(UserError, match=f"line 2 of {path} is damaged .it lacks the memory, or"):
        read_records(path, timed=True)


def test_a_line_ends_with_the_checksum_of_the_rest(tmp_path):
    with contextlib.closing(Costs(RunDirectory(tmp_path), 0, torch.device("cpu"))) as costs:
        costs.write(7)
    line = (tmp_path / "costs.jsonl").read_text()
    rest, _, crc = line.rpartition(', "crc32": "')
    assert crc == f'{checksum(rest.encode() + b"}")}"}}\n'
    assert json.loads(line)["step"] == 7


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_a_gpu_is_not_waited_for_and_its_time_is_told(tmp_path):
    device = torch.device(DEVICE)
    square = torch.randn(4096, 4096, device=device)
    with contextlib.closing(Costs(RunDirectory(Path(tmp_path)), 0, device)) as costs:
        for _ in range(3):
            square @ square
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(50):
            square @ square
        with costs.measure("masks and harmony"):
            for _ in range(50):
                square @ square
        issued = time.monotonic() - began
        torch.cuda.synchronize()
        took = time.monotonic() - began
        costs.write(1)
    (record,) = read_records(tmp_path / "costs.jsonl", timed=True)
    assert issued < took / 4  # the host went on at once
    assert record["seconds/masks and harmony"] == pytest.approx(took / 2, rel=0.2)
    assert record["peak_device_memory"] >= square.nbytes
