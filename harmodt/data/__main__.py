"""Bring data into a store, show what a store holds, and check it.

python -m harmodt.data import SOURCE --output DIR --tasks mt50
python -m harmodt.data info DIR
python -m harmodt.data verify DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.table import Table

from ..environments import EnvironmentSpec
from ..errors import printable, run_command
from ..progress import PlainConsole, progress_bar
from ..settings import parse_arguments
from .importing import ImportConfig, import_data
from .store import DataStore, TaskData


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


def describe(store: DataStore) -> Table:
    """A table of what a store holds, one row per task and one for the whole."""
    title = f"{printable(store.path)}: {_describe_environment(store.environment)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
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


def _describe_environment(environment: EnvironmentSpec) -> str:
    sizes = f"{environment.observation_size} observations, {environment.action_size} actions"
    version = environment.reward_version
    rewards = f", reward version {version}" if version else ""
    return f"{environment.family} ({sizes}{rewards})"


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _verify(path: Path) -> None:
    store = DataStore.open(path)
    with progress_bar("files") as bar:
        line = bar.add_task("verifying", total=len(store.files))
        store.verify(lambda _: bar.advance(line))
    print(f"{printable(path)}: every checksum is right")


def _print(table: Table) -> None:
    """Print a table with its names in full, even where the output is narrower."""
    PlainConsole(width=max(110, PlainConsole().width)).print(table)


def main() -> None:
    command = parse_arguments(
        Annotated[ImportConfig, tyro.conf.subcommand("import")]
        | Annotated[InfoConfig, tyro.conf.subcommand("info")]
        | Annotated[VerifyConfig, tyro.conf.subcommand("verify")],
        prog="python -m harmodt.data",
        description="Bring data into a store, show what a store holds, and check it.",
    )
    if isinstance(command, ImportConfig):
        _print(describe(import_data(command)))
    elif isinstance(command, InfoConfig):
        _print(describe(DataStore.open(command.store)))
    else:
        _verify(command.store)


if __name__ == "__main__":
    run_command(main)
