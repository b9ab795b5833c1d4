"""A run's directory: begun, read, and taken up again."""

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
from .trainer import Trainer


@dataclass(frozen=True)
class SavedRun:
    """What a run's directory says of the run.

    Attributes:
        directory: where it is.
        config: its settings.
        environment: the environments of its tasks.
        conditioning: one entry per task; index = task id.
        store: the checksum of the store that it trains on.
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
            UserError: there is no run, or it is damaged or of another version.
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
        """What its learner or policy is built from."""
        return Setup(self.config, self.environment, self.conditioning, execution)


def begin(
    path: Path, preset: str, config: TrainConfig, store: DataStore, tasks: Sequence[str]
) -> Trainer:
    """Begin a run: build everything, then make its directory.

    Raises:
        UserError: the settings, the data or the device cannot work, or the data are damaged;
            nothing is written then.
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
    """Take up a run at its last checkpoint, or at the start if it has none.

    Args:
        config: its settings; those that differ from the saved ones are recorded in run.json.

    Raises:
        UserError: data or device are not there, the data are others, or the checkpoint is damaged,
            of another model size or beyond the last step.
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
            f"the last checkpoint of {saved.directory.path} is of step {trainer.step}, and its "
            f"run.json asks for {trainer.steps} steps: restore run.json from a copy"
        )
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
    """The store that a run trains on, wherever it is now.

    Raises:
        UserError: it is not there, it is another store, or it is damaged.
    """
    path = config.data.data
    assert path is not None
    if not path.exists():
        raise UserError(
            f"the store {path} of the run {saved.directory.path} is not there: name where it is "
            "now with --data"
        )
    store = DataStore.open(path)
    if store.checksum != saved.store:
        raise UserError(
            f"the store {path} is not the one that the run {saved.directory.path} was trained on: "
            "name that one, wherever it is now, with --data"
        )
    store.verify(tasks=[task.name for task in saved.conditioning])
    return store


def _part(setup: Setup, step: int) -> Part:
    """The part of a run that begins after `step`, on this machine."""
    execution, packages = setup.execution, family(setup.environment.family).packages
    return Part(step, str(execution.device), execution.backend.name, versions(packages))


def _parts_with_next(parts: Sequence[Part], following: Part) -> tuple[Part, ...]:
    """The parts of a run that goes on; a new one only where something is not as before."""
    kept = tuple(part for part in parts if part.step < following.step)  # later steps are done again
    as_before = bool(kept) and replace(kept[-1], step=following.step) == following
    return kept if as_before else (*kept, following)


def _changes(saved: SavedRun, config: TrainConfig, step: int) -> dict[str, Any]:
    """The entries of run.json for settings that differ from the saved ones."""
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
