"""Estimates how long runs would take, from a few steps that are measured on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..algorithms import Setup
from ..data.inputs import TaskConditioning
from ..data.store import DataStore, Episode
from ..data.writer import StoreWriter
from ..devices import Execution
from ..environments import EnvironmentSpec, family_of
from ..graph import WARM_UP
from ..rundir import RunDirectory
from ..settings import settings
from ..training.trainer import Trainer
from .plan import Run

STEPS = 3
"""Number of steps that are timed; the shortest time counts."""

_UPDATES = 2  # mask updates that are timed
_EPISODE_LENGTH = 60


def seconds_per_step(run: Run) -> float:
    """Measure the seconds of a step on this machine, with the step's share of a mask update.

    Random numbers take the place of the run's data. The first steps and the first mask update are
    not timed. They compile kernels and capture CUDA graphs, which a run does only once.

    Raises:
        UserError: the run's device or its kernels are missing.
    """
    options = run.config.run
    execution = Execution.choose(options.device, options.fused, options.precision, options.graph)
    with tempfile.TemporaryDirectory() as folder:
        store = _random_store(Path(folder) / "store", run)
        data = [store.task(name) for name in run.tasks]
        conditioning = tuple(TaskConditioning.from_data(task, run.config) for task in data)
        setup = Setup(run.config, store.environment, conditioning, execution)
        trainer = Trainer(setup, data, RunDirectory(Path(folder) / "run"))
        for _ in range(WARM_UP + 1):  # the last one captures a CUDA graph
            trainer.train_step()
        step = _least_seconds(trainer.train_step, STEPS, execution.device)
        every = dict(settings(run.config)).get("mask_update_every")
        if every is None:
            return step
        trainer.step = 0  # an update is due at this step
        trainer.before_step()
        return step + _least_seconds(trainer.before_step, _UPDATES, execution.device) / every


def _least_seconds(function: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the shortest time of some calls. A call ends when the device has finished its work."""
    found = []
    for _ in range(times):
        _wait_for(device)
        began = time.perf_counter()
        function()
        _wait_for(device)
        found.append(time.perf_counter() - began)
    return min(found)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_store(path: Path, run: Run) -> DataStore:
    spec, rng = family_of(run.tasks).spec, np.random.default_rng(0)
    writer = StoreWriter(path, {"source": "random"}, spec)
    for name in run.tasks:
        with writer.task(name) as task:
            task.add(_random_episode(rng, spec))
            task.add_prompt(_random_episode(rng, spec))
    return writer.finish(run.tasks)


def _random_episode(rng: np.random.Generator, spec: EnvironmentSpec) -> Episode:
    steps = min(_EPISODE_LENGTH, spec.episode_length)
    return Episode(
        rng.normal(size=(steps, spec.observation_size)).astype(np.float32),
        rng.uniform(-1, 1, (steps, spec.action_size)).astype(np.float32),
        rng.random(steps, np.float32),
        success=int(spec.success) if spec.success else -1,
    )
