"""Begins a run, reads a run's directory, and resumes a run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..algorithms import Setup, config_from_json
from ..checkpoint import checkpoint_steps, load_checkpoint
from ..config import TrainConfig
from ..data.inputs import TaskConditioning, load_conditioning, save_conditioning
from ..data.store import DataStore
from ..devices import Execution
from ..environments import EnvironmentSpec, family
from ..errors import UserError
from ..results import versions
from ..rundir import Part, RunDirectory
from ..settings import change, from_json, settings, to_json
from .kernel_check import check_new_kernels
from .records import read_records
from .trainer import Trainer


@dataclass(frozen=True)
class SavedRun:
    """A run as its directory describes it.

    Attributes:
        directory: the run's directory.
        config: the run's settings.
        environment: the environments of the run's tasks.
        conditioning: one entry per task; index = task id.
        store: the checksum of the store that the run trains on.
    """

    directory: RunDirectory
    config: TrainConfig
    environment: EnvironmentSpec
    conditioning: tuple[TaskConditioning, ...]
    store: str

    @classmethod
    def open(cls, path: Path) -> SavedRun:
        """Read a run's directory.

        Raises:
            UserError: there is no run, or the run is damaged or has another version.
        """
        directory = RunDirectory(path)
        description, where = directory.read(), directory.description
        config = config_from_json(description.config, f"config in {where}")
        environment = from_json(EnvironmentSpec, description.environment, f"environment in {where}")
        conditioning = load_conditioning(
            directory.conditioning, description.tasks, environment, description.conditioning
        )
        return cls(directory, config, environment, tuple(conditioning), description.store)

    def setup(self, execution: Execution) -> Setup:
        """Return the setup from which the run's learner or policy is built."""
        return Setup(self.config, self.environment, self.conditioning, execution)


def begin(
    path: Path, preset: str, config: TrainConfig, store: DataStore, tasks: Sequence[str]
) -> Trainer:
    """Begin a run: build its trainer, then make its directory.

    Raises:
        UserError: the settings, the data or the device cannot work, or the data are damaged.
            Nothing is written then.
    """
    execution = _execution(config)
    data = [store.task(name) for name in tasks]
    store.verify(tasks=tasks)
    conditioning = tuple(TaskConditioning.from_data(task, config) for task in data)
    setup = Setup(config, store.environment, conditioning, execution)
    trainer = Trainer(setup, data, RunDirectory(path))
    check_new_kernels(setup, data)
    directory = trainer.directory
    directory.check_empty()
    path.mkdir(parents=True, exist_ok=True)
    run = uuid.uuid4().hex
    places = {"output": path.absolute(), "data": store.path.absolute()}
    directory.write(
        {
            "id": run,
            "preset": preset,
            "tasks": list(tasks),
            "environment": store.environment.to_json(),
            "store": store.checksum,
            "episode_length": store.longest_episode(tasks),
            "conditioning": save_conditioning(directory.conditioning, conditioning, run),
            "parts": [asdict(_part(setup, 0))],
            **trainer.learner.describe(),
            "config": to_json(change(config, places)),
        }
    )
    return trainer


def resume(saved: SavedRun, config: TrainConfig) -> Trainer:
    """Resume a run at its last checkpoint, or at the start if it has none.

    Args:
        saved: the run.
        config: the settings to go on with; run.json records those that differ from the saved ones.

    Raises:
        UserError: the data or the device are missing; the store is not the run's store; or the
            checkpoint is damaged, does not fit the model, or lies after the last step; or a log of
            the run is damaged.
    """
    execution = _execution(config)
    store = _open_store(saved, config)
    setup = replace(saved.setup(execution), config=config)
    data = [store.task(task.name) for task in saved.conditioning]
    trainer = Trainer(setup, data, saved.directory)
    if checkpoint_steps(saved.directory):
        trainer.load(load_checkpoint(saved.directory))
    if trainer.step > trainer.steps:
        raise UserError(
            f"the last checkpoint of {saved.directory.path} is of step {trainer.step}, but its "
            f"run.json asks for {trainer.steps} steps: restore run.json from a copy"
        )
    # Read both logs before any file changes, so that a damaged one leaves the run as it was.
    read_records(saved.directory.metrics, timed=False)
    read_records(saved.directory.costs, timed=True)
    entries = _changes(saved, config, trainer.step)
    before = saved.directory.read().parts
    parts = _parts_with_next(before, _part(setup, trainer.step))
    if trainer.step < trainer.steps and parts != before:
        check_new_kernels(setup, data)
        entries["parts"] = [asdict(part) for part in parts]
    if entries:
        saved.directory.update(entries)
    return trainer


def _execution(config: TrainConfig) -> Execution:
    run = config.run
    return Execution.choose(run.device, run.fused, run.precision, run.graph)


def _open_store(saved: SavedRun, config: TrainConfig) -> DataStore:
    """Open the store that a run trains on.

    Raises:
        UserError: the store is missing or damaged, or it is another store.
    """
    path = config.data.data
    assert path is not None
    if not path.exists():
        raise UserError(
            f"the store {path} of the run {saved.directory.path} is missing: name its present path "
            "with --data"
        )
    store = DataStore.open(path)
    if store.checksum != saved.store:
        raise UserError(
            f"the store {path} is not the one that the run {saved.directory.path} was trained on: "
            "name the present path of that store with --data"
        )
    store.verify(tasks=[task.name for task in saved.conditioning])
    return store


def _part(setup: Setup, step: int) -> Part:
    """Return the part of a run that begins after `step` on this machine."""
    execution, packages = setup.execution, family(setup.environment.family).packages
    return Part(step, str(execution.device), execution.backend.name, versions(packages))


def _parts_with_next(parts: Sequence[Part], following: Part) -> tuple[Part, ...]:
    """Return the parts of a resumed run. A part is added only if it differs from the last one."""
    # The run takes its later steps again, so parts that began later no longer count.
    kept = tuple(part for part in parts if part.step < following.step)
    as_before = bool(kept) and replace(kept[-1], step=following.step) == following
    return kept if as_before else (*kept, following)


def _changes(saved: SavedRun, config: TrainConfig, step: int) -> dict[str, Any]:
    """Return the entries of run.json that record the settings which differ from the saved ones."""
    assert config.data.data is not None
    config = change(config, {"data": config.data.data.absolute()})
    before, after = dict(settings(saved.config)), dict(settings(config))
    changes = [
        {"step": step, "setting": name, "from": _plain(before[name]), "to": _plain(after[name])}
        for name in after
        if after[name] != before[name]
    ]
    if not changes:
        return {}
    return {"config": to_json(config), "changes": [*saved.directory.read().changes, *changes]}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
