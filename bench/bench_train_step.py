"""One optimiser step of the paper's model (d = 128): five tasks, eight windows each.

    pytest bench/bench_train_step.py --benchmark-only

The dense step, without masks, is the lower bound of what masking can cost; "reference" applies
the masks in plain PyTorch, "fused" inside kernels. A batch is drawn for every step, so that the
sampling beside it can be read as a share of the step. On a CPU `share_of_floor` compares a step
with the arithmetic of its masked linear layers alone, at the processor's measured peak.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from measuring import DEVICE, ON_GPU, fused, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from harmodt.algorithms import StepResult, preset
from harmodt.data.store import DataStore
from harmodt.draws import TRAIN, Draws
from harmodt.settings import change
from harmodt.training.trainer import Trainer
from harmodt_kernels.native import library

STEP = {"tasks_per_step": 5, "batch_per_task": 8}


def make_trainer(store: DataStore, path: str, **settings: Any) -> Trainer:
    """A trainer along a path; the benchmark is skipped if the device has no fused kernels."""
    if path == "fused":
        fused()
    algorithm = "prompt-dt" if path == "dense" else "harmodt-f"
    config = preset("paper", algorithm)
    config = change(config, {**STEP, "fused": path == "fused", **settings})
    return tiny.make_trainer(store, config, DEVICE)


class LinearArithmetic(TorchDispatchMode):
    """Adds up the floating-point operations of the masked linear layers' three products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("harmodt::")
        if name == "masked_linear":
            x, weight = args[:2]
            self.operations += 2 * x.numel() * len(weight)
        elif name == "masked_linear_input_gradient":
            dy, _, weight = args[:3]
            self.operations += 2 * dy.numel() * weight.shape[1]
        elif name == "masked_linear_group_gradients":
            dy, _, x = args[:3]
            self.operations += 2 * dy.numel() * x.shape[-1]
        return func(*args, **(kwargs or {}))


def linear_operations(trainer: Trainer) -> int:
    """Floating-point operations of the masked linear layers in a step, which it takes."""
    with LinearArithmetic() as arithmetic:
        trainer.train_step()
    return arithmetic.operations


def peak(precision: str) -> float:
    """Operations per second that this machine does now in registers, as the kernels multiply."""
    start = time.perf_counter()
    operations = library.library().harmodt_multiply_adds(
        100_000, precision == "bf16", library.threads()
    )
    return operations / (time.perf_counter() - start)


def note_arithmetic(benchmark: Any, trainer: Trainer, precision: str = "fp32") -> None:
    """Note the step's arithmetic at the machine's peak, as its floor; the benchmark has run."""
    if ON_GPU or benchmark.disabled:
        return
    peaks = statistics.median(peak(precision) for _ in range(20))
    floor = linear_operations(trainer) / peaks
    benchmark.extra_info["peak_flops"], benchmark.extra_info["floor_seconds"] = peaks, floor
    benchmark.extra_info["share_of_floor"] = floor / benchmark.stats.stats.median


@pytest.mark.benchmark(group="training step, d = 128, 5 tasks x 8 windows")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("path", ["dense", "reference", "fused"])
def bench_train_step(benchmark, store: DataStore, path: str, dropout: float) -> None:
    trainer = make_trainer(store, path, dropout=dropout)

    def step() -> StepResult:
        result = trainer.train_step()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    result = benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    assert torch.isfinite(result.losses).all()
    if path == "fused":
        note_arithmetic(benchmark, trainer)


@pytest.mark.benchmark(group="training step, d = 128, 5 tasks x 8 windows")
def bench_sampling(benchmark, store: DataStore) -> None:
    trainer = make_trainer(store, "reference")
    sample = trainer.learner.sampler.sample
    benchmark.pedantic(sample, args=(range(5), Draws(0, TRAIN, 0)), rounds=100, warmup_rounds=5)


@pytest.mark.benchmark(group="mask update, 5 tasks")
@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize("size", ["1.47M", "5.29M"])
@pytest.mark.parametrize("gradients", ["kept", "computed twice"])
def bench_mask_update(benchmark, store: DataStore, path: str, size: str, gradients: str) -> None:
    trainer = make_trainer(
        store, path, size=size, mask_update_gb=4.0 if gradients == "kept" else 0.0
    )
    trainer.step = trainer.setup.config.optimisation.steps // 2  # where the most weights move
    # It ends with a number on the CPU, so that a GPU has ended as well.
    update = benchmark.pedantic(trainer.before_step, rounds=5, warmup_rounds=1)
    assert update["moved_weights"] == 100
