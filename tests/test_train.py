"""The command line of training: runs, resuming, stopping, and every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, begin, final, small_flags
from tiny import TASKS, make_store

from harmodt import load_policy, train
from harmodt.algorithms.sequence import SequenceLearner
from harmodt.checkpoint import checkpoint_steps, load_checkpoint
from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.rundir import RunDirectory
from harmodt.training.run import SavedRun
from harmodt.training.trainer import Trainer
from harmodt_kernels.native import library


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store", TASKS[:2])


def test_a_run_leaves_what_it_promises(store, tmp_path, capsys):
    begin(store, tmp_path / "run")
    assert checkpoint_steps(RunDirectory(tmp_path / "run")) == [4, 8, 12]
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    (part,) = description["parts"]
    assert (part["step"], part["device"], part["backend"]) == (0, "cpu", "pytorch")
    assert part["versions"]["torch"] == torch.__version__
    assert description["environment"] == store.environment.to_json()
    assert description["store"] == store.checksum
    assert description["tasks"] == list(store.tasks)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in lines if "harmony" in line] == [0, 4, 8]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert str(tmp_path / "run") in capsys.readouterr().out.replace("\n", "")


def test_a_step_takes_all_tasks_where_there_are_fewer_than_asked_for(store, tmp_path, capsys):
    begin(store, tmp_path / "run", "--tasks-per-step", "5")
    begin(store, tmp_path / "both", "--tasks-per-step", "2")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("--tasks-per-step is") == 1
    assert "--tasks-per-step is lowered from 5 to 2, the number of the run's tasks" in said
    saved = SavedRun.open(tmp_path / "run")
    assert saved.config.data.tasks_per_step == 2
    assert_same(tmp_path / "both", tmp_path / "run")


def test_masks_move_during_a_run(store, tmp_path):
    begin(store, tmp_path / "run", "--keep-checkpoints", "9", "--checkpoint-every", "1")
    first, last = (
        load_checkpoint(RunDirectory(tmp_path / "run"), s).tensors["masks"] for s in (4, 12)
    )
    assert not torch.equal(first, last)


@pytest.mark.parametrize("algorithm", ["harmodt-m", "harmodt-r", "prompt-dt", "mtdt"])
def test_every_variant_trains(store, tmp_path, algorithm):
    begin(store, tmp_path / "run", algorithm=algorithm)
    assert ("masks" in final(tmp_path / "run")) == algorithm.startswith("harmodt")


def test_resuming_gives_the_same_run(store, tmp_path):
    begin(store, tmp_path / "whole")
    begin(store, tmp_path / "cut")
    for step in (8, 12):  # as if it had been killed after the checkpoint of step 4
        folder = tmp_path / "cut" / "checkpoints" / f"{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_the_place_of_the_data_changes_nothing(store, tmp_path):
    begin(store, tmp_path / "on_disk", "--data-device", "cpu")
    begin(store, tmp_path / "both", "--data-device", "same")
    shutil.rmtree(RunDirectory(tmp_path / "both").checkpoint(12))
    train.main(["--resume", str(tmp_path / "both"), "--data-device", "cpu"])
    assert_same(tmp_path / "on_disk", tmp_path / "both")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_the_run_goes_on(store, tmp_path, monkeypatch, capsys, number):
    begin(store, tmp_path / "whole")
    step = Trainer.train_step

    def interrupted(trainer):
        result = step(trainer)
        if trainer.step == 6:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as exit:
        begin(store, tmp_path / "cut")
    assert exit.value.code == 128 + number
    assert checkpoint_steps(RunDirectory(tmp_path / "cut"))[-1] == 6
    assert "--resume" in capsys.readouterr().out
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "cut")])
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(tensor, final(tmp_path / "cut")[name]), name


def refused(store: DataStore, tmp_path: Path, *more: str) -> str:
    """The message of a run that is refused, which must leave nothing behind."""
    with pytest.raises(UserError) as error:
        begin(store, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_bad_settings_are_named(store, tmp_path):
    assert "[0, 1)" in refused(store, tmp_path, "--sparsity", "1.0")
    assert "sparsity" in refused(store, tmp_path, "--sparsity", "-0.1")
    assert "maskable weights" in refused(store, tmp_path, "--eta-max", "1000000")
    assert "not a multiple of heads" in refused(store, tmp_path, "--heads", "5")
    assert "learning_rate" in refused(store, tmp_path, "--learning-rate", "0")
    assert "eta_min" in refused(store, tmp_path, "--eta-min", "200")


def test_fused_says_what_is_missing(store, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    assert "the CPU kernels were not built" in refused(store, tmp_path, "--fused")


def test_tf32_on_a_cpu_is_refused(store, tmp_path):
    assert "tf32 is a mode of GPUs" in refused(store, tmp_path, "--precision", "tf32")


def test_a_missing_device_is_named(store, tmp_path):
    assert "no device 'cuda:7'" in refused(store, tmp_path, "--device", "cuda:7")
    assert "no device 'gpu'" in refused(store, tmp_path, "--device", "gpu")


def test_a_task_that_is_not_there_is_named(store, tmp_path):
    assert "reach" in refused(store, tmp_path, "--tasks", "raech")
    assert "has no task 'sweep-v3'" in refused(store, tmp_path, "--tasks", "sweep")


def test_a_damaged_store_is_named(tmp_path):
    store = make_store(tmp_path / "store", TASKS[:2])
    path = store.path / store.tasks[0] / "rewards.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "rewards.npy" in refused(store, tmp_path)


def test_a_directory_with_something_in_it_is_not_overwritten(store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        begin(store, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_presets_without_data_say_how_to_get_some():
    with pytest.raises(UserError, match="--data"):
        train.main(["--preset", "paper"])
    with pytest.raises(UserError, match="choose from quickstart"):
        train.main(["--preset", "papers"])


def test_settings_stay_as_they_were_when_a_run_goes_on(store, tmp_path):
    begin(store, tmp_path / "run")
    with pytest.raises(UserError, match=r"weight_decay cannot change from 0.0001 to 0.5"):
        train.main(["--resume", str(tmp_path / "run"), "--weight-decay", "0.5"])


def test_bad_settings_are_named_when_a_run_goes_on(store, tmp_path):
    begin(store, tmp_path / "run")
    for flag, value in (("keep-checkpoints", "-1"), ("log-every", "0"), ("checkpoint-every", "0")):
        with pytest.raises(UserError, match=f"{flag.replace('-', '_')} is {value}: give 1 or more"):
            train.main(["--resume", str(tmp_path / "run"), f"--{flag}", value])
    assert checkpoint_steps(RunDirectory(tmp_path / "run")) == [4, 8, 12]


def test_a_setting_of_another_algorithm_is_refused(store, tmp_path):
    with pytest.raises(
        UserError, match=r"--sparsity is not a setting of prompt-dt, but of harmodt-f"
    ):
        begin(store, tmp_path / "run", "--sparsity", "0.5", algorithm="prompt-dt")
    with pytest.raises(UserError, match="did you mean harmodt-f"):
        train.main(["--algorithm", "harmodtf"])


def test_training_does_not_import_the_simulator(store, tmp_path):
    """It takes seconds, and a machine that only trains may not have it."""
    program = (
        "import sys; from harmodt import train\n"
        "train.main(sys.argv[1:])\n"
        "sys.exit(' '.join({'mujoco', 'metaworld'} & sys.modules.keys()) or 0)"
    )
    arguments = ["--data", str(store.path), "--output", str(tmp_path / "run"), *small_flags()]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_a_checkpoint_of_another_size_is_refused(store, tmp_path):
    begin(store, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    config = run.read().config
    config["own"]["model"]["embed_dim"] = 64
    run.update({"config": config})
    with pytest.raises(UserError, match="of another model size"):
        train.main(["--resume", str(tmp_path / "run")])


def test_a_loss_that_becomes_nan_stops_the_run(store, tmp_path, monkeypatch):
    train_step = SequenceLearner.train_step

    def broken(learner, step):
        result = train_step(learner, step)
        if step == 7:
            result.losses[1] = np.nan
        return result

    monkeypatch.setattr(SequenceLearner, "train_step", broken)
    with pytest.raises(UserError) as error:
        begin(store, tmp_path / "run")
    message = str(error.value)
    assert "loss of step 7" in message and store.tasks[1] in message
    assert "checkpoints/00000004" in message
    assert checkpoint_steps(RunDirectory(tmp_path / "run")) == [4]


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "harmodt.train", "--data", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(tmp_path / "nothing") in result.stderr


ODD = os.fsdecode(b"a\xff\x1b[31m\xe2\x80\xae")
"""A name that is not UTF-8, colours what follows and turns its direction."""
SHOWN = r"a\udcff\x1b[31m\u202e"


@pytest.mark.parametrize("argument", [f"--{ODD}", ODD, f"--steps={ODD}", f"--precision={ODD}"])
def test_arguments_that_are_refused_are_shown_as_they_are(argument, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        train.main([argument])
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert SHOWN in error.replace(r"\\", "\\")
    assert error.replace("\n", "").isprintable()


def test_paths_that_are_not_utf_8(store, tmp_path, capsys):
    """Data may be there; TensorBoard, and so a run, may not."""
    data = Path(shutil.copytree(store.path, tmp_path / ODD / "store"))
    with pytest.raises(UserError, match=r"is not UTF-8.*: name another --output"):
        begin(store, tmp_path / ODD / "run")
    assert list((tmp_path / ODD).iterdir()) == [data]
    run = tmp_path / "run"
    begin(DataStore.open(data), run)
    train.main(["--resume", str(run)])
    assert json.loads((run / "run.json").read_text())["config"]["data"]["data"] == str(data)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--help"])
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert "udcff" in re.sub(r"\W", "", printed)  # lines break anywhere
    with pytest.raises(UserError, match=r"is not UTF-8.*: rename it"):
        train.main(["--resume", str(run.rename(tmp_path / ODD / "run"))])
    assert load_policy(tmp_path / ODD / "run").step == 12
