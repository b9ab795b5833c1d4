"""Writes a store as Minari data sets, one per task: `python -m harmodt.data export`.

Minari requires an observation after an episode's last action, but a store has none. The export
therefore writes the last observation twice, and an import leaves the copy out again. Minari also
requires that every episode ends with a termination or a truncation. If the store does not know
which of the two it was, `transitions.is_terminal` decides. If the store knows whether an episode
was solved, `infos["success"]` is 1 or 0 at the last step, and 0 at all other steps.
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

_OVERHEAD = 2**15  # bytes that an episode may need besides its arrays; HDF5 needs 13,000


@dataclass(frozen=True)
class ExportConfig:
    """Write a store as Minari data sets: NAMESPACE/<task>-v0 for each task.

    A task's prompts become NAMESPACE/<task>-prompts-v0. All data sets appear together, after the
    last one is complete.
    """

    store: tyro.conf.Positional[Path]
    """Directory of the store."""
    output: Path
    """The folder that holds all Minari data sets: ~/.minari/datasets, or the folder that
    MINARI_DATASETS_PATH names."""
    namespace: str = "harmodt"
    """Name of a new folder in --output for the exported data sets."""
    tasks: tuple[str, ...] = ()
    """Tasks to export, by name or by set; by default all tasks."""
    storage: Literal["hdf5", "arrow"] = "hdf5"
    """Minari's storage format; arrow needs the package pyarrow."""


def export_data(config: ExportConfig, progress: bool = True) -> dict[str, str]:
    """Export a store; return the task of each written data set, by the data set's id.

    Raises:
        UserError: there is no such store or task, the store is damaged, Minari is not installed,
            or the namespace is not valid or already exists.
    """
    store = DataStore.open(config.store)
    minari_storage()  # raises before anything is written if Minari is not installed
    namespace = PurePosixPath(config.namespace).as_posix()
    names = config.tasks and family(store.environment.family).resolve_tasks(config.tasks)
    store.verify()
    parts = _parts([store.task(name) for name in names or store.tasks], namespace)
    final = config.output / namespace
    temporary = final.with_name(f".{final.name}.tmp")
    with owned(config.output), progress_bar("episodes", enabled=progress) as bar:
        if final.exists():
            raise UserError(f"{final} already exists: choose another --namespace or delete {final}")
        shutil.rmtree(temporary, ignore_errors=True)  # a killed export leaves this folder
        total = sum(len(episodes) for _, episodes in parts.values())
        advance = partial(bar.advance, bar.add_task("exporting", total=total))
        try:
            for name, (task, episodes) in parts.items():
                # Minari needs an absolute path to add up the sizes of its files.
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
    """The options of an import that makes the same store again from the exported data sets."""
    store = DataStore.open(config.store)
    environment = store.environment
    # An import always takes the exported prompts. With 0, a task without prompts gets none.
    options = ["--family", environment.family, "--prompt-episodes", "0"]
    if environment.reward_version:
        options += ["--reward-version", environment.reward_version]
    tasks = [store.task(name) for name in store.tasks]
    if any((abs(part.actions) > 1).any() for task in tasks for part in (task.train, task.prompts)):
        options += ["--no-clip-actions", "--max-clipped", "1"]
    return options


def _check_room(folder: Path, episodes: Episodes) -> None:
    """Raise OSError if the disk has no room for a data set. HDF5 would crash on a full disk."""
    size = sum(getattr(episodes, name).nbytes for name in EPISODE_ARRAYS)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 2 * size + (len(episodes) + 1) * _OVERHEAD)


def _parts(tasks: Sequence[TaskData], namespace: str) -> dict[str, tuple[str, Episodes]]:
    """The task and the episodes of each data set, by the data set's id."""
    parts: dict[str, tuple[str, Episodes]] = {}
    for task in tasks:
        for suffix, episodes in (("", task.train), (PROMPTS, task.prompts)):
            name = _dataset_id(namespace, task.name, suffix)
            if name in parts:
                raise UserError(
                    f"{task.name} and {parts[name][0]} would both become {name}: export them one "
                    "by one, with --tasks and a different --namespace for each"
                )
            if len(episodes):
                parts[name] = (task.name, episodes)
    return parts


def _dataset_id(namespace: str, task: str, suffix: str) -> str:
    """The id of a task's data set. Minari allows no dots and no spaces in a name."""
    from minari.dataset.minari_dataset import parse_dataset_id

    name = f"{namespace}/{re.sub(r'[^-_a-zA-Z0-9]', '_', task)}{suffix}-v0"
    try:
        parse_dataset_id(name)
    except ValueError as error:
        raise UserError(
            f"--namespace {namespace} is not valid in Minari: give at least two letters, "
            "digits, - and _, with / between folders"
        ) from error
    return name


def _create(path: Path, storage: str, name: str, task: str, environment: EnvironmentSpec) -> Any:
    """Create the data set of a task, without episodes."""
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
    """The episodes in Minari's form."""
    from minari.data_collector import EpisodeBuffer

    starts = episodes.episode_starts.tolist()
    successes = episodes.successes.tolist()
    terminal = is_terminal(episodes.terminated, episodes.lengths, environment).tolist()
    for (start, end), success, ended in zip(pairwise(starts), successes, terminal, strict=True):
        length = end - start
        observations = episodes.observations[start:end]
        last = np.arange(length) == length - 1
        solved = [0, *(last * success).tolist()]  # Minari adds an entry for the reset
        yield EpisodeBuffer(
            observations=np.append(observations, observations[-1:], axis=0),
            actions=np.array(episodes.actions[start:end]),
            rewards=np.array(episodes.rewards[start:end]),
            terminations=last & ended,
            truncations=last & (not ended),
            infos={"success": solved} if success >= 0 else None,
        )
        advance()
