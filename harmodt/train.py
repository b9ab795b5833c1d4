"""Train a policy: `python -m harmodt.train [--preset NAME] [--algorithm NAME] [settings]`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from .algorithms import ALGORITHMS, find, preset
from .collect import CollectConfig, collect
from .config import PRESETS, TrainConfig
from .data.store import DataStore
from .devices import Execution, prepare_cpu
from .environments import family
from .errors import UserError, run_command
from .files import owned
from .progress import PlainConsole
from .rundir import RunDirectory
from .settings import change, check, parse_arguments, settings
from .training.run import Run, SavedRun

QUICKSTART_DATA = Path("data/quickstart-mt5")
"""Where the quickstart collects its demonstrations."""

# What may change when a run goes on: nothing that its result depends on.
_CHANGEABLE = ("log_every", "checkpoint_every", "keep_checkpoints", "data_device")
# And what must be able to change: where the data are, and a rate at which training broke.
_RECORDED = ("data", "learning_rate")

console = PlainConsole()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    prepare_cpu()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    resumed, rest = _take(arguments, "--resume")
    if resumed is not None:
        _check_name(Path(resumed), "rename it")
        RunDirectory(Path(resumed)).read()  # a directory that holds no run is not touched
        with owned(Path(resumed)):
            RunDirectory(Path(resumed)).clear_leftovers()
            resume(Path(resumed), rest).train()
        return
    preset_name, config = _begun(arguments)
    output = config.run.output or _free_directory(
        f"{preset_name}-{config.algorithm}-seed{config.run.seed}"
    )
    _check_name(output, "name another --output")
    with owned(output):
        RunDirectory(output).clear_leftovers()
        begin(preset_name, config, output).train()


def _check_name(path: Path, remedy: str) -> None:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path} is not UTF-8, and TensorBoard cannot write to such a path: {remedy}"
        ) from None


def _begun(arguments: list[str]) -> tuple[str, TrainConfig]:
    """The preset's name and the settings of a new run."""
    name, rest = _take(arguments, "--preset")
    algorithm, rest = _take(rest, "--algorithm")
    name = name or "quickstart"
    return name, _parse(rest, preset(name, algorithm or TrainConfig().algorithm))


def resume(path: Path, arguments: Sequence[str]) -> Run:
    """Take up a run.

    Of its settings those may change that its result does not depend on, the place of its data, and
    the learning rate, which is recorded.

    Raises:
        UserError: there is no such run, or another setting is changed.
    """
    saved = SavedRun.open(path)
    algorithm, rest = _take(list(arguments), "--algorithm")
    config = _parse(rest, saved.config)
    check(config)
    before = {**dict(settings(saved.config)), "algorithm": saved.config.algorithm}
    after = {**dict(settings(config)), "algorithm": algorithm or saved.config.algorithm}
    for name, new in after.items():
        if new != before[name] and name not in _CHANGEABLE + _RECORDED:
            raise UserError(
                f"{name} cannot change from {before[name]} to {new} in a run that goes on: "
                "leave it out, or begin a new run"
            )
    return Run.resume(saved, config)


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
    if "--help" not in arguments and "-h" not in arguments:
        _refuse_settings_of_others(arguments, default)
    description = (
        "Train HarmoDT, or a baseline, on a store of offline data.\n\n"
        f"--preset {{{','.join(PRESETS)}}}: where the defaults come from; paper has the paper's "
        "(Table 6). Without --data the quickstart first collects its own demonstrations of MT5 by "
        "simulation.\n\n"
        f"--algorithm {{{','.join(ALGORITHMS)}}}: what is trained; {default.algorithm}'s own "
        f"settings are among those below. {inspect.cleandoc(default.own.__doc__ or '')}\n\n"
        "--resume RUN: go on with a run, with its settings; a store that was moved is named with "
        "--data, and --learning-rate may change, which is recorded."
    )
    return parse_arguments(
        TrainConfig,
        arguments,
        prog="python -m harmodt.train",
        default=default,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _refuse_settings_of_others(arguments: Sequence[str], config: TrainConfig) -> None:
    """Say whose a setting is that another algorithm reads and this one does not."""
    reads = find(config.algorithm).reads
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if not argument.startswith("--") or reads(name):
            continue
        having = [a for a, row in ALGORITHMS.items() if row.reads(name)]
        if having:
            raise UserError(
                f"--{name.replace('_', '-')} is no setting of {config.algorithm}, but of "
                f"{', '.join(having)}: leave it out, or name one of them with --algorithm"
            )


def begin(preset_name: str, config: TrainConfig, output: Path) -> Run:
    """Begin a new run: check everything, then make its directory.

    A step cannot have more tasks than the run has: `tasks_per_step` is lowered to their number.

    Raises:
        UserError: settings, data or device that cannot work; nothing is written then.
    """
    check(config)
    path = config.data.data
    if path is None:
        path = _quickstart_data(preset_name, config)
        config = change(config, {"data": path})
    store = DataStore.open(path)
    store.verify()
    names = config.data.tasks
    tasks = family(store.environment.family).resolve_tasks(names) if names else store.tasks
    asked, count = config.data.tasks_per_step, len(tasks)
    if asked > count:
        console.print(
            f"--tasks-per-step is lowered from {asked} to {count}, the number of the run's tasks",
            soft_wrap=True,
        )
        config = change(config, {"tasks_per_step": count})
    return Run.begin(output, preset_name, config, store, tasks)


def _quickstart_data(preset_name: str, config: TrainConfig) -> Path:
    if preset_name != "quickstart":
        raise UserError(
            f"the {preset_name} preset has no data of its own: name a store with --data (make one "
            "with `python -m harmodt.collect` or `python -m harmodt.data import`)"
        )
    # Before minutes of simulation: what would be refused after them.
    Execution.choose(config.run.device, config.run.fused, config.run.precision)
    if not (QUICKSTART_DATA / "manifest.json").exists():
        console.print(f"collecting demonstrations of MT5 into {QUICKSTART_DATA}")
    collect(CollectConfig(output=QUICKSTART_DATA, tasks=("mt5",)))
    return QUICKSTART_DATA


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
