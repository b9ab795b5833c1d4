from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import configure, make_store

from harmodt import evaluate as module
from harmodt import sealed
from harmodt.checkpoint import save_checkpoint
from harmodt.errors import run_command
from harmodt.results import EvaluationResult
from harmodt.rollout import make_protocol
from harmodt.training.run import begin
from harmodt_kernels.native import library

TASKS = ("reach-v3", "button-press-topdown-v3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained, tiny model, in plain PyTorch and bf16."""
    folder = tmp_path_factory.mktemp("run")
    store = make_store(folder / "store", TASKS)
    sizes = {"embed_dim": 8, "layers": 1, "heads": 1, "target_return": 100.0}
    config = configure(precision="bf16", **sizes)
    run = begin(folder / "run", "quickstart", config, store, TASKS)
    for step in (20, 40):
        save_checkpoint(run.directory, step, run.learner.tensors())
    return run.directory.path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    run_command(module.main)


def test_command_line_end_to_end(run, monkeypatch, capsys):
    command(monkeypatch, run, "--episodes", 2, "--tasks", "reach-v2", "--checkpoint", 20)
    captured = capsys.readouterr()
    assert "reach-v3" in captured.out and "average" in captured.out
    assert "30/30 steps" in captured.out  # the longest episode of the store
    assert len(list((run / "evaluation").iterdir())) == 2
    (path,) = (run / "evaluation").glob("step-20-any-1x2-*.json")
    assert str(path) in captured.out
    first = EvaluationResult.load(path)
    assert first.protocol.target_returns == (100.0,)
    assert first.protocol.environment.episode_length == 30
    command(monkeypatch, run, "--episodes", 2, "--tasks", "reach-v2", "--checkpoint", 20)
    again = EvaluationResult.load(path)
    np.testing.assert_array_equal(again.returns, first.returns)


class Stop(BaseException):
    """Raised in the place of the episodes."""


@pytest.fixture
def played(monkeypatch):
    """Calls of `play`, which plays nothing."""
    calls = []

    def play(policy, request, **options):
        calls.append((policy, request, options))
        raise Stop

    monkeypatch.setattr(module, "play", play)
    return calls


@pytest.fixture
def loaded(monkeypatch):
    """What `load_policy` was asked for."""
    calls = []
    monkeypatch.setattr(module, "load_policy", lambda *_, **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"device": None, "fused": None, "precision": None}),
        (["--fused"], {"device": None, "fused": True, "precision": None}),
        (["--no-fused"], {"device": None, "fused": False, "precision": None}),
        (
            ["--device", "cuda", "--precision", "bf16"],
            {"device": "cuda", "fused": None, "precision": "bf16"},
        ),
        (
            ["--sampler", "ddim", "--sampling-steps", "3"],
            {"device": None, "fused": None, "precision": None}
            | {"sampler": "ddim", "sampling_steps": 3},
        ),
    ],
)
def test_what_is_not_said_follows_the_run(run, monkeypatch, played, loaded, arguments, options):
    with pytest.raises(Stop):
        command(monkeypatch, run, *arguments)
    assert loaded == [{"unseen": None, "sampler": None, "sampling_steps": None} | options]


def test_a_run_is_evaluated_as_it_was_trained(run, monkeypatch, played):
    with pytest.raises(Stop):
        command(monkeypatch, run)
    policy, request, _ = played[0]
    assert (policy.backend, policy.precision, policy.device) == ("pytorch", "bf16", "cpu")
    assert (policy.step, policy.mask, request.tasks) == (40, "task", ())
    assert request.episode_length == 30


def test_a_run_of_an_earlier_version_is_played_as_long_as_the_family_says(
    run, monkeypatch, played, tmp_path
):
    run = Path(shutil.copytree(run, tmp_path / "run"))
    description = json.loads((run / "run.json").read_text())
    assert description.pop("episode_length") == 30
    del description["crc32"]
    sealed.write(run / "run.json", description)
    with pytest.raises(Stop):
        command(monkeypatch, run)
    assert played[0][1].episode_length is None


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_played(
    run, monkeypatch, played, capsys, tmp_path
):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run, "--output", tmp_path / "file" / "results")
    assert exit.value.code == 2 and played == []
    assert capsys.readouterr().err.endswith(
        "then give the same command again, or name another --output\n"
    )
    with pytest.raises(Stop):
        command(monkeypatch, run, "--output", tmp_path / "a" / "b")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_that_cannot_be_written_is_shown(run, monkeypatch, capsys, tmp_path):
    run = Path(shutil.copytree(run, tmp_path / "run", ignore=lambda *_: ["evaluation"]))

    def play(policy, request, **options):
        protocol = make_protocol(policy, request)
        shape = (len(protocol.tasks), protocol.episodes)
        return EvaluationResult(protocol, np.ones(shape, bool), np.ones(shape), 1.0, {})

    def save(result, directory):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(module, "play", play)
    command(monkeypatch, run, "--output", tmp_path / "here")
    assert sorted(path.suffix for path in (tmp_path / "here").iterdir()) == [".csv", ".json"]
    assert not (run / "evaluation").exists()
    assert f"written to {tmp_path / 'here'}" in "".join(capsys.readouterr().out.split("\n"))
    monkeypatch.setattr(EvaluationResult, "save", save)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run)
    shown, error = capsys.readouterr()
    assert exit.value.code == 2 and "50/50" in shown and "average" in shown
    assert "the disk is full" in error
    assert error.endswith("give the same command again, or name another --output\n")


def test_settings_of_the_command_are_those_of_the_request(run, monkeypatch, played):
    arguments = [
        "--episodes", 3, "--tasks", "reach", "mt5", "--success", "last", "--seed", 4,
        "--goal-seed", 5, "--target-return", 6.5, "--environments", 7, "--workers", 8,
        "--episode-length", 9,
        "--mask", "voted", "--precision", "fp32",
    ]  # fmt: skip
    with pytest.raises(Stop):
        command(monkeypatch, run, *arguments)
    policy, request, options = played[0]
    assert request == module.Request(3, ("reach", "mt5"), "last", 4, 5, 6.5, 7, 8, 9)
    assert (policy.mask, policy.precision) == ("voted", "fp32")
    assert options["video_directory"] is None


def test_help_groups_the_settings(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--help")
    text = capsys.readouterr().out
    marks = [
        "episodes options", "--success {any,last}", "--goal-seed", "policy options", "--precision",
        "kernels, by default the run's", "--fused", "--no-fused",
    ]  # fmt: skip
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "30"], "no checkpoint of step 30.*20, 40"),
        (["--tasks", "button-pres"], "no task 'button-pres'.*button-press-v3"),
        (["--tasks", "push"], "not trained on push-v3.*reach-v3, button-press-topdown-v3"),
        (["--device", "cuda:77"], "cuda:77.*cpu"),
        (["--device", "abacus"], "abacus.*cpu"),
        (["--precision", "tf32"], "tf32.*GPU"),
        (["--sampler", "ddpm"], "draws no plans: leave --sampler and --sampling-steps out"),
        (["--sampling-steps", "0"], "sampling_steps is 0: give 1 or more"),
        (["--sampler", "ddpm", "--sampling-steps", "3"], "all steps .*: leave sampling_steps out"),
        (["--episode-length", "501"], "episode_length is 501: give 1 to 500"),
        (["--episodes", "0"], "episodes is 0: give 1 or more"),
        (["--workers", "0"], "workers is 0"),
        (["--environments", "0"], "environments is 0"),
        (["--seed", str(2**32)], "seed is 4294967296: give 0 to 4294967295"),
        (["--goal-seed", "-1"], "goal_seed is -1"),
        (["--fused"], "--fused: the CPU kernels were not built.*--no-fused"),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(run, monkeypatch, capsys, arguments, says):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", run / "libharmodt.so")
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run, *arguments)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(says, captured.err)
    assert sorted(run.rglob("*")) == before


def test_fused_and_not_fused_exclude_one_another(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run, "--fused", "--no-fused")
    assert exit.value.code == 2
    assert "not allowed together" in "".join(capsys.readouterr())


def test_arguments_that_are_refused_are_shown_as_they_are(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run, "--mask", os.fsdecode(b"\xff\x1b[31m"))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.replace("\n", "").isprintable()
    assert r"\x1b[31m" in error


def test_a_run_that_is_not_there(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "harmodt.evaluate", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "nowhere" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "nowhere").exists()
