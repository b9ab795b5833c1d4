"""One optimiser step of the paper's model (d = 128): five tasks, eight windows each.

    pytest bench/bench_train_step.py --benchmark-only

The dense step, without masks, is the lower bound of what masking can cost. A batch is drawn for
every step, so that the sampling beside it can be read as a share of the step.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from harmodt.conditioning import TaskConditioning
from harmodt.config import PRESETS, TrainConfig
from harmodt.store import DataStore
from harmodt.trainer import Trainer

STEP = dataclasses.replace(PRESETS["paper"], tasks_per_step=5, batch_per_task=8)


def make_trainer(store: DataStore, config: TrainConfig) -> Trainer:
    data = [store.task(name) for name in store.tasks]
    conditioning = [TaskConditioning.from_data(task, config) for task in data]
    return Trainer(config, data, conditioning, torch.device("cpu"))


@pytest.mark.benchmark(group="training step, d = 128, 5 tasks x 8 windows")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("path", ["dense (no masks)", "reference"])
def bench_train_step(benchmark, store: DataStore, path: str, dropout: float) -> None:
    algorithm = "harmodt-f" if path == "reference" else "prompt-dt"
    trainer = make_trainer(store, dataclasses.replace(STEP, algorithm=algorithm, dropout=dropout))
    result = benchmark.pedantic(trainer.train_step, rounds=20, warmup_rounds=3)
    assert torch.isfinite(result.losses).all()


@pytest.mark.benchmark(group="training step, d = 128, 5 tasks x 8 windows")
def bench_sampling(benchmark, store: DataStore) -> None:
    trainer = make_trainer(store, STEP)
    rng = np.random.default_rng(0)
    benchmark.pedantic(trainer.sampler.sample, args=(range(5), rng), rounds=100, warmup_rounds=5)


@pytest.mark.benchmark(group="mask update, d = 128, 5 tasks")
def bench_mask_update(benchmark, store: DataStore) -> None:
    trainer = make_trainer(store, STEP)
    trainer.step = STEP.steps // 2  # where the most weights move
    update = benchmark.pedantic(trainer.update_masks, rounds=5, warmup_rounds=1)
    assert update.moved.tolist() == [STEP.eta_max] * 5
