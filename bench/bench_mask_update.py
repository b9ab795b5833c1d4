"""Times a mask update, and compares one selection for all tasks with one per task.

    pytest bench/bench_mask_update.py --benchmark-only

An update runs two forward and backward passes for every task, then the selection.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_harmony_selection import WEIGHTS, Problem
from bench_train_step import note_graphs
from measuring import fused, measure_in_turn
from paths import make_trainer

from harmodt.data.store import DataStore


@pytest.mark.benchmark(group="mask update, 5 tasks")
@pytest.mark.parametrize("size", ["1.47M", "5.29M"])
@pytest.mark.parametrize("gradients", ["kept", "computed twice"])
def bench_mask_update(benchmark: Any, store: DataStore, gradients: str, size: str) -> None:
    settings = {"size": size, "mask_update_gb": 4.0 if gradients == "kept" else 0.0}
    settings |= {"layers": 1, "batch_per_task": 1} if benchmark.disabled else {}
    trainers = {path: make_trainer(store, path, **settings) for path in ("fused", "reference")}
    for trainer in trainers.values():
        trainer.step = trainer.setup.config.optimisation.steps // 2  # where the most weights move
        assert trainer.before_step()["moved_weights"] == 100
    updates = {path: trainer.before_step for path, trainer in trainers.items()}
    measure_in_turn(benchmark, updates, seconds=2.0)
    if not benchmark.disabled:
        note_graphs(benchmark, trainers)


@pytest.mark.benchmark(group="harmony selection: one call of all tasks, or one of each")
@pytest.mark.parametrize("tasks", [5, 50])
def bench_selection_calls(benchmark: Any, tasks: int) -> None:
    problem = Problem.random(tasks, 32 * 1024 if benchmark.disabled else WEIGHTS[128])
    problems = [_only(problem, task) for task in range(tasks)]
    select = fused().select_harmony
    together = problem.select(select)
    one_by_one = zip(*(single.select(select) for single in problems), strict=True)
    for field, rows in zip(together, one_by_one, strict=True):
        assert torch.equal(field, torch.cat(rows))
    calls = {
        "fused": lambda: problem.select(select),
        "a call per task": lambda: [single.select(select) for single in problems],
    }
    measure_in_turn(benchmark, calls, seconds=1.0)


def _only(problem: Problem, task: int) -> Problem:
    """The selection of one task."""
    rows = slice(task, task + 1)
    return Problem(
        problem.mask_bits[rows],
        problem.maskable_bits,
        problem.weights,
        problem.masked_gradients[rows],
        problem.dense_gradients[rows],
        problem.mean_gradient,
        problem.losses[rows],
    )
