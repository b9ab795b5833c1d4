"""What may happen to a run, and what must hold then: nothing lost, nothing silently wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damages import DAMAGES, cut, empty, gone, link_to_itself, link_to_nothing
from runs import assert_same, begin, final, play, small_flags
from safetensors.torch import load_file, save_file
from tiny import TASKS, make_store

from harmodt import load_policy, train
from harmodt.algorithms.harmodt import HarmoDTLearner
from harmodt.algorithms.sequence import SequenceLearner
from harmodt.checkpoint import checkpoint_steps, load_checkpoint, save_checkpoint
from harmodt.data.store import DataStore
from harmodt.errors import UserError, describe
from harmodt.files import checksum, owned
from harmodt.rundir import RunDirectory
from harmodt.training import trainer as module
from harmodt.training.metrics import Metrics
from harmodt.training.records import read_records
from harmodt.training.trainer import Trainer
from harmodt_kernels import NotFinite

EVALUATED = ("--evaluate-every", "4", "--evaluation-episodes", "1")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store", TASKS[:2])


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    begin(store, path)
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run of its own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def played(monkeypatch) -> list[int]:
    """The steps at which a run was evaluated, by a sum over its weights."""
    steps = []

    def counted(policy, request, console):
        steps.append(policy.step)
        return play(policy, request, console)

    monkeypatch.setattr(module, "play", counted)
    return steps


def resume(run: Path, *more: str) -> None:
    train.main(["--resume", str(run), *more])


def refused(run: Path, *more: str) -> str:
    """The message with which a run does not go on."""
    with pytest.raises(UserError) as error:
        resume(run, *more)
    return str(error.value)


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` after a training step."""
    train_step = Trainer.train_step

    def wrapped(trainer):
        result = train_step(trainer)
        if trainer.step == step:
            act()
        return result

    monkeypatch.setattr(Trainer, "train_step", wrapped)


def stopped(store: DataStore, run: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as end:
        begin(store, run, *more)
    return end.value.code


# Ends before the last step


@pytest.mark.parametrize("step", [8, 12])
def test_an_evaluation_that_was_due_at_a_kill_is_made_up_for(
    store, tmp_path, monkeypatch, played, step
):
    begin(store, tmp_path / "whole", *EVALUATED)
    assert played == [4, 8, 12]
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(store, tmp_path / "cut", *EVALUATED) == 128 + signal.SIGTERM
    resume(tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_an_evaluation_ends_it_and_it_is_repeated(
    store, tmp_path, monkeypatch, played, number
):
    begin(store, tmp_path / "whole", *EVALUATED)

    def interrupted(policy, request, console):
        if policy.step == 8 and number not in sent:
            sent.append(number)
            os.kill(os.getpid(), number)
            raise AssertionError("the evaluation goes on")
        return play(policy, request, console)

    sent = []
    monkeypatch.setattr(module, "play", interrupted)
    assert stopped(store, tmp_path / "cut", *EVALUATED) == 128 + number
    assert checkpoint_steps(RunDirectory(tmp_path / "cut")) == [4, 8]
    resume(tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_second_ctrl_c_loses_nothing(store, tmp_path, monkeypatch):
    def interrupted(run, step, tensors):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        save_checkpoint(run, step, tensors)

    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(module, "save_checkpoint", interrupted)
    assert stopped(store, tmp_path / "run") == 128 + signal.SIGINT
    assert checkpoint_steps(RunDirectory(tmp_path / "run")) == [4, 6]


def test_nohup_is_heeded(store, tmp_path, monkeypatch):
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        begin(store, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint_steps(RunDirectory(tmp_path / "run"))[-1] == 12


def test_a_closed_output_saves_and_ends(store, tmp_path):
    """As with `| head -2`: the steps so far are in a checkpoint, and the run goes on from it."""
    more = ["--steps", "4000", "--checkpoint-every", "4000", "--log-every", "1"]
    command = [sys.executable, "-m", "harmodt.train", "--data", str(store.path), "--output"]
    with subprocess.Popen(
        [*command, str(tmp_path / "run"), *small_flags(), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.stdout.close()
        message = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    (step,) = checkpoint_steps(RunDirectory(tmp_path / "run"))
    assert 0 < step < 4000
    assert message.startswith(f"stopped by SIGPIPE after step {step}; go on with: python -m")


def test_after_a_full_disk_the_sentence_works_as_typed(store, tmp_path, monkeypatch):
    begin(store, tmp_path / "whole")

    def full(run, step, tensors):
        if step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.checkpoint(step)))
        save_checkpoint(run, step, tensors)

    with monkeypatch.context() as context:
        context.setattr(module, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space") as error:
            begin(store, tmp_path / "cut")
    sentence = describe(error.value)
    run = tmp_path / "cut"
    assert sentence == (
        f"{run}/checkpoints/00000008: the disk is full: free some space, then go on with: "
        f"python -m harmodt.train --resume {run}"
    )
    resume(run)
    assert_same(tmp_path / "whole", run)


# One command at a time


def test_a_run_that_is_in_use_is_left_alone(store, run):
    before = sorted(run.rglob("*"))
    with owned(run):
        assert f"is in use by another command, process {os.getpid()}" in refused(run)
        with pytest.raises(UserError, match="is in use"):
            begin(store, run)
    assert sorted(run.rglob("*")) == before


def test_a_wrong_path_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis").mkdir()
    for path in (tmp_path / "thesis", tmp_path / "nothing", tmp_path / "nothing" / "below"):
        assert "holds no run" in refused(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis"]


# Data


def test_other_data_are_refused(store, run, tmp_path):
    other = make_store(tmp_path / "other", TASKS[:2], seed=1)
    assert "is not the one that the run" in refused(run, "--data", str(other.path))


def test_data_that_moved_are_found(store, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(store.path, home / "store")
    monkeypatch.chdir(home)
    begin(DataStore.open(Path("store")), Path("run"))
    monkeypatch.chdir(tmp_path)
    resume(Path("home/run"))
    (home / "store").rename(tmp_path / "moved")
    assert "--data" in refused(home / "run")
    resume(home / "run", "--data", "moved")
    resume(home / "run")


# Settings


def test_a_run_beyond_its_last_step_ends(run):
    directory = RunDirectory(run)
    config = directory.read().config
    config["optimisation"]["steps"] = 10
    directory.update({"config": config})
    assert "is of step 12, but its run.json asks for 10 steps" in refused(run)


def test_after_a_loss_that_is_nan_the_sentence_works_as_typed(store, tmp_path, monkeypatch):
    train_step = SequenceLearner.train_step

    def broken(learner, step):
        result = train_step(learner, step)
        if step == 7 and learner.setup.config.optimisation.learning_rate == 0.001:
            result.losses[1] = np.nan
        return result

    monkeypatch.setattr(SequenceLearner, "train_step", broken)
    with pytest.raises(UserError) as error:
        begin(store, tmp_path / "a run")
    command = f"--resume '{tmp_path}/a run' --learning-rate 0.00033"
    assert str(error.value).endswith(f"python -m harmodt.train {command}")
    resume(tmp_path / "a run", "--learning-rate", "0.00033")
    description = RunDirectory(tmp_path / "a run").read()
    assert description.config["optimisation"]["learning_rate"] == 0.00033
    change = {"step": 4, "setting": "learning_rate", "from": 0.001, "to": 0.00033}
    assert description.changes == (change,)
    resume(tmp_path / "a run")
    assert RunDirectory(tmp_path / "a run").read() == description


def test_a_first_loss_that_is_nan_is_laid_to_the_data(store, tmp_path, monkeypatch):
    def broken(learner, step):
        result = train_step(learner, step)
        result.losses[1] = np.nan
        return result

    train_step = SequenceLearner.train_step
    monkeypatch.setattr(SequenceLearner, "train_step", broken)
    with pytest.raises(UserError, match=r"before any weight was changed: look at the data with"):
        begin(store, tmp_path / "run")


def test_weights_that_are_nan_are_not_saved(store, tmp_path, monkeypatch):
    """The loss is that of the weights before a step, and shows them a step late."""

    def broken(learner, step):
        result = train_step(learner, step)
        if step == 8:
            learner.vector.weights[0] = np.inf
        return result

    train_step = SequenceLearner.train_step
    monkeypatch.setattr(SequenceLearner, "train_step", broken)
    with pytest.raises(UserError, match="after step 8 is NaN or infinite"):
        begin(store, tmp_path / "run")
    assert checkpoint_steps(RunDirectory(tmp_path / "run")) == [4]


def update_fails(monkeypatch, step: int, error: Exception) -> None:
    """Let the mask update after a step raise an error."""
    update_masks = HarmoDTLearner.update_masks

    def failing(learner, now):
        if now == step:
            raise error
        return update_masks(learner, now)

    monkeypatch.setattr(HarmoDTLearner, "update_masks", failing)


@pytest.mark.parametrize("step", [0, 4])
def test_a_gradient_of_a_mask_update_that_is_nan_is_named(store, tmp_path, monkeypatch, step):
    update_fails(monkeypatch, step, NotFinite(1, "its dense gradient holds NaN or infinity"))
    with pytest.raises(UserError) as error:
        begin(store, tmp_path / "run")
    start = f"after step {step}, task {TASKS[1]}: its dense gradient holds NaN or infinity"
    way_on = f"--resume {tmp_path}/run --learning-rate 0.00033"
    ends = {0: f"python -m harmodt.data info {store.path}", 4: way_on}
    assert str(error.value).startswith(start) and str(error.value).endswith(ends[step])


def test_a_nan_that_a_loss_shows_first_is_laid_to_the_loss(store, tmp_path, monkeypatch):
    def broken(learner, step):
        result = train_step(learner, step)
        if step == 4:
            result.losses[1] = np.nan
        return result

    train_step = SequenceLearner.train_step
    monkeypatch.setattr(SequenceLearner, "train_step", broken)
    update_fails(monkeypatch, 4, NotFinite(0, "its masked gradient holds NaN or infinity"))
    with pytest.raises(UserError, match=f"the loss of step 4, task {TASKS[1]}, is NaN"):
        begin(store, tmp_path / "run", "--log-every", "99", "--checkpoint-every", "99")


def test_another_error_of_a_mask_update_is_no_nan(store, tmp_path, monkeypatch):
    """An error of the program keeps its traceback, and a sentence stays as it is."""
    mistake = ValueError("operands could not be broadcast together")
    update_fails(monkeypatch, 4, mistake)
    with pytest.raises(ValueError, match="operands") as error:
        begin(store, tmp_path / "run")
    assert error.value is mistake and describe(mistake) is None
    sentence = UserError("the mask update after step 4 cannot score the weights: begin a new run")
    update_fails(monkeypatch, 4, sentence)
    with pytest.raises(UserError) as refused:
        begin(store, tmp_path / "other")
    assert refused.value is sentence


# What was written


FILES = {
    "run.json": "run.json",
    "conditioning.safetensors": "conditioning.safetensors",
    "checkpoints/00000012/state.json": "00000012",
    "checkpoints/00000012/state.safetensors": "00000012",
    "metrics.jsonl": "metrics.jsonl",
}


# Of metrics these are what a kill may leave.
BY_A_KILL = (cut, empty, gone, link_to_nothing)


# A link in a circle is the system's to refuse: faults.py has it, as the command words it.
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (name, damage)
        for name in FILES
        for damage in DAMAGES
        if damage != link_to_itself and not (name == "metrics.jsonl" and damage in BY_A_KILL)
    ],
)
def test_a_damaged_file_is_named(run, name, fault):
    fault(run / name)
    kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    message = refused(run)
    assert FILES[name] in message or (fault is gone and "holds no run" in message)
    assert "\n" not in message
    if name != "metrics.jsonl":
        with pytest.raises(UserError):
            load_policy(run)
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize("fault", BY_A_KILL)
def test_a_run_goes_on_without_metrics_that_a_kill_took(run, fault):
    whole = read_records(run / "metrics.jsonl", timed=False)
    weights = final(run)
    fault(run / "metrics.jsonl")
    resume(run)
    left = read_records(run / "metrics.jsonl", timed=False)
    assert left == (whole[:-1] if fault is cut else [])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final(run).items())
    assert load_policy(run).step == 12


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"step": 3', b'"step": 2'),
        (b'"gradient_norm": ', b'"gradient_norm": 1'),
        (b', "crc32": "', b', "crc": "'),
        (b'"}\n{', b'"}\n{}\n{'),
        (b'"}\n{', b'"}{'),
        (b'"}\n{', b'"}\r\n{'),
    ],
)
def test_a_line_of_metrics_that_is_another_is_named(run, old, new):
    path = RunDirectory(run).metrics
    content = path.read_bytes()
    assert json.loads(content.splitlines()[-1])["step"] == 12
    path.write_bytes(content.replace(old, new, 1))
    message = refused(run)
    assert message.startswith("line ") and message.endswith(
        f"of {path} is damaged (its checksum fails): delete that line, or restore the file from "
        "a copy"
    )
    assert path.read_bytes() == content.replace(old, new, 1)


def test_a_gradient_whose_norm_overflows_is_no_damage(run):
    path = RunDirectory(run).metrics
    with contextlib.closing(Metrics(RunDirectory(run), 12)) as metrics:
        metrics.write(12, {"gradient_norm": float("inf")})
    content = path.read_bytes()
    resume(run)
    assert b"Infinity" in content and path.read_bytes() == content


def test_what_a_kill_cut_short_is_no_damage(run):
    path = RunDirectory(run).metrics
    content = path.read_bytes()
    whole = content[: content.rindex(b"\n", 0, -1) + 1]
    for size in (1, 9, len(content) - len(whole) - 1):
        path.write_bytes(content[:-size])
        resume(run)
        assert path.read_bytes() == whole


def test_a_checkpoint_of_another_run_is_refused(store, run, tmp_path):
    begin(store, tmp_path / "other", "--seed", "1")
    name = "checkpoints/00000012"
    shutil.rmtree(run / name)
    shutil.copytree(tmp_path / "other" / name, run / name)
    assert "00000012 is of another run" in refused(run)
    shutil.copy(tmp_path / "other" / "conditioning.safetensors", run)
    assert "conditioning.safetensors is damaged (its checksum fails)" in refused(run)


def test_a_checkpoint_of_another_step_or_version_is_refused(run):
    directory = RunDirectory(run)
    shutil.copytree(directory.checkpoint(12), directory.checkpoint(16))
    assert "state.json is of step 12" in refused(run)
    shutil.rmtree(directory.checkpoint(16))
    state = directory.checkpoint(12) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "version": 2}))
    assert "is of version 2, and this HarmoDT reads version 3" in refused(run)


def as_integers(tensors):
    tensors["model.action_head.bias"] = tensors["model.action_head.bias"].int()


def not_finite(tensors):
    tensors["optimizer.first_moment"][3] = np.nan


def all_zero(tensors):
    tensors["masks"].zero_()


def one_more(tensors):
    bits = tensors["masks"]
    bits[0, int((bits[0] != -1).int().argmax())] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_integers, "is torch.int32, not torch.float32"),
        (not_finite, "optimizer.first_moment has numbers that are NaN"),
        (all_zero, "has 0 active weights and began with"),
        (one_more, "active weights and began with"),
        (lambda tensors: tensors.pop("optimizer.first_moment"), "the checkpoint lacks it"),
    ],
)
def test_tensors_that_cannot_be_the_runs_are_refused(run, change, message):
    """Even where the checksum is that of the file."""
    folder = RunDirectory(run).checkpoint(12)
    tensors = load_file(folder / "state.safetensors")
    change(tensors)
    save_file(tensors, folder / "state.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["crc32"] = checksum((folder / "state.safetensors").read_bytes())
    (folder / "state.json").write_text(json.dumps(state))
    assert message in refused(run)


def test_as_many_numbers_of_active_weights_as_tasks(run):
    directory = RunDirectory(run)
    directory.update({"active_weights": [directory.read().active_weights[0]]})
    assert "is damaged (active_weights and tasks have different lengths)" in refused(run)


def test_masks_keep_their_density(run):
    """What a checkpoint is refused for does not happen by itself."""
    before = RunDirectory(run).read().active_weights
    bits = final(run)["masks"].numpy().view(np.uint8)
    assert np.unpackbits(bits, axis=1).sum(1).tolist() == list(before)


# Pruning


def test_pruning_touches_nothing_of_others(store, run):
    directory = RunDirectory(run)
    folder = directory.checkpoints
    (folder / ".mine").mkdir()
    (folder / ".mine" / "thesis.tex").touch()
    for name in (".nfs0001", ".DS_Store", "\u00b2", "00000001", "3", ".00000003.tmp.old"):
        (folder / name).touch()
    (folder / "00000002").mkdir()
    (folder / "00000002" / "notes").touch()
    (folder / "link").symlink_to(folder / ".mine")
    for name in ("copy of 8", "00000008.old", "8"):
        shutil.copytree(directory.checkpoint(8), folder / name)
    (folder / ".00000005.tmp").symlink_to(folder / ".mine")
    (folder / "00000003").symlink_to(directory.checkpoint(4))
    (directory.checkpoint(4) / "notes").touch()
    before = set(folder.rglob("*"))
    (folder / ".00000012.tmp").mkdir()
    (folder / ".00000008.deleted").mkdir()
    module.prune_checkpoints(directory, 1)
    assert before - set(folder.rglob("*")) == {
        directory.checkpoint(8),
        directory.checkpoint(8) / "state.json",
        directory.checkpoint(8) / "state.safetensors",
    }
    assert not (folder / ".00000012.tmp").exists() and not (folder / ".00000008.deleted").exists()


def test_what_is_in_the_way_of_a_checkpoint_stays(run):
    directory = RunDirectory(run)
    directory.checkpoint(16).mkdir()
    (directory.checkpoint(16) / "thesis.tex").touch()
    with pytest.raises(UserError, match="00000016 is in the way"):
        save_checkpoint(directory, 16, {"w": torch.zeros(1)})
    assert (directory.checkpoint(16) / "thesis.tex").exists()
    assert load_checkpoint(directory).step == 12
