"""Compares the time of gradient surgery in a training step with the time of learned masks.

    pytest bench/bench_surgery.py --benchmark-only

All steps use the kernels. "fused" is a step of Prompt-DT. The others are the same step with each
surgery, a step of HarmoDT-F, and an update of its masks. Surgery is compared with a step of
HarmoDT-F plus the step's share of a mask update: one update per 100 steps (the quickstart) or per
5000 steps (the paper).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_train_step import SMALL, note_graphs
from measuring import DEVICE, ON_GPU, assert_agree, fused, measure_in_turn, tiny
from paths import STEP, make_trainer

from harmodt.algorithms import preset
from harmodt.data.store import DataStore
from harmodt.settings import change
from harmodt.training.trainer import Trainer

# Rounding changes the sign that GradDrop draws for a few weights.
TOLERANCE = {"pcgrad": 1e-3, "cagrad": 1e-3, "graddrop": 0.05}
SECONDS = 10.0
UPDATES = (100, 5000)


def make_prompt_dt(store: DataStore, surgery: str, on_kernels: bool, **settings: Any) -> Trainer:
    """A trainer of Prompt-DT with a kind of surgery, by the kernels or by plain PyTorch."""
    config = change(preset("paper", "prompt-dt"), {**STEP, "surgery": surgery, **settings})
    config = change(config, {"fused": on_kernels, "graph": not ON_GPU})
    return tiny.make_trainer(store, config, DEVICE)


@pytest.mark.benchmark(group="training step with surgery or learned masks, d = 128, dropout 0.1")
@pytest.mark.parametrize("tasks", [5, 50])
def bench_surgery(benchmark: Any, store: DataStore, store_mt50: DataStore, tasks: int) -> None:
    fused()  # skips the benchmark if there are no fused kernels
    data = store if tasks == 5 else store_mt50
    check_agreement(store)
    settings: dict[str, Any] = {"tasks_per_step": tasks}
    settings |= {"batch_per_task": 1, "layers": 1} if benchmark.disabled else {}
    trainers = {
        name: make_prompt_dt(data, surgery, True, **settings)
        for name, surgery in (("fused", "none"), *zip(TOLERANCE, TOLERANCE, strict=True))
    }
    trainers["HarmoDT-F"] = masked = make_trainer(data, "fused", **settings)
    middle = masked.setup.config.optimisation.steps // 2  # the step at which the most weights move
    calls: dict[str, Callable[[], Any]] = {n: t.train_step for n, t in trainers.items()}
    calls["a mask update"] = lambda: masked.learner.before_step(middle)
    assert masked.learner.before_step(middle)["moved_weights"] == 100
    measure_in_turn(benchmark, calls, SECONDS)
    if not benchmark.disabled:
        note_graphs(benchmark, {**trainers, "a mask update": masked})
        beside = benchmark.extra_info["beside"]
        step, update = (beside[name]["median"] for name in ("HarmoDT-F", "a mask update"))
        for every in UPDATES:
            beside[f"HarmoDT-F, updated every {every}"] = {"median": step + update / every}


def check_agreement(store: DataStore) -> None:
    """Assert that the kernels and plain PyTorch compute the same gradient."""
    for surgery, tolerance in TOLERANCE.items():
        gradients = (_gradient(store, surgery, on_kernels) for on_kernels in (True, False))
        assert_agree(*gradients, tolerance)


def _gradient(store: DataStore, surgery: str, on_kernels: bool) -> torch.Tensor:
    """The gradient of a small model's first step."""
    trainer = make_prompt_dt(store, surgery, on_kernels, **SMALL)
    trainer.train_step()
    return trainer.learner.vector.gradient
