"""Runs of a few steps through the command line of training, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from harmodt import train
from harmodt.algorithms import preset
from harmodt.checkpoint import load_checkpoint
from harmodt.data.store import DataStore
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


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(RunDirectory(run)).tensors


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended in the same weights, masks and moments, bit for bit, and the same metrics."""
    for name, tensor in final(a).items():
        assert torch.equal(tensor, final(b)[name]), name
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
