"""Train a policy: `python -m harmodt.train [--preset NAME] [settings]`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from .collect import CollectConfig, collect
from .config import PRESETS, TrainConfig
from .data.inputs import TaskConditioning, save_conditioning
from .data.store import DataStore
from .devices import check_device, choose_backend, prepare_cpu
from .environments import METAWORLD, family
from .environments.metaworld_names import resolve_tasks
from .errors import UserError, run_command
from .results import versions
from .training.checkpoint import read_run, write_run
from .training.run import Run
from .training.trainer import Trainer

QUICKSTART_DATA = Path("data/quickstart-mt5")
"""Where the quickstart collects its demonstrations."""

# What may change when a run goes on: nothing that its result depends on.
_CHANGEABLE = ("log_every", "checkpoint_every", "keep_checkpoints")

console = Console()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    prepare_cpu()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    resumed, rest = _take(arguments, "--resume")
    run = resume(Path(resumed), rest) if resumed is not None else begin(*_begun(arguments))
    run.train()


def _begun(arguments: list[str]) -> tuple[str, TrainConfig]:
    """The preset's name and the settings of a new run."""
    preset, rest = _take(arguments, "--preset")
    preset = preset or "quickstart"
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: choose from {', '.join(PRESETS)}")
    return preset, _parse(rest, PRESETS[preset])


def resume(path: Path, arguments: Sequence[str]) -> Run:
    """Take up a run; of its settings only those may change that its result does not depend on.

    Raises:
        UserError: there is no such run, or another setting is changed.
    """
    saved = TrainConfig.from_json(read_run(path)["config"])
    config = _parse(arguments, saved)
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if old != new and field.name not in _CHANGEABLE:
            raise UserError(
                f"{field.name} cannot change from {old} to {new} in a run that goes on: "
                "leave it out, or begin a new run"
            )
    return Run.resume(path, config)


def _take(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take `flag VALUE` or `flag=VALUE` out of the arguments."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != flag:
            continue
        if equals:
            return value, arguments[:i] + arguments[i + 1 :]
        if i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        raise UserError(f"{flag} needs a value")
    return None, arguments


def _parse(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    description = (
        f"{inspect.cleandoc(TrainConfig.__doc__ or '')}\n\n"
        f"--preset {{{','.join(PRESETS)}}}: where the defaults come from.\n\n"
        "--resume RUN: go on with a run; its settings stay as they were."
    )
    return tyro.cli(
        TrainConfig,
        prog="python -m harmodt.train",
        args=arguments,
        default=default,
        description=description,
    )


def begin(preset: str, config: TrainConfig) -> Run:
    """Begin a new run: check everything, then make its directory.

    Raises:
        UserError: settings, data or device that cannot work; nothing is written then.
    """
    config.check()
    device = check_device(config.device)
    choose_backend(config.fused, device)
    if config.data is None:
        config = dataclasses.replace(config, data=_quickstart_data(preset))
    assert config.data is not None
    store = DataStore.open(config.data)
    store.verify()
    names = resolve_tasks(config.tasks) if config.tasks else store.tasks
    data = [store.task(name) for name in names]
    _check_lengths(store, names, config)
    conditioning = [TaskConditioning.from_data(task, config) for task in data]
    trainer = Trainer(config, data, conditioning, device)
    path = config.output or _free_directory(f"{preset}-{config.algorithm}-seed{config.seed}")
    _check_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    save_conditioning(path / "conditioning.safetensors", conditioning)
    description = {
        "preset": preset,
        "tasks": list(names),
        "backend": trainer.backend.name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "maskable": trainer.vector.maskable_count(),
        "versions": versions(family(METAWORLD).packages),
        "config": dataclasses.replace(config, output=path).to_json(),
    }
    write_run(path, description)
    return Run(path, config, trainer, conditioning)


def _check_empty(path: Path) -> None:
    # A run that was killed before its run.json was written leaves no more than this.
    leftovers = {"conditioning.safetensors"}
    if path.exists() and any(
        file.name not in leftovers and not file.name.startswith(".") for file in path.iterdir()
    ):
        raise UserError(
            f"{path} is not empty: go on with --resume {path}, or name another --output"
        )


def _quickstart_data(preset: str) -> Path:
    if preset != "quickstart":
        raise UserError(
            f"the {preset} preset has no data of its own: name a store with --data (make one with "
            "`python -m harmodt.collect` or `python -m harmodt.data import`)"
        )
    if not (QUICKSTART_DATA / "manifest.json").exists():
        console.print(f"collecting demonstrations of MT5 into {QUICKSTART_DATA}")
    collect(CollectConfig(output=QUICKSTART_DATA, tasks=("mt5",)))
    return QUICKSTART_DATA


def _check_lengths(store: DataStore, names: Sequence[str], config: TrainConfig) -> None:
    for name in names:
        lengths = store.task(name).train.lengths
        if lengths.min() < config.context_length:
            raise UserError(
                f"task {name} of {store.path}: episode {lengths.argmin()} has {lengths.min()} "
                f"steps, fewer than context_length {config.context_length}: lower it, or make the "
                "store again without that episode"
            )


def _free_directory(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, -3 and so on if that is taken."""
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            return path
        number += 1


if __name__ == "__main__":
    run_command(main)
