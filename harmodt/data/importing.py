"""Bring a data set of some format into a store: `python -m harmodt.data import`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import tyro
from rich.progress import Progress

from ..environments import FAMILIES, EnvironmentFamily, EnvironmentSpec
from ..errors import UserError
from ..progress import progress_bar
from ..settings import Count, Share, Whole, check
from .importers import IMPORTERS, Importer, check_episode, importer
from .sources import Files, Record, check_unchanged, describe_files, read_record
from .store import UNFINISHED, UNKNOWN, DataStore, Episode, read_manifest
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
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be used, and list them; else the first one ends the import."""
    datasets: Annotated[
        tuple[str, ...], tyro.conf.arg(name="dataset", metavar="NAME=TASK ...")
    ] = ()
    """NAME=TASK, for formats that know no tasks: which of the source's data sets is which task."""
    clip_actions: bool = True
    """Clip actions to [-1, 1], which is what the environments execute."""
    max_clipped: Share = 0.5
    """The largest share of a task's action values that may lie beyond [-1, 1]. Where it is larger,
    the actions are probably in other units, and the import is refused."""
    reward_version: str | None = None
    """Of the reward function that the data were made with, such as v2 in Meta-World, if known."""
    format: Annotated[str, tyro.conf.arg(help=f"Of the source: {', '.join(IMPORTERS)}.")] = "npz"
    family: Annotated[
        str | None,
        tyro.conf.arg(help=f"The environments: {', '.join(FAMILIES)}; by default the source's."),
    ] = None


def import_data(config: ImportConfig, progress: bool = True) -> DataStore:
    """Import a data set, or go on with an import that was begun; returns the store opened.

    A store that is there already and was made with the same settings from the same files is opened
    as it is. If the source is no longer there, its files are not compared.

    Raises:
        UserError: a setting out of range, a task that is not there, an episode that cannot be
            used, actions in other units, a source that has changed since the import was made or
            begun, or a directory that holds something else or is another process's at present.
    """
    check(config)
    datasets = _split_datasets(config.datasets)
    source = importer(config.format, config.source, config.family, config.tasks, datasets)
    _check_reward_version(config.reward_version, source.family)
    tasks = source.resolve_tasks(config.tasks) if config.tasks else source.tasks()
    settings = _settings(config, source.family.spec.family, tasks)
    environment = replace(source.family.spec, reward_version=config.reward_version)
    files = describe_files(source, tasks)

    def check_source(provenance: dict[str, Any], what: str) -> None:
        then = read_record(provenance, config.output).files
        check_unchanged(then, files, config.source, config.output, what)

    def make() -> None:
        if (config.output / UNFINISHED).exists():
            begun = read_manifest(config.output / UNFINISHED)["provenance"]
            if begun.get("import") == settings:
                check_source(begun, "the beginning of an import")
        episodes = {task: _find_episodes(config, source, task) for task in tasks}
        with progress_bar("episodes", enabled=progress) as bar:
            _import(config, source, environment, episodes, settings, files, bar)

    store = make_or_open(config.output, "import", settings, make)
    check_source(store.provenance, "an import")
    return store


class _Checked(NamedTuple):
    """What was found when a task's episodes were read to check them.

    Attributes:
        episodes: those that can be used, in their order.
        returns: float64 [E], of these.
        clipped: the share of their action values beyond [-1, 1].
        skipped: why each of the others cannot be used.
    """

    episodes: list[Any]
    returns: np.ndarray
    clipped: float
    skipped: list[str]


def _import(
    config: ImportConfig,
    source: Importer,
    environment: EnvironmentSpec,
    episodes: dict[str, Sequence[Any]],
    settings: dict[str, Any],
    files: dict[str, Files],
    bar: Progress,
) -> None:
    """Read all episodes once to check them and to choose the prompts, and again to write them."""

    def read(episode: Any) -> Episode:
        return _read_episode(config, source, environment, episode)

    total = sum(map(len, episodes.values()))
    advance = partial(bar.advance, bar.add_task("checking", total=total))
    checked = {task: _check_task(config, task, episodes[task], read, advance) for task in episodes}
    prompts = {
        task: _choose_prompts(config, task, found, source.prompts(task))
        for task, found in checked.items()
    }
    record = Record(
        files=files,
        clipped={task: found.clipped for task, found in checked.items()},
        skipped={task: found.skipped for task, found in checked.items()},
    )
    provenance = {"import": settings, **msgspec.to_builtins(record)}
    writer = StoreWriter(config.output, provenance, environment)
    line = bar.add_task("importing", total=sum(len(found.episodes) for found in checked.values()))
    advance = partial(bar.advance, line)
    for task, found in checked.items():
        if task in writer.tasks:
            bar.advance(line, len(found.episodes))
        else:
            with writer.task(task) as task_writer:
                _write_task(config, task_writer, map(read, found.episodes), prompts[task], advance)
    # What was checked and what was written come from two readings of the files.
    now, what = describe_files(source, tuple(episodes)), "the beginning of an import"
    check_unchanged(files, now, config.source, config.output, what)
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
    _check_left(config, task, len(episodes))
    return episodes


def _check_left(config: ImportConfig, task: str, count: int) -> None:
    """Raise UserError where no episode is left to train on, of so many that can be used."""
    if count <= (config.prompt_episodes or 0):
        raise UserError(
            f"{task} has {count} episodes, and none is left to train on when "
            f"{config.prompt_episodes} are held apart as prompts: lower --prompt-episodes"
        )


class _Prompts(NamedTuple):
    """The prompts of a task: numbers of its episodes, and whether these are training data too."""

    numbers: set[int]
    shared: bool


def _choose_prompts(
    config: ImportConfig, task: str, found: _Checked, given: Sequence[Any]
) -> _Prompts:
    """Choose the prompts of a task among its episodes that can be used.

    Args:
        given: the prompts that the source itself holds apart; they are the last episodes.

    Raises:
        UserError: nothing is left to train on, or none of the source's prompts can be used.
    """
    count, own = len(found.episodes), len(set(given) & set(found.episodes))
    if given:
        if own in (0, count):
            which = "episodes besides its prompts" if own else "prompts"
            raise UserError(f"{task}: none of its {which} can be used: {found.skipped[-1]}")
        return _Prompts(set(range(count - own, count)), shared=False)
    _check_left(config, task, count)
    best = np.argsort(-found.returns, kind="stable").tolist()
    if config.prompt_episodes is not None:
        return _Prompts(set(best[: config.prompt_episodes]), shared=False)
    held_out = min(_PROMPTS, count // _ONE_IN)
    return _Prompts(set(best[: held_out or _PROMPTS]), shared=not held_out)


def _read_episode(
    config: ImportConfig, source: Importer, environment: EnvironmentSpec, which: Any
) -> Episode:
    """Read and check an episode; its actions are as the source has them."""
    episode = source.read(which)
    check_episode(str(which), episode, environment, config.min_length)
    if not source.family.ends_early and episode.terminated == 1:
        episode = episode._replace(terminated=0)  # the environments would have gone on
    return episode if environment.success else episode._replace(success=UNKNOWN)


def _check_task(
    config: ImportConfig,
    task: str,
    episodes: Sequence[Any],
    read: Callable[[Any], Episode],
    advance: Callable[[], None],
) -> _Checked:
    """Read the episodes of a task to check them.

    Raises:
        UserError: one cannot be used and is not to be skipped, none can be used, or too many
            actions lie beyond [-1, 1].
    """
    usable, returns, skipped, beyond, values = [], [], [], 0, 0
    for which in episodes:
        advance()
        try:
            episode = read(which)
        except UserError as error:
            if not config.skip_bad_episodes:
                raise
            skipped.append(str(error))
            continue
        usable.append(which)
        returns.append(episode.rewards.sum(dtype=np.float64))
        beyond += int(np.count_nonzero(abs(episode.actions) > 1))
        values += episode.actions.size
    if not usable:
        raise UserError(f"{task} has no episode that can be used: {skipped[0]}")
    clipped = beyond / values
    if clipped > config.max_clipped:
        accepted = math.ceil(clipped * 100) / 100
        raise UserError(
            f"{task}: {clipped:.1%} of the action values lie beyond [-1, 1], which is what the "
            "environments execute, so they are probably in other units: divide the actions by "
            f"their largest value, or accept them with --max-clipped {accepted}"
        )
    return _Checked(usable, np.array(returns), clipped, skipped)


def _write_task(
    config: ImportConfig,
    writer: TaskWriter,
    episodes: Iterable[Episode],
    prompts: _Prompts,
    advance: Callable[[], None],
) -> None:
    """Write the episodes of a task as training episodes, as prompts, or as both."""
    for number, episode in enumerate(episodes):
        if config.clip_actions:
            episode = episode._replace(actions=episode.actions.clip(-1, 1))
        if number in prompts.numbers:
            writer.add_prompt(episode, prompts.shared)
        if number not in prompts.numbers or prompts.shared:
            writer.add(episode)
        advance()


def _check_reward_version(version: str | None, family: EnvironmentFamily) -> None:
    """Raise UserError where a family has no reward function of that name."""
    known = family.reward_versions
    if version is not None and version not in known:
        advice = f"give {' or '.join(known)}" if known else "leave --reward-version out"
        raise UserError(f"{family.spec.family} has no reward version {version!r}: {advice}")


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
    # These do not change what an import makes of the same source, but whether it succeeds.
    for name in ("output", "skip_bad_episodes", "max_clipped"):
        del settings[name]
    return settings
