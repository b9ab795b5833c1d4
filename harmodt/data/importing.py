"""Imports a data set of one of several formats into a store: `python -m harmodt.data import`."""

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
"""By default a task gets at most this many prompt episodes."""
_ONE_IN = 5
"""By default at most one in this many episodes is held out of training as a prompt."""


@dataclass(frozen=True)
class ImportConfig:
    """Import episodes from files into a store.

    npz files are SOURCE/<task>-v2/<number>.npz, or SOURCE/<task>/<run>/dataset/<number>.npz in
    MTDiff's layout. The command checks all episodes before it writes anything.
    """

    source: tyro.conf.Positional[Path]
    """Path of the data; for npz files, the folder that holds a folder per task."""
    output: Path
    """Directory of the store."""
    tasks: tuple[str, ...] = ()
    """Tasks by name (reach-v2, reach) or by set (mt5, mt50); by default every task that is
    found."""
    episodes: Count | None = None
    """Number of episodes to read per task, in the order of their numbers; by default all."""
    prompt_episodes: Whole | None = None
    """Number of prompts per task. The episodes of highest return become prompts, and they are held
    out of training. The default is 10, but at most a fifth of the task's episodes. If a fifth is
    less than one episode, the best episodes are both prompts and training data. Give 0 for
    algorithms without prompts. If the source has its own prompts, the import takes those."""
    min_length: Count = 1
    """Minimum number of steps of an episode. Training pads an episode that is shorter than the
    context."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be used, and list them. By default the first such episode ends
    the import."""
    datasets: Annotated[
        tuple[str, ...], tyro.conf.arg(name="dataset", metavar="NAME=TASK ...")
    ] = ()
    """The task of each data set in the source, for formats that do not name tasks."""
    clip_actions: bool = True
    """Clip actions to [-1, 1], as the environments do."""
    max_clipped: Share = 0.5
    """Largest share of a task's action values that may lie beyond [-1, 1]. If the share is larger,
    the actions are probably in other units, and the import is refused."""
    reward_version: str | None = None
    """Version of the reward function that produced the data, such as v2 in Meta-World, if it is
    known."""
    format: Annotated[str, tyro.conf.arg(help=f"Format of the source: {', '.join(IMPORTERS)}.")] = (
        "npz"
    )
    family: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Family of the environments: {', '.join(FAMILIES)}; by default the source's "
            "family."
        ),
    ] = None


def import_data(config: ImportConfig, progress: bool = True) -> DataStore:
    """Import a data set, or continue an unfinished import; return the opened store.

    If the store already exists, with the same settings and from the same files, it is only opened.
    If the source no longer exists, its files are not checked for changes.

    Raises:
        UserError: a setting is out of range; a task does not exist; an episode cannot be used;
            the actions are in other units; the source has changed since the import began; or the
            directory holds something else, or another process uses it.
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
                check_source(begun, "an unfinished import")
        episodes = {task: _find_episodes(config, source, task) for task in tasks}
        with progress_bar("episodes", enabled=progress) as bar:
            _import(config, source, environment, episodes, settings, files, bar)

    store = make_or_open(config.output, "import", settings, make)
    check_source(store.provenance, "an import")
    return store


class _Checked(NamedTuple):
    """The result of checking a task's episodes.

    Attributes:
        episodes: the episodes that can be used, in the source's order.
        returns: float64 [E], the returns of these episodes.
        clipped: the share of their action values beyond [-1, 1].
        skipped: for each other episode, the reason why it cannot be used.
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
    """Read all episodes twice: first to check them and choose the prompts, then to write them."""

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
    # The files were read twice, and could have changed in between.
    now, what = describe_files(source, tuple(episodes)), "an unfinished import"
    check_unchanged(files, now, config.source, config.output, what)
    writer.finish(tuple(episodes))


def _find_episodes(config: ImportConfig, source: Importer, task: str) -> Sequence[Any]:
    """Find the episodes of a task without reading them; the source's own prompts come last."""
    episodes = source.episodes(task)[: config.episodes]
    if config.episodes and len(episodes) < config.episodes:
        raise UserError(
            f"{task} has {len(episodes)} episodes, but --episodes asks for {config.episodes}: add "
            "the missing episodes or lower --episodes"
        )
    if own := source.prompts(task):
        return [*episodes, *own]
    _check_left(config, task, len(episodes))
    return episodes


def _check_left(config: ImportConfig, task: str, count: int) -> None:
    """Raise UserError if the prompts would take all `count` usable episodes of a task."""
    if count <= (config.prompt_episodes or 0):
        raise UserError(
            f"{task} has {count} episodes, and none is left for training if "
            f"{config.prompt_episodes} are held out as prompts: lower --prompt-episodes"
        )


class _Prompts(NamedTuple):
    """The prompts of a task.

    Attributes:
        numbers: the prompts' numbers among the task's usable episodes.
        shared: whether the prompts are also training data.
    """

    numbers: set[int]
    shared: bool


def _choose_prompts(
    config: ImportConfig, task: str, found: _Checked, given: Sequence[Any]
) -> _Prompts:
    """Choose the prompts of a task among its usable episodes.

    Args:
        config: the settings of the import.
        task: the name of the task.
        found: the usable episodes.
        given: the source's own prompts, which are the last of the task's episodes.

    Raises:
        UserError: no episode is left for training, or none of the source's prompts can be used.
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
    """Read and check an episode. Its actions are not clipped yet."""
    episode = source.read(which)
    check_episode(str(which), episode, environment, config.min_length)
    if not source.family.ends_early and episode.terminated == 1:
        episode = episode._replace(terminated=0)  # the family's environments never terminate
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
        UserError: an episode cannot be used and `skip_bad_episodes` is off, no episode can be
            used, or too many action values lie beyond [-1, 1].
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
            f"{task}: {clipped:.1%} of the action values lie beyond [-1, 1], and the environments "
            "clip them, so the actions are probably in other units: divide the actions by their "
            f"largest value, or accept them with --max-clipped {accepted}"
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
    """Raise UserError if a family has no reward function of that version."""
    known = family.reward_versions
    if version is not None and version not in known:
        advice = f"give {' or '.join(known)}" if known else "leave --reward-version out"
        raise UserError(f"{family.spec.family} has no reward version {version!r}: {advice}")


def _split_datasets(pairs: Sequence[str]) -> dict[str, str]:
    """The task of each data set, from arguments NAME=TASK."""
    datasets = {}
    for pair in pairs:
        name, _, task = pair.rpartition("=")
        if not name or not task:
            raise UserError(f"--dataset {pair}: give NAME=TASK, a data set and its task")
        datasets[name] = task
    return datasets


def _settings(config: ImportConfig, family: str, tasks: Sequence[str]) -> dict[str, Any]:
    settings = asdict(config) | {"source": str(config.source), "tasks": list(tasks)}
    settings |= {"family": family, "datasets": _split_datasets(config.datasets)}
    # These settings decide whether an import succeeds, but they do not change its result.
    for name in ("output", "skip_bad_episodes", "max_clipped"):
        del settings[name]
    return settings
