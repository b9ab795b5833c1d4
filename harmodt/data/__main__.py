"""Bring data into a store, show what a store holds, and check it.

python -m harmodt.data import SOURCE --output DIR --tasks mt50
python -m harmodt.data info DIR
python -m harmodt.data verify DIR
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.progress import Progress
from rich.table import Table

from ..environments import FAMILIES, METAWORLD, EnvironmentSpec, family
from ..errors import UserError, printable, run_command
from ..progress import PlainConsole, progress_bar
from ..settings import Count, Whole, check, parse_arguments
from .importers import IMPORTERS, Importer, check_episode, importer
from .store import UNKNOWN, DataStore, Episode, TaskData
from .writer import StoreWriter, TaskWriter, make_or_open


@dataclass(frozen=True)
class ImportConfig:
    """Bring episodes from files into a store.

    npz files are SOURCE/<task>-v2/<number>.npz, or SOURCE/<task>/<run>/dataset/<number>.npz as
    MTDiff has them. All episodes are checked before anything is written.
    """

    source: tyro.conf.Positional[Path]
    """Where the data are: for npz files, the folder that holds a folder per task."""
    output: Path
    """Directory of the store."""
    tasks: tuple[str, ...] = ()
    """Tasks by name (reach-v2, reach) or by set (mt5, mt50); every task found if none is named."""
    episodes: Count | None = None
    """Read only the first so many episodes of each task by number; all by default."""
    prompt_episodes: Whole = 10
    """The episodes with the highest return, so many per task, are held apart as prompts."""
    min_length: Count = 20
    """Steps that an episode must have at least: the context length in training."""
    clip_actions: bool = True
    """Clip actions to [-1, 1], which is what the environments execute."""
    reward_version: str | None = None
    """Of the reward function that the data were made with, such as v2 in Meta-World, if known."""
    format: Annotated[str, tyro.conf.arg(help=f"Of the source: {', '.join(IMPORTERS)}.")] = "npz"
    family: Annotated[str, tyro.conf.arg(help=f"The environments: {', '.join(FAMILIES)}.")] = (
        METAWORLD
    )


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


def import_data(config: ImportConfig, progress: bool = True) -> DataStore:
    """Import a data set, or go on with an import that was begun; returns the store opened.

    A store that is there already and was made with the same settings is opened as it is.

    Raises:
        UserError: a setting out of range, a task that is not there, an episode that cannot be
            used, or a directory that holds something else or is another process's at present.
    """
    check(config)
    found = family(config.family)
    source = importer(config.format, config.source, found)
    tasks = found.resolve_tasks(config.tasks) if config.tasks else source.tasks()
    settings = _settings(config, tasks)
    environment = replace(found.spec, reward_version=config.reward_version)

    def make() -> None:
        episodes = {task: _find_episodes(config, source, task) for task in tasks}
        with progress_bar("episodes", enabled=progress) as bar:
            _import(config, source, environment, episodes, settings, bar)

    return make_or_open(config.output, "import", settings, make)


def _import(
    config: ImportConfig,
    source: Importer,
    environment: EnvironmentSpec,
    episodes: dict[str, Sequence[Any]],
    settings: dict[str, Any],
    bar: Progress,
) -> None:
    """Read all episodes once to check them and to choose the prompts, and again to write them."""

    def read(episode: Any) -> Episode:
        return _read_episode(config, source, environment, episode)

    total = sum(map(len, episodes.values()))
    advance = partial(bar.advance, bar.add_task("checking", total=total))
    prompts = {}
    for task, which in episodes.items():
        returns = _read_returns(map(read, which), advance)
        best = np.argsort(-returns, kind="stable")[: config.prompt_episodes]
        prompts[task] = set(best.tolist())
    writer = StoreWriter(config.output, {"import": settings}, environment)
    line = bar.add_task("importing", total=total)
    advance = partial(bar.advance, line)
    for task, which in episodes.items():
        if task in writer.tasks:
            bar.advance(line, len(which))
        else:
            with writer.task(task) as task_writer:
                _write_task(task_writer, map(read, which), prompts[task], advance)
    writer.finish(tuple(episodes))


def _find_episodes(config: ImportConfig, source: Importer, task: str) -> Sequence[Any]:
    """The episodes of a task to import, not read yet; at least one more than its prompts."""
    episodes = source.episodes(task)[: config.episodes]
    if config.episodes and len(episodes) < config.episodes:
        raise UserError(
            f"{task} has {len(episodes)} episodes and {config.episodes} are asked for: add "
            "the missing ones or lower --episodes"
        )
    if len(episodes) <= config.prompt_episodes:
        raise UserError(
            f"{task} has {len(episodes)} episodes, and none is left to train on when "
            f"{config.prompt_episodes} are held apart as prompts: lower --prompt-episodes"
        )
    return episodes


def _read_episode(
    config: ImportConfig, source: Importer, environment: EnvironmentSpec, which: Any
) -> Episode:
    """Read and check an episode; its actions are clipped if that is asked for."""
    episode = source.read(which)
    check_episode(str(which), episode, environment, config.min_length)
    if config.clip_actions:
        episode = episode._replace(actions=episode.actions.clip(-1, 1))
    return episode if environment.success else episode._replace(success=UNKNOWN)


def _read_returns(episodes: Iterable[Episode], advance: Callable[[], None]) -> np.ndarray:
    """The episodes' returns, float64."""
    returns = []
    for episode in episodes:
        returns.append(episode.rewards.sum(dtype=np.float64))
        advance()
    return np.array(returns)


def _write_task(
    writer: TaskWriter, episodes: Iterable[Episode], prompts: set[int], advance: Callable[[], None]
) -> None:
    """Write episodes; `prompts` are the numbers of those to hold apart."""
    for number, episode in enumerate(episodes):
        add = writer.add_prompt if number in prompts else writer.add
        add(episode)
        advance()


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
