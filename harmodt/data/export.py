"""Write a store as Minari's data sets, one per task: `python -m harmodt.data export`.

A store has no observation after an episode's last action, and Minari wants one: the last one is
there twice, and an import leaves it out again. Every episode ends with a termination or a
truncation, by the rule of `transitions.is_terminal` where the store does not know. Where it is
known whether the episode was solved, `infos["success"]` is that at its last step and 0 before.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import tyro

from ..environments import EnvironmentSpec, family
from ..errors import UserError
from ..files import owned, replace_directory
from ..progress import progress_bar
from .importers.minari import PROMPTS, minari_storage
from .store import EPISODE_ARRAYS, DataStore, Episodes, TaskData
from .transitions import is_terminal

_OVERHEAD = 2**15  # bytes more than the arrays that an episode may take; HDF5 takes 13,000


@dataclass(frozen=True)
class ExportConfig:
    """Write a store as Minari's data sets: NAMESPACE/<task>-v0 for each task.

    Its prompts become NAMESPACE/<task>-prompts-v0. All appear at once, when all are written.
    """

    store: tyro.conf.Positional[Path]
    """Directory of the store."""
    output: Path
    """The folder of all of Minari's data sets: ~/.minari/datasets, or what MINARI_DATASETS_PATH
    names."""
    namespace: str = "harmodt"
    """A new folder in it, for these."""
    tasks: tuple[str, ...] = ()
    """Tasks to write, by name or by set; all by default."""
    storage: Literal["hdf5", "arrow"] = "hdf5"
    """How Minari stores them; arrow needs the package pyarrow."""


def export_data(config: ExportConfig, progress: bool = True) -> dict[str, str]:
    """Export a store; returns the task of each data set that was written, by its id.

    Raises:
        UserError: there is no such store or task, the store is damaged, Minari is missing, or the
            namespace cannot be one, or is there already.
    """
    store = DataStore.open(config.store)
    minari_storage()  # before anything is made
    namespace = PurePosixPath(config.namespace).as_posix()
    names = config.tasks and family(store.environment.family).resolve_tasks(config.tasks)
    store.verify()
    parts = _parts([store.task(name) for name in names or store.tasks], namespace)
    final = config.output / namespace
    temporary = final.with_name(f".{final.name}.tmp")
    with owned(config.output), progress_bar("episodes", enabled=progress) as bar:
        if final.exists():
            raise UserError(f"{final} is there already: choose another --namespace or delete it")
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        total = sum(len(episodes) for _, episodes in parts.values())
        advance = partial(bar.advance, bar.add_task("exporting", total=total))
        try:
            for name, (task, episodes) in parts.items():
                # Minari adds up the sizes of its files by their whole paths.
                path = (temporary / name.removeprefix(f"{namespace}/")).absolute()
                path.mkdir(parents=True)
                _check_room(path, episodes)
                dataset = _create(path / "data", config.storage, name, task, store.environment)
                dataset.update_episodes(_buffers(episodes, store.environment, advance))
            replace_directory(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return {name: task for name, (task, _) in parts.items()}


def options_of_import(config: ExportConfig) -> list[str]:
    """The options under which an import of what was exported gives the same store again."""
    store = DataStore.open(config.store)
    environment = store.environment
    # A task's own prompts are taken in any case, and one without any gets none.
    options = ["--family", environment.family, "--prompt-episodes", "0"]
    if environment.reward_version:
        options += ["--reward-version", environment.reward_version]
    tasks = [store.task(name) for name in store.tasks]
    if any((abs(part.actions) > 1).any() for task in tasks for part in (task.train, task.prompts)):
        options += ["--no-clip-actions", "--max-clipped", "1"]
    return options


def _check_room(folder: Path, episodes: Episodes) -> None:
    """Raise OSError where a folder has no room for a data set: HDF5 would crash as it fills."""
    size = sum(getattr(episodes, name).nbytes for name in EPISODE_ARRAYS)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 2 * size + (len(episodes) + 1) * _OVERHEAD)


def _parts(tasks: Sequence[TaskData], namespace: str) -> dict[str, tuple[str, Episodes]]:
    """The task and the episodes of each data set, by its id."""
    parts: dict[str, tuple[str, Episodes]] = {}
    for task in tasks:
        for suffix, episodes in (("", task.train), (PROMPTS, task.prompts)):
            name = _dataset_id(namespace, task.name, suffix)
            if name in parts:
                raise UserError(
                    f"{task.name} and {parts[name][0]} would both be {name}: export them one by "
                    "one, with --tasks and another --namespace each"
                )
            if len(episodes):
                parts[name] = (task.name, episodes)
    return parts


def _dataset_id(namespace: str, task: str, suffix: str) -> str:
    """The id of a task's data set; Minari's names have neither dots nor spaces."""
    from minari.dataset.minari_dataset import parse_dataset_id

    name = f"{namespace}/{re.sub(r'[^-_a-zA-Z0-9]', '_', task)}{suffix}-v0"
    try:
        parse_dataset_id(name)
    except ValueError as error:
        raise UserError(
            f"--namespace {namespace} cannot be one of Minari's: give at least two letters, "
            "digits, - and _, with / between folders"
        ) from error
    return name


def _create(path: Path, storage: str, name: str, task: str, environment: EnvironmentSpec) -> Any:
    """A data set of a task that has no episodes yet."""
    from gymnasium.spaces import Box

    try:
        dataset = minari_storage().new(
            path,
            observation_space=Box(-np.inf, np.inf, (environment.observation_size,), np.float32),
            action_space=Box(-1, 1, (environment.action_size,), np.float32),
            data_format=storage,
        )
    except ImportError as error:
        raise UserError(f"--storage {storage} cannot be written: {error}") from error
    rewards = environment.reward_version
    known = f", reward version {rewards}" if rewards else ""
    description = (
        f"{task} of {environment.family}{known}, exported by HarmoDT; the last observation of each "
        "episode repeats the one before."
    )
    metadata = {"dataset_id": name, "description": description}
    dataset.update_metadata(metadata | {"minari_version": version("minari")})
    return dataset


def _buffers(
    episodes: Episodes, environment: EnvironmentSpec, advance: Callable[[], None]
) -> Iterator[Any]:
    """The episodes as Minari takes them."""
    from minari.data_collector import EpisodeBuffer

    starts = episodes.episode_starts.tolist()
    successes = episodes.successes.tolist()
    terminal = is_terminal(episodes.terminated, episodes.lengths, environment).tolist()
    for (start, end), success, ended in zip(pairwise(starts), successes, terminal, strict=True):
        length = end - start
        observations = episodes.observations[start:end]
        last = np.arange(length) == length - 1
        solved = [0, *(last * success).tolist()]  # one more, for the reset
        yield EpisodeBuffer(
            observations=np.append(observations, observations[-1:], axis=0),
            actions=np.array(episodes.actions[start:end]),
            rewards=np.array(episodes.rewards[start:end]),
            terminations=last & ended,
            truncations=last & (not ended),
            infos={"success": solved} if success >= 0 else None,
        )
        advance()
