"""How long runs would take: by a few steps of each kind of run, taken here and now."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..algorithms import Setup
from ..data.inputs import TaskConditioning
from ..data.store import DataStore, Episode
from ..data.writer import StoreWriter
from ..devices import Execution
from ..environments import EnvironmentSpec, family_of
from ..rundir import RunDirectory
from ..settings import settings
from ..training.trainer import Trainer
from .plan import Run

STEPS = 3
_EPISODE_LENGTH = 60


def seconds_per_step(run: Run) -> float:
    """Of a run on this machine's device, its share of a mask update included.

    The least of a few steps after the first one, on random numbers in place of its data.

    Raises:
        UserError: its device or kernels are not there.
    """
    options = run.config.run
    execution = Execution.choose(options.device, options.fused, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        store = _random_store(Path(folder) / "store", run)
        data = [store.task(name) for name in run.tasks]
        conditioning = tuple(TaskConditioning.from_data(task, run.config) for task in data)
        setup = Setup(run.config, store.environment, conditioning, execution)
        trainer = Trainer(setup, data, RunDirectory(Path(folder) / "run"))
        trainer.train_step()
        step = min(_seconds(trainer.train_step) for _ in range(STEPS))
        every = dict(settings(run.config)).get("mask_update_every")
        if every is None:
            return step
        trainer.step = 0
        return step + _seconds(trainer.before_step) / every


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


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
