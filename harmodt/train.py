"""Train a policy: `python -m harmodt.train [--preset NAME] [--algorithm NAME] [settings]`."""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tyro
from rich.filesize import decimal

from .algorithms import ALGORITHMS, find, preset
from .collect import CollectConfig, collect
from .config import PRESETS, TrainConfig
from .data.store import DataStore
from .devices import Execution, prepare_cpu
from .environments import family
from .errors import UserError, going_on, run_command
from .files import owned
from .progress import PlainConsole
from .rundir import Part, RunDirectory
from .settings import change, check, parse_arguments, settings
from .training import run
from .training.advice import resume_command
from .training.kernel_check import has_new_kernels
from .training.run import SavedRun
from .training.stop import Output, Stopped
from .training.trainer import Trained, Trainer

QUICKSTART_DATA = Path("data/quickstart-mt5")
"""The store into which the quickstart collects its demonstrations."""

_CHANGEABLE = (
    *("log_every", "checkpoint_every", "keep_checkpoints"),
    *("device", "data_device", "fused", "graph", "mask_update_gb"),
)
"""Settings that may change when a run is resumed. The run's result does not depend on them, except
that other kernels round differently."""

_RECORDED = ("data", "learning_rate", "precision")
"""Settings that may change although the result depends on them. A store can be moved, training can
fail at a learning rate, and some devices lack some precisions."""

output = Output()
console = PlainConsole(file=output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    prepare_cpu()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    resumed, rest = _take(arguments, "--resume")
    if resumed is not None:
        _check_name(Path(resumed), "rename it")
        RunDirectory(Path(resumed)).read()  # refuses a directory that holds no run
        with owned(Path(resumed)):
            RunDirectory(Path(resumed)).clear_leftovers()
            _train(resume(Path(resumed), rest))
        return
    preset_name, config = _begun(arguments)
    path = config.run.output or _free_directory(
        f"{preset_name}-{config.algorithm}-seed{config.run.seed}"
    )
    _check_name(path, "name another --output")
    with owned(path):
        RunDirectory(path).clear_leftovers()
        _train(begin(preset_name, config, path))


def _train(trainer: Trainer) -> None:
    """Train to the last step, then print the result and the paths of its files.

    Ctrl-C, SIGTERM, SIGHUP or a closed output end the program after it has written a checkpoint.
    """
    output.stop = trainer.stop
    try:
        with trainer.stop.handled(), going_on(f"go on with: {resume_command(trainer.directory)}"):
            _announce(trainer)
            try:
                trained = trainer.train(console)
            except Stopped:
                _end(trainer)
            _report(trainer, trained)
    finally:
        output.stop = None


def _announce(trainer: Trainer) -> None:
    """Print the algorithm, its size, the device and the run's directory."""
    setup, numbers, count = trainer.setup, trainer.learner.describe(), len(trainer.tasks)
    masks = f"{decimal(numbers['mask_bytes'])} of masks, " if "mask_bytes" in numbers else ""
    parts = trainer.directory.read().parts
    goes_on = f" (goes on after step {trainer.step})" if trainer.step else ""
    lines = [
        f"{setup.config.algorithm} on {count} task{'s'[: count > 1]}: "
        f"{numbers['parameters'] / 1e6:.2f} M parameters, {masks}{setup.execution.device}, "
        f"{setup.execution.backend.name} kernels",
        f"run: {trainer.directory.path}{goes_on}",
    ]
    if len(parts) > 1 and parts[-1].step == trainer.step:
        lines.append(_moved(*parts[-2:]))
    if has_new_kernels(setup):
        lines.append(
            "the kernels for GPUs are new: the first steps agreed with plain PyTorch; to compare a "
            "whole run, train another one with --no-fused"
        )
    console.print("\n".join(lines), soft_wrap=True)


def _moved(before: Part, now: Part) -> str:
    """Return a sentence on the changes since the run's last part: device, kernels, versions."""
    others = now.versions.keys() | before.versions.keys()
    values = [
        ("device", before.device, now.device),
        ("kernels", before.backend, now.backend),
        *((name, before.versions.get(name), now.versions.get(name)) for name in sorted(others)),
    ]
    moves = [f"{name} {now} in place of {before}" for name, before, now in values if before != now]
    return f"from here on the run computes with {', '.join(moves)}: rounding may differ"


def _report(trainer: Trainer, trained: Trained) -> None:
    """Print the last evaluation, the step of the best one, and the run's directory."""
    if trained.evaluation is not None:
        console.print(trained.evaluation.table())
    if trained.best is not None and trained.best[0] != trainer.step:
        step, score = trained.best
        name = "success" if trainer.setup.environment.success else "mean return"
        where = "the table shows the last evaluation"
        if trained.evaluation is None:  # a finished run was resumed
            folder = trainer.directory.evaluation
            where = f"nothing was evaluated now, and all evaluations are in {folder}"
        console.print(f"best {name} {score:.2f} at step {step}; {where}", soft_wrap=True)
    path = trainer.directory.path
    console.print(f"run: {path}", soft_wrap=True)
    report = f"python -m harmodt.report {shlex.quote(str(path))}"
    console.print(f"as a page to look at: {report}", soft_wrap=True)


def _end(trainer: Trainer) -> NoReturn:
    """Print the signal that ended the run early and the command that resumes it; exit."""
    by = trainer.stop.signal
    assert by is not None
    unread = by is signal.SIGPIPE
    with contextlib.suppress(OSError):
        (PlainConsole(stderr=True) if unread else console).print(
            f"stopped by {by.name} after step {trainer.step}; go on with: "
            f"{resume_command(trainer.directory)}",
            soft_wrap=True,
        )
    sys.exit(128 + by)


def _check_name(path: Path, remedy: str) -> None:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path} is not UTF-8, and TensorBoard cannot write to such a path: {remedy}"
        ) from None


def _begun(arguments: list[str]) -> tuple[str, TrainConfig]:
    """Return the preset's name and the settings of a new run from the command line."""
    name, rest = _take(arguments, "--preset")
    algorithm, rest = _take(rest, "--algorithm")
    name = name or "quickstart"
    return name, _parse(rest, preset(name, algorithm or TrainConfig().algorithm))


def resume(path: Path, arguments: Sequence[str]) -> Trainer:
    """Resume a run. Some of its settings may change; run.json records the changes.

    Raises:
        UserError: there is no such run, or the arguments change a setting that cannot change.
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
                f"{name} cannot change from {before[name]} to {new} in a resumed run: "
                "leave it out, or begin a new run"
            )
    return run.resume(saved, config)


def _take(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `flag VALUE` or `flag=VALUE`, and the arguments without it."""
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
        f"--preset {{{','.join(PRESETS)}}}: the set of defaults. The preset paper has the paper's "
        "settings (Table 6). Without --data, the quickstart first collects its own demonstrations "
        "of MT5 by simulation.\n\n"
        f"--algorithm {{{','.join(ALGORITHMS)}}}: the algorithm to train. The list below includes "
        f"the settings of {default.algorithm}. "
        f"{inspect.cleandoc(default.own.__doc__ or '')}\n\n"
        "--resume RUN: go on with a run and its settings. These may change: the settings of the "
        "device (--device, --data-device, --fused, --graph, --precision, --mask-update-gb), of the "
        "run's files (--log-every, --checkpoint-every, --keep-checkpoints), --learning-rate, and "
        "--data for a store that was moved. run.json records the changes."
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
    """Refuse a setting that only other algorithms read, and name these algorithms."""
    reads = find(config.algorithm).reads
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if not argument.startswith("--") or reads(name):
            continue
        having = [a for a, row in ALGORITHMS.items() if row.reads(name)]
        if having:
            raise UserError(
                f"--{name.replace('_', '-')} is not a setting of {config.algorithm}, but of "
                f"{', '.join(having)}: leave it out, or name one of them with --algorithm"
            )


def begin(preset_name: str, config: TrainConfig, path: Path) -> Trainer:
    """Begin a new run: check everything, then make its directory.

    A step cannot have more tasks than the run has: `tasks_per_step` is lowered to their number.

    Raises:
        UserError: the settings, the data or the device cannot work. Nothing is written then.
    """
    check(config)
    data = config.data.data
    if data is None:
        data = _quickstart_data(preset_name, config)
        config = change(config, {"data": data})
    store, names = DataStore.open(data), config.data.tasks
    tasks = family(store.environment.family).resolve_tasks(names) if names else store.tasks
    asked, count = config.data.tasks_per_step, len(tasks)
    if asked > count:
        console.print(
            f"--tasks-per-step is lowered from {asked} to {count}, the number of the run's tasks",
            soft_wrap=True,
        )
        config = change(config, {"tasks_per_step": count})
    return run.begin(path, preset_name, config, store, tasks)


def _quickstart_data(preset_name: str, config: TrainConfig) -> Path:
    if preset_name != "quickstart":
        raise UserError(
            f"the {preset_name} preset collects no data: name a store with --data (make one with "
            "`python -m harmodt.collect` or `python -m harmodt.data import`)"
        )
    # Refuse a missing device or missing kernels now, before minutes of simulation.
    Execution.choose(config.run.device, config.run.fused, config.run.precision)
    if not (QUICKSTART_DATA / "manifest.json").exists():
        console.print(f"collecting demonstrations of MT5 into {QUICKSTART_DATA}")
    collect(CollectConfig(output=QUICKSTART_DATA, tasks=("mt5",)))
    return QUICKSTART_DATA


def _free_directory(name: str) -> Path:
    """Return runs/NAME, or the first free one of runs/NAME-2, runs/NAME-3 and so on."""
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            return path
        number += 1


if __name__ == "__main__":
    run_command(main)
