"""Makes offline data sets by running experts.

    python -m harmodt.collect --output data/mt5 --tasks mt5 --episodes 100

The work is divided into parts of a few episodes. A worker process writes each part to a file,
either completely or not at all. Every episode has its own random generator. Its seed follows from
the collection's seed, the task, the kind of episode (training or prompt) and the episode's number.
The store therefore has the same bytes for every number of workers, and also after a kill.
"""

from __future__ import annotations

import functools
import io
import shutil
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from msgspec import Meta

from .cores import count_cores
from .data.store import UNKNOWN, DataStore, Episode
from .data.writer import StoreWriter, make_or_open
from .environments import FAMILIES, Environment, EnvironmentFamily, family_of
from .environments import family as family_named
from .errors import UserError, printable, run_command
from .files import checksum, read_bytes, write_bytes
from .progress import progress_bar
from .settings import ABOVE_ZERO, Count, NotNegative, Share, Whole, check, parse_arguments
from .workers import Served, Worker, end_workers, spread

_PARTS = "parts"
_LENGTHS = "lengths"
_EPISODES_PER_PART = 10
_PER_EPISODE = ("success", "terminated")  # the fields of an `Episode` that are a single number


@dataclass(frozen=True)
class CollectConfig:
    """Collect an offline data set with Meta-World's scripted experts or with trained walkers.

    To continue an interrupted collection, give the same command again.
    """

    output: Path
    """Directory of the store."""
    tasks: tuple[str, ...] = ("mt5",)
    """Tasks by name (reach-v3, reach) or by set (mt5, mt10, mt30, mt50, cheetah-vel-train)."""
    episodes: Count = 100
    """Training episodes per task."""
    prompt_episodes: Whole = 10
    """Additional episodes per task that are stored as prompts."""
    composition: Literal["near-optimal", "sub-optimal"] = "near-optimal"
    """near-optimal: exploration falls to none from the first to the last episode, as in a replay
    buffer. sub-optimal: the data are the first half of such a buffer."""
    prompt_source: Literal["expert", "composition"] | None = None
    """expert: prompts are recorded without exploration, which is the default for near-optimal data.
    composition: prompts have the same exploration as the training episodes, which is the default
    for sub-optimal data."""
    seed: Whole = 0
    """Seed of the random numbers. It determines every bit of the data, for any number of
    workers."""
    episode_length: Count | None = None
    """Steps per episode; the default is the length of the environments' episodes."""
    noise_start: NotNegative = 0.25
    """Standard deviation of the Gaussian action noise in the first episode; it falls linearly to
    0."""
    random_start: Share = 0.8
    """Share of uniformly random actions in the first episode."""
    random_end: Annotated[float, Meta(ge=ABOVE_ZERO, le=1)] = 0.5
    """Share of the episodes after which no action is random; until then, the share of random
    actions falls linearly to 0."""
    workers: Count | None = None
    """Number of worker processes; by default one per core."""
    family: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Family of the environments: {', '.join(FAMILIES)}; by default the tasks' family."
        ),
    ] = None


def collect(config: CollectConfig, progress: bool = True) -> DataStore:
    """Collect a store, or continue an unfinished store; return the opened store.

    If a store with the same settings already exists, it is only opened.

    Raises:
        UserError: a setting is out of range; a task is unknown or has no expert; the directory
            holds something else, or another process uses it; a worker process was killed.
        OSError: the system refuses something, such as a write to a full disk. The episodes
            collected so far are kept.
        MemoryError: a worker process got no memory.
        WorkerError: a worker process met another error.
    """
    check(config)
    found = family_named(config.family) if config.family else family_of(config.tasks)
    config = _resolve(config, found)
    longest = found.spec.episode_length
    if config.episode_length and config.episode_length > longest:
        raise UserError(f"episode_length is {config.episode_length}: give 1 to {longest}")
    settings = _settings(config)

    def make() -> None:
        versions = {name: version(name) for name in (*found.packages, "numpy")}
        provenance = {"collect": settings, "versions": versions}
        writer = StoreWriter(config.output, provenance, found.spec)
        _write_tasks(config, found, writer, progress)
        writer.finish(config.tasks)

    for task in config.tasks:
        found.expert(task)  # raises now, before any work, if a task has no expert
    return make_or_open(config.output, "collect", settings, make, leftovers=(_PARTS,))


def exploration(config: CollectConfig, episode: int, episodes: int) -> tuple[float, float]:
    """The standard deviation of the noise and the share of random actions in one episode.

    Both fall linearly to 0 from the first episode on. The noise reaches 0 at the last episode, the
    share of random actions at the fraction `random_end` of the episodes. The schedule of
    sub-optimal data is the first half of a near-optimal schedule with twice as many episodes.

    Args:
        config: the settings of the collection.
        episode: the episode's number, from 0.
        episodes: the number of episodes in the schedule.
    """
    schedule = episodes * (2 if config.composition == "sub-optimal" else 1)
    position = episode / max(1, schedule - 1)
    noise = config.noise_start * (1 - position)
    random = config.random_start * max(0.0, 1 - position / config.random_end)
    return noise, random


def _resolve(config: CollectConfig, family: EnvironmentFamily) -> CollectConfig:
    """Fill in the full names of the tasks and all defaults."""
    prompts: Literal["expert", "composition"]
    prompts = "composition" if config.composition == "sub-optimal" else "expert"
    length = config.episode_length
    return replace(
        config,
        family=family.spec.family,
        tasks=family.resolve_tasks(config.tasks),
        prompt_source=config.prompt_source or prompts,
        episode_length=family.spec.episode_length if length is None else length,
    )


class _Part(NamedTuple):
    """Consecutive episodes of one task that one worker collects into one file."""

    task: str
    kind: Literal["train", "prompts"]
    start: int
    stop: int

    def path(self, output: Path) -> Path:
        return output / _PARTS / self.task / f"{self.kind}-{self.start:07d}.part"


def _parts(config: CollectConfig, task: str) -> list[_Part]:
    kinds: list[tuple[Literal["train", "prompts"], int]] = [
        ("train", config.episodes),
        ("prompts", config.prompt_episodes),
    ]
    return [
        _Part(task, kind, start, min(start + _EPISODES_PER_PART, count))
        for kind, count in kinds
        for start in range(0, count, _EPISODES_PER_PART)
    ]


def _write_tasks(
    config: CollectConfig, family: EnvironmentFamily, writer: StoreWriter, progress: bool
) -> None:
    """Collect the missing parts of all tasks; write each task to the store when it is complete."""
    tasks = [task for task in config.tasks if task not in writer.tasks]
    parts = {task: _parts(config, task) for task in tasks}
    missing = {
        task: {part for part in parts[task] if _read_part(config, part) is None} for task in tasks
    }
    work = [part for task in tasks for part in parts[task] if part in missing[task]]
    # `closing` ends the workers, also after an error.
    with (
        closing(_collect_parts(config, family, work)) as collected,
        progress_bar("episodes", enabled=progress) as bar,
    ):
        total = sum(_episodes(parts[task]) for task in tasks)
        line = bar.add_task("collecting", total=total, completed=total - _episodes(work))
        for task in tasks:
            if not missing[task]:
                _write_task(config, writer, task)
        for part in collected:
            bar.update(line, advance=_episodes([part]), description=f"collecting {part.task}")
            missing[part.task].remove(part)
            if not missing[part.task]:
                _write_task(config, writer, part.task)


def _write_task(config: CollectConfig, writer: StoreWriter, task: str) -> None:
    with writer.task(task) as task_writer:
        for part in _parts(config, task):
            add = task_writer.add if part.kind == "train" else task_writer.add_prompt
            fields = _read_part(config, part)
            if fields is None:
                path = part.path(config.output)
                raise UserError(
                    f"{path} changed during the collection: give the same command again"
                )
            for values in zip(*fields, strict=True):
                add(Episode(*values))
    shutil.rmtree(config.output / _PARTS / task)


def _read_part(config: CollectConfig, part: _Part) -> list[Sequence[Any]] | None:
    """Read the fields of a part's episodes; None if the file is missing or damaged."""
    try:
        content = read_bytes(part.path(config.output))
    except (FileNotFoundError, UserError):
        return None
    if content[:8] != _seal(part, content[8:]):
        return None
    with np.load(io.BytesIO(content[8:]), allow_pickle=False) as arrays:
        ends = np.cumsum(arrays[_LENGTHS])[:-1]
        return [
            arrays[name] if name in _PER_EPISODE else np.split(arrays[name], ends)
            for name in Episode._fields
        ]


def _seal(part: _Part, content: bytes) -> bytes:
    """The first bytes of a part's file: the checksum of the part's name, fields and content.

    An earlier version of this program may have written a part that lacks a field. Such a part does
    not match this checksum, and is collected again.
    """
    return checksum(repr((part, Episode._fields)).encode() + content).encode()


def _collect_parts(
    config: CollectConfig, family: EnvironmentFamily, parts: list[_Part]
) -> Generator[_Part, None, None]:
    """Collect parts in worker processes; yield each part when its file is written."""
    for directory in {part.path(config.output).parent for part in parts}:
        directory.mkdir(parents=True, exist_ok=True)
    make = functools.partial(_Collector, config, family)
    workers: list[Worker] = []
    try:
        for _ in range(min(config.workers or count_cores(), len(parts))):
            workers.append(Worker(make, "a worker", "use fewer --workers"))
        yield from spread(workers, _Collector.collect, parts)
    finally:
        end_workers(workers)


class _Collector(Served):
    """Runs in a worker process, and writes the requested parts."""

    def __init__(self, config: CollectConfig, family: EnvironmentFamily) -> None:
        self._config = config
        self._family = family

    def collect(self, part: _Part) -> None:
        """Collect a part and write its file."""
        _collect_part(self._config, self._family, part)


def _collect_part(config: CollectConfig, family: EnvironmentFamily, part: _Part) -> None:
    numbers = range(part.start, part.stop)
    episodes = [_run_episode(config, family, part, number) for number in numbers]
    arrays = {_LENGTHS: np.array([len(episode.rewards) for episode in episodes])}
    for name, values in zip(Episode._fields, zip(*episodes, strict=True), strict=True):
        arrays[name] = np.array(values) if name in _PER_EPISODE else np.concatenate(values)
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_bytes(part.path(config.output), _seal(part, content.getvalue()) + content.getvalue())


@functools.lru_cache(maxsize=1)
def _make_environment(family: EnvironmentFamily, task: str) -> Environment:
    return family.make(task)


def _run_episode(
    config: CollectConfig, family: EnvironmentFamily, part: _Part, number: int
) -> Episode:
    """Run the expert, with exploration, for one episode; return it with the executed actions."""
    spec, steps = family.spec, config.episode_length
    assert steps is not None
    key = [config.seed, zlib.crc32(part.task.encode()), part.kind == "prompts", number]
    generator = np.random.default_rng(key)
    deviation, share = _exploration_of(config, part, number)
    environment = _make_environment(family, part.task)
    observation = environment.reset_random(int(generator.integers(2**31)))
    noise = generator.normal(0, 1, (steps, spec.action_size)) * deviation
    at_random = generator.random(steps) < share
    random_actions = generator.uniform(-1, 1, (steps, spec.action_size))

    expert = family.expert(part.task)
    observations = np.empty((steps, spec.observation_size), np.float32)
    actions = np.empty((steps, spec.action_size), np.float32)
    rewards = np.empty(steps, np.float32)
    solved = False
    for step in range(steps):
        observations[step] = observation
        action = random_actions[step] if at_random[step] else expert(observation)
        actions[step] = (action + noise[step]).clip(-1, 1)
        observation, rewards[step], solved_now = environment.step(actions[step])
        solved = solved or solved_now
        if environment.ended:
            steps = step + 1
            break
    success = int(solved) if spec.success else UNKNOWN
    arrays = observations[:steps], actions[:steps], rewards[:steps]
    return Episode(*arrays, success, terminated=int(environment.ended))


def _exploration_of(config: CollectConfig, part: _Part, number: int) -> tuple[float, float]:
    """The deviation of the noise and the share of random actions in an episode of a part."""
    if part.kind == "train":
        return exploration(config, number, config.episodes)
    if config.prompt_source == "expert":
        return 0.0, 0.0
    return exploration(config, number, config.prompt_episodes)


def _settings(config: CollectConfig) -> dict[str, Any]:
    """The settings that determine the data, as JSON values."""
    settings = {**asdict(config), "tasks": list(config.tasks)}
    return {name: value for name, value in settings.items() if name not in ("output", "workers")}


def _episodes(parts: list[_Part]) -> int:
    return sum(part.stop - part.start for part in parts)


def main() -> None:
    config: CollectConfig = parse_arguments(CollectConfig, prog="python -m harmodt.collect")
    store = collect(config)
    print(f"{printable(config.output)}: {len(store.tasks)} tasks, {store.steps} steps")


if __name__ == "__main__":
    # Workers import classes by the name of their module, and could not import from "__main__".
    from harmodt.collect import main as main_of_module

    run_command(main_of_module)
