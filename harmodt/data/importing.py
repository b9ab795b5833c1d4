"""Bring a data set of some format into a store: `python -m harmodt.data import`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.progress import Progress

from ..environments import FAMILIES, EnvironmentSpec
from ..errors import UserError
from ..progress import progress_bar
from ..settings import Count, Whole, check
from .importers import IMPORTERS, Importer, check_episode, importer
from .store import UNKNOWN, DataStore, Episode
from .writer import StoreWriter, TaskWriter, make_or_open

_PROMPTS = 10
"""Most prompt episodes of a task by default."""
_ONE_IN = 5
"""By default at most one episode in so many is held out of training as a prompt."""


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
    prompt_episodes: Whole | None = None
    """How many episodes of each task, the best by return, are prompts and are held out of training.
    The default is 10, but at most a fifth of the task's episodes; where a fifth is less than one
    episode, the best episodes are prompts and training data too. 0 is for algorithms without
    prompt. A source with prompts of its own keeps them."""
    min_length: Count = 1
    """Steps that an episode must have at least; training pads those shorter than its context."""
    datasets: Annotated[
        tuple[str, ...], tyro.conf.arg(name="dataset", metavar="NAME=TASK ...")
    ] = ()
    """NAME=TASK, for formats that know no tasks: which of the source's data sets is which task."""
    clip_actions: bool = True
    """Clip actions to [-1, 1], which is what the environments execute."""
    reward_version: str | None = None
    """Of the reward function that the data were made with, such as v2 in Meta-World, if known."""
    format: Annotated[str, tyro.conf.arg(help=f"Of the source: {', '.join(IMPORTERS)}.")] = "npz"
    family: Annotated[
        str | None,
        tyro.conf.arg(help=f"The environments: {', '.join(FAMILIES)}; by default the source's."),
    ] = None


def import_data(config: ImportConfig, progress: bool = True) -> DataStore:
    """Import a data set, or go on with an import that was begun; returns the store opened.

    A store that is there already and was made with the same settings is opened as it is.

    Raises:
        UserError: a setting out of range, a task that is not there, an episode that cannot be
            used, or a directory that holds something else or is another process's at present.
    """
    check(config)
    datasets = _split_datasets(config.datasets)
    source = importer(config.format, config.source, config.family, config.tasks, datasets)
    tasks = source.resolve_tasks(config.tasks) if config.tasks else source.tasks()
    settings = _settings(config, source.family.spec.family, tasks)
    environment = replace(source.family.spec, reward_version=config.reward_version)

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
    prompts = {
        task: _choose_prompts(
            config, _read_returns(map(read, which), advance), len(source.prompts(task))
        )
        for task, which in episodes.items()
    }
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
    """Find the episodes of a task, which are not read yet; the source's own prompts come last."""
    episodes = source.episodes(task)[: config.episodes]
    if config.episodes and len(episodes) < config.episodes:
        raise UserError(
            f"{task} has {len(episodes)} episodes and {config.episodes} are asked for: add "
            "the missing ones or lower --episodes"
        )
    if own := source.prompts(task):
        return [*episodes, *own]
    if len(episodes) <= (config.prompt_episodes or 0):
        raise UserError(
            f"{task} has {len(episodes)} episodes, and none is left to train on when "
            f"{config.prompt_episodes} are held apart as prompts: lower --prompt-episodes"
        )
    return episodes


class _Prompts(NamedTuple):
    """The prompts of a task: numbers of its episodes, and whether these are training data too."""

    numbers: set[int]
    shared: bool


def _choose_prompts(config: ImportConfig, returns: np.ndarray, own: int) -> _Prompts:
    """Choose the prompts of a task.

    Args:
        returns: float64 [E], the return of each of its episodes.
        own: how many of them, the last ones, the source itself holds apart as prompts.
    """
    if own:
        return _Prompts(set(range(len(returns) - own, len(returns))), shared=False)
    best = np.argsort(-returns, kind="stable").tolist()
    if config.prompt_episodes is not None:
        return _Prompts(set(best[: config.prompt_episodes]), shared=False)
    held_out = min(_PROMPTS, len(returns) // _ONE_IN)
    return _Prompts(set(best[: held_out or _PROMPTS]), shared=not held_out)


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
    writer: TaskWriter, episodes: Iterable[Episode], prompts: _Prompts, advance: Callable[[], None]
) -> None:
    """Write the episodes of a task as training episodes, as prompts, or as both."""
    for number, episode in enumerate(episodes):
        if number in prompts.numbers:
            writer.add_prompt(episode, prompts.shared)
        if number not in prompts.numbers or prompts.shared:
            writer.add(episode)
        advance()


def _split_datasets(pairs: Sequence[str]) -> dict[str, str]:
    """Data set and task of each NAME=TASK."""
    datasets = {}
    for pair in pairs:
        name, _, task = pair.rpartition("=")
        if not name or not task:
            raise UserError(f"--dataset {pair}: give NAME=TASK, a data set and the task it is of")
        datasets[name] = task
    return datasets


def _settings(config: ImportConfig, family: str, tasks: Sequence[str]) -> dict[str, Any]:
    settings = asdict(config) | {"source": str(config.source), "tasks": list(tasks)}
    settings |= {"family": family, "datasets": _split_datasets(config.datasets)}
    del settings["output"]
    return settings
