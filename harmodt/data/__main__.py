"""Bring data into a store, show what a store holds, and check it.

python -m harmodt.data import SOURCE --output DIR --tasks mt50
python -m harmodt.data info DIR
python -m harmodt.data verify DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from ..environments.metaworld_names import resolve_tasks
from ..errors import UserError, run_command
from ..progress import progress_bar
from .importers.npz import find_episodes, find_tasks, read_episode
from .store import DataStore, StoreWriter, TaskData, TaskWriter, check_output


@dataclass(frozen=True)
class ImportConfig:
    """Bring episodes in npz files into a store.

    The files are SOURCE/<task>-v2/<number>.npz, or SOURCE/<task>/<run>/dataset/<number>.npz as
    MTDiff has them. All of them are checked before anything is written.
    """

    source: tyro.conf.Positional[Path]
    """Folder that holds a folder per task."""
    output: Path
    """Directory of the store."""
    tasks: tuple[str, ...] = ()
    """Tasks by name (reach-v2, reach) or by set (mt5, mt50); every task found if none is named."""
    episodes: int | None = None
    """Read only the first so many episodes of each task by number; all by default."""
    prompt_episodes: int = 10
    """The episodes with the highest return, so many per task, are held apart as prompts."""
    min_length: int = 20
    """Steps that an episode must have at least: the context length in training."""
    clip_actions: bool = True
    """Clip actions to [-1, 1], which is what Meta-World executes."""


@dataclass(frozen=True)
class InfoConfig:
    """Show what a store holds."""

    store: tyro.conf.Positional[Path]
    """Directory of the store."""


@dataclass(frozen=True)
class VerifyConfig:
    """Read a whole store and compare its checksums."""

    store: tyro.conf.Positional[Path]
    """Directory of the store."""


def import_npz(config: ImportConfig, progress: bool = True) -> DataStore:
    """Import a data set in npz files; returns the store opened.

    Raises:
        UserError: a setting out of range, a task that is not there, a file that cannot be used,
            or an output directory that is taken.
    """
    _check(config)
    tasks = resolve_tasks(config.tasks) if config.tasks else find_tasks(config.source)
    files = {task: find_episodes(config.source, task)[: config.episodes] for task in tasks}
    for task in tasks:
        if config.episodes and len(files[task]) < config.episodes:
            raise UserError(
                f"{task} has {len(files[task])} episodes and {config.episodes} are asked for: add "
                "the missing files or lower --episodes"
            )
        if len(files[task]) <= config.prompt_episodes:
            raise UserError(
                f"{task} has {len(files[task])} episodes, and none is left to train on when "
                f"{config.prompt_episodes} are held apart as prompts: lower --prompt-episodes"
            )
    with progress_bar("episodes", enabled=progress) as bar:
        total = sum(map(len, files.values()))
        line = bar.add_task("checking", total=total)
        prompts = {task: _choose_prompts(config, files[task], bar, line) for task in tasks}
        writer = StoreWriter(config.output, {"import": _settings(config, tasks)})
        line = bar.add_task("importing", total=total)
        for task in tasks:
            if task in writer.tasks:
                bar.advance(line, len(files[task]))
            else:
                with writer.task(task) as task_writer:
                    _write_task(config, files[task], prompts[task], task_writer, bar, line)
    return writer.finish(tasks)


def _choose_prompts(
    config: ImportConfig, files: list[Path], bar: Progress, line: TaskID
) -> set[int]:
    """Check all episodes of a task; returns the numbers of those with the highest returns."""
    returns = []
    for file in files:
        returns.append(read_episode(file, config.min_length).rewards.sum(dtype=np.float64))
        bar.advance(line)
    return set(np.argsort(-np.array(returns), kind="stable")[: config.prompt_episodes].tolist())


def _write_task(
    config: ImportConfig,
    files: list[Path],
    prompts: set[int],
    writer: TaskWriter,
    bar: Progress,
    line: TaskID,
) -> None:
    for number, file in enumerate(files):
        episode = read_episode(file, config.min_length)
        if config.clip_actions:
            episode = episode._replace(actions=episode.actions.clip(-1, 1))
        add = writer.add_prompt if number in prompts else writer.add
        add(episode)
        bar.advance(line)


def describe(store: DataStore) -> Table:
    """A table of what a store holds, one row per task and one for the whole."""
    table = Table(title=str(store.path), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    for heading in ("episodes", "steps", "return min", "mean", "max", "success", "prompts", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in store.tasks:
        table.add_row(name, *_describe_task(store.task(name)), _megabytes(store.size(name)))
    episodes = sum(len(store.task(name).train) for name in store.tasks)
    prompts = sum(len(store.task(name).prompts) for name in store.tasks)
    size = _megabytes(sum(map(store.size, store.tasks)))
    table.add_section()
    total = f"{len(store.tasks)} tasks"
    table.add_row(total, f"{episodes:,}", f"{store.steps:,}", "", "", "", "", f"{prompts:,}", size)
    return table


def _describe_task(task: TaskData) -> list[str]:
    returns = task.train.returns
    known = task.train.successes[task.train.successes >= 0]
    return [
        f"{len(task.train):,}",
        f"{len(task.train.rewards):,}",
        f"{returns.min():.0f}",
        f"{returns.mean(dtype=np.float64):.0f}",
        f"{returns.max():.0f}",
        f"{known.mean():.0%}" if len(known) else "unknown",
        f"{len(task.prompts):,}",
    ]


def _check(config: ImportConfig) -> None:
    for name, low in (("episodes", 1), ("prompt_episodes", 0), ("min_length", 1)):
        value = getattr(config, name)
        if value is not None and value < low:
            raise UserError(f"{name} is {value}: it must be at least {low}")
    check_output(config.output)


def _settings(config: ImportConfig, tasks: Sequence[str]) -> dict[str, Any]:
    settings = asdict(config) | {"source": str(config.source), "tasks": list(tasks)}
    del settings["output"]
    return settings


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _verify(path: Path) -> None:
    store = DataStore.open(path)
    with progress_bar("files") as bar:
        line = bar.add_task("verifying", total=len(store.files))
        store.verify(lambda _: bar.advance(line))
    print(f"{path}: every checksum is right")


def _print(table: Table) -> None:
    """Print a table with its names in full, even where the output is narrower."""
    Console(width=max(110, Console().width)).print(table)


def main() -> None:
    command = tyro.cli(
        Annotated[ImportConfig, tyro.conf.subcommand("import")]
        | Annotated[InfoConfig, tyro.conf.subcommand("info")]
        | Annotated[VerifyConfig, tyro.conf.subcommand("verify")],
        prog="python -m harmodt.data",
        description="Bring data into a store, show what a store holds, and check it.",
    )
    if isinstance(command, ImportConfig):
        _print(describe(import_npz(command)))
    elif isinstance(command, InfoConfig):
        _print(describe(DataStore.open(command.store)))
    else:
        _verify(command.store)


if __name__ == "__main__":
    run_command(main)
