from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from harmodt.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from harmodt.errors import UserError, describe
from harmodt.rundir import RunDirectory


def description(**values):
    """What run.json needs."""
    known = {"id": "a", "tasks": ["reach-v3"], "environment": {}, "config": {}}
    return {**known, "store": "0", "conditioning": "0", **values}


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write(description())
    return directory


def save(run, step, size=4):
    save_checkpoint(run, step, {"w": torch.arange(float(size))})


def test_round_trip(run):
    save(run, 3)
    checkpoint = load_checkpoint(run)
    assert torch.equal(checkpoint.tensors["w"], torch.arange(4.0))
    assert checkpoint.step == 3


def test_the_last_checkpoint_is_the_default_and_others_can_be_named(run):
    for step in (5, 40, 300):
        save(run, step)
    assert load_checkpoint(run).step == 300
    assert load_checkpoint(run, 40).step == 40
    with pytest.raises(UserError, match="step 41: it has checkpoints of the steps 5, 40, 300"):
        load_checkpoint(run, 41)


def test_pruning_keeps_the_last_and_the_best(run):
    for step in range(1, 7):
        save(run, step)
    prune_checkpoints(run, keep=2, best=3)
    assert checkpoint_steps(run) == [3, 5, 6]


def test_a_kill_while_pruning_leaves_no_damaged_checkpoint(run, monkeypatch):
    for step in (1, 2):
        save(run, step)

    def killed(path, **_):
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(run, keep=1)
    for step in checkpoint_steps(run):
        load_checkpoint(run, step)
    prune_checkpoints(run, keep=1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["00000002"]


def test_a_failed_write_leaves_the_old_checkpoints_alone(run, monkeypatch):
    save(run, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        save(run, 2)
    assert checkpoint_steps(run) == [1]
    assert [path.name for path in run.checkpoints.iterdir()] == ["00000001"]


def test_what_a_kill_left_behind_is_no_checkpoint(run):
    save(run, 1)
    (run.checkpoints / ".00000002.tmp").mkdir()
    (run.checkpoints / ".00000002.tmp" / "state.json").write_text("{")
    assert checkpoint_steps(run) == [1]
    save(run, 2)
    assert checkpoint_steps(run) == [1, 2]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_named(run, name):
    save(run, 7)
    path = run.checkpoint(7) / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"00000007/{name} is damaged"):
        load_checkpoint(run)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_what_the_system_refuses_is_no_damage(run, monkeypatch, name, number):
    save(run, 7)
    really = os.open

    def refuse(path, *arguments, **options):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=name) as refused:
        load_checkpoint(run)
    sentence = describe(refused.value)
    assert sentence.startswith(str(run.checkpoint(7) / name))
    assert "damaged" not in sentence and "delete" not in sentence


def test_a_checkpoint_of_another_model_size_is_refused(run):
    save(run, 1, size=4)
    with pytest.raises(UserError, match=r"another model size: w should be \[5\].* \[4\]"):
        load_checkpoint(run).copy_to({"w": torch.zeros(5)})
    with pytest.raises(UserError, match="the checkpoint lacks it"):
        load_checkpoint(run).copy_to({"v": torch.zeros(4)})


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory(tmp_path).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "is of version 3, and this HarmoDT reads version 5: train the run again"),
        ({"format": "harmodt-store"}, "is not the description of a HarmoDT run"),
        ({"id": "b"}, "is damaged .its checksum fails"),
        ({"crc32": None}, "is damaged .its checksum fails"),
    ],
)
def test_a_run_of_another_kind_or_version_is_refused(run, change, message):
    before = json.loads(run.description.read_text())
    run.description.write_text(json.dumps({**before, **change}))
    with pytest.raises(UserError, match=message):
        run.read()


@pytest.mark.parametrize("change", [{"tasks": None}, {"tasks": [1]}, {"tasks": []}, {"id": 3}])
def test_a_description_that_says_nothing_is_refused(run, change):
    run.write(description(**change))
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        run.read()


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", ""])
def test_a_damaged_description_is_named(run, content):
    run.description.write_text(content)
    how = r"is damaged \(it is not JSON" if content in ("{", "") else "is not the description"
    with pytest.raises(UserError, match=rf"run\.json {how}"):
        run.read()
