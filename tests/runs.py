"""Runs of a few steps through the command line of training, for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from harmodt import train
from harmodt.algorithms import preset
from harmodt.checkpoint import checkpoint_steps, load_checkpoint
from harmodt.data.store import DataStore
from harmodt.results import EvaluationResult
from harmodt.rollout import make_protocol
from harmodt.rundir import RunDirectory
from harmodt.settings import settings

SMALL = {
    "embed-dim": 32, "layers": 1, "heads": 2, "steps": 12, "tasks-per-step": 2, "batch-per-task": 2,
    "context-length": 4, "prompt-length": 2, "mask-update-every": 4, "dropout": 0.1, "log-every": 3,
    "checkpoint-every": 4, "evaluation-episodes": 0,
}  # fmt: skip


def small_flags(algorithm: str = "harmodt-f") -> list[str]:
    """The settings of a small run, as far as an algorithm has them."""
    known = {name.replace("_", "-") for name, _ in settings(preset("quickstart", algorithm))}
    flags = [text for n, v in SMALL.items() if n in known for text in (f"--{n}", str(v))]
    return ["--algorithm", algorithm, "--no-fused", "--device", "cpu", *flags]


def begin(store: DataStore, output: Path, *more: str, algorithm: str = "harmodt-f") -> None:
    flags = small_flags(algorithm)
    train.main(["--data", str(store.path), "--output", str(output), *flags, *more])


def play(policy, request, console):
    """In place of an evaluation in environments: a sum over the weights is every return."""
    protocol = make_protocol(policy, request)
    score = float(policy.model.vector.weights.double().sum())
    returns = np.full((len(protocol.tasks), protocol.episodes), score)
    return EvaluationResult(protocol, returns > np.inf, returns, 1.0, {})


def cut(run: Path, step: int) -> Path:
    """Delete the checkpoints after a step, as if the run had been killed then; returns the run."""
    for later in checkpoint_steps(RunDirectory(run)):
        if later > step:
            shutil.rmtree(RunDirectory(run).checkpoint(later))
    return run


def ended_process() -> int:
    """The id of a process that was, and is no more."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(RunDirectory(run)).tensors


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended in the same weights, masks and moments, metrics and evaluations."""
    for name, tensor in final(a).items():
        assert torch.equal(tensor, final(b)[name]), name
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert _evaluations(a) == _evaluations(b)


def _evaluations(run: Path) -> dict[str, list]:
    files = sorted((run / "evaluation").glob("*.json"))
    return {path.name: EvaluationResult.load(path).returns.tolist() for path in files}
