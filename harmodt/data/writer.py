"""Writes a store; a kill loses only the unfinished task."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import sealed
from ..environments import EnvironmentSpec
from ..errors import UserError
from ..files import LOCK, owned, replace_directory, sync_directory
from .store import (
    FORMAT,
    MANIFEST,
    PROMPTS,
    UNFINISHED,
    UNKNOWN,
    VERSION,
    DataStore,
    Episode,
    Episodes,
    array_types,
    read_manifest,
)


class StoreWriter:
    """Writes a store task by task, with one episode at a time in memory.

    Finished tasks survive a kill. The file `unfinished.json` lists them, and a new writer with
    the same arguments continues after them.

        with writer.task("reach-v3") as task:
            task.add(episode)
            task.add_prompt(episode)
        writer.finish(["reach-v3"])

    Args:
        path: the store's directory, which is created if it is missing.
        provenance: settings that determine the content, as JSON.
        environment: the environment in which the data were recorded.

    Raises:
        UserError: the directory holds a store, or an unfinished store with other settings.
    """

    def __init__(
        self, path: Path, provenance: dict[str, Any], environment: EnvironmentSpec
    ) -> None:
        self.environment = environment
        self.path = Path(path)
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "provenance": json.loads(json.dumps(provenance)),
            "environment": environment.to_json(),
            "tasks": {},
        }
        _check_output(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / UNFINISHED).exists():
            unfinished = read_manifest(self.path / UNFINISHED)
            if unfinished["version"] != VERSION:
                raise UserError(
                    f"{self.path} holds an unfinished store of version {unfinished['version']}, "
                    f"but this program writes version {VERSION}: choose another directory or "
                    f"delete {self.path}"
                )
            if unfinished | {"tasks": {}} != self._manifest:
                raise UserError(
                    f"{self.path} holds an unfinished store that was begun with other settings: "
                    "repeat the command with those settings, choose another directory or delete "
                    f"{self.path}"
                )
            DataStore(self.path, unfinished).verify()
            self._manifest = unfinished
        for leftover in self.path.glob(f".{UNFINISHED}.*.tmp"):
            leftover.unlink()
        self._save()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are already complete."""
        return tuple(self._manifest["tasks"])

    @contextmanager
    def task(self, name: str) -> Iterator[TaskWriter]:
        """Write the episodes of one task. They become part of the store when the block ends."""
        temporary = self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with ExitStack() as files:  # closes every file, even if writing to one fails
                writer = TaskWriter(temporary, self.environment, files)
                yield writer
                content = writer.finish()
            replace_directory(temporary, self.path / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._manifest["tasks"][name] = content
        self._save()

    def finish(self, tasks: Sequence[str]) -> DataStore:
        """Publish the store with its tasks in the given order, and open it."""
        written = self._manifest["tasks"]
        self._manifest["tasks"] = {name: written[name] for name in tasks}
        self._save()
        os.replace(self.path / UNFINISHED, self.path / MANIFEST)
        sync_directory(self.path)
        return DataStore.open(self.path)

    def _save(self) -> None:
        sealed.write(self.path / UNFINISHED, self._manifest)


class TaskWriter:
    """Writes the arrays of one task; `StoreWriter.task` makes this object.

    `add` and `add_prompt` raise ValueError for an episode that does not fit the environment.

    Args:
        path: a new directory for the arrays.
        environment: the environment in which the data were recorded.
        files: closes the files of the arrays.
    """

    def __init__(self, path: Path, environment: EnvironmentSpec, files: ExitStack) -> None:
        (path / PROMPTS).mkdir(parents=True)
        self._environment = environment
        self._train = _EpisodesWriter(path, environment, files)
        self._prompts = _EpisodesWriter(path / PROMPTS, environment, files)
        self._shared = 0
        self._moments = _Moments(environment.observation_size)

    def add(self, episode: Episode) -> None:
        """Append a training episode."""
        _check_episode(episode, self._environment)
        self._train.add(episode)
        self._moments.add(episode.observations)

    def add_prompt(self, episode: Episode, shared: bool = False) -> None:
        """Append a prompt episode; `shared` says that it is also a training episode."""
        _check_episode(episode, self._environment)
        self._prompts.add(episode)
        self._shared += shared

    def finish(self) -> dict[str, Any]:
        """Complete the arrays, and return the task's entry for the manifest."""
        train, prompts = self._train.finish(), self._prompts.finish()
        returns = self._train.returns
        return {
            "episodes": len(returns),
            "steps": self._train.steps,
            "prompt_episodes": len(self._prompts.returns),
            "shared_prompts": self._shared,
            "best_return": max(returns),
            "mean_return": float(np.mean(returns)),
            "observation_mean": self._moments.mean.tolist(),
            "observation_std": self._moments.deviation.tolist(),
            "files": train | {f"{PROMPTS}/{name}": entry for name, entry in prompts.items()},
        }


class _EpisodesWriter:
    """Appends episodes to the arrays of one `Episodes`."""

    def __init__(self, path: Path, environment: EnvironmentSpec, files: ExitStack) -> None:
        self._arrays = {
            name: _ArrayWriter(files.enter_context((path / f"{name}.npy").open("wb")), dtype, shape)
            for name, (dtype, shape) in array_types(environment).items()
        }
        self._arrays["episode_starts"].append(np.zeros(1))
        self.steps = 0
        self.returns: list[float] = []

    def add(self, episode: Episode) -> None:
        rewards = np.asarray(episode.rewards, np.float64)
        returns_to_go = rewards[::-1].cumsum()[::-1].astype(np.float32)
        self.steps += len(rewards)
        self.returns.append(float(returns_to_go[0]))
        added = Episodes(
            observations=episode.observations,
            actions=episode.actions,
            rewards=rewards,
            returns_to_go=returns_to_go,
            episode_starts=np.array([self.steps]),
            successes=np.array([episode.success]),
            terminated=np.array([episode.terminated]),
        )
        for name, array in self._arrays.items():
            array.append(getattr(added, name))

    def finish(self) -> dict[str, Any]:
        return {name: array.finish() for name, array in self._arrays.items()}


class _ArrayWriter:
    """Appends to an .npy file whose final length is not known in advance."""

    def __init__(self, file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._length = 0
        self._crc32 = 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        block = np.ascontiguousarray(values, self._dtype)
        self._file.write(block.data)
        self._length += len(block)
        self._crc32 = zlib.crc32(block.data, self._crc32)

    def finish(self) -> dict[str, Any]:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        return {
            "dtype": self._dtype.str,
            "shape": [self._length, *self._shape],
            "crc32": f"{self._crc32:08x}",
        }

    def _write_header(self) -> None:
        # NumPy pads the header, so a larger first dimension needs no more bytes.
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, *self._shape), self._dtype))
        header["shape"] = (self._length, *self._shape)
        np.lib.format.write_array_header_1_0(self._file, header)


class _Moments:
    """Mean and population standard deviation of rows that arrive in blocks.

    Source: Chan, Golub, LeVeque 1983.
    """

    def __init__(self, size: int) -> None:
        self._count = 0
        self._squares = np.zeros(size)
        self.mean = np.zeros(size)

    def add(self, rows: np.ndarray) -> None:
        rows = np.asarray(rows, np.float32).astype(np.float64)
        mean = rows.mean(axis=0)
        shift = mean - self.mean
        count = self._count + len(rows)
        self._squares += ((rows - mean) ** 2).sum(axis=0)
        self._squares += shift**2 * (self._count * len(rows) / count)
        self.mean = self.mean + shift * (len(rows) / count)
        self._count = count

    @property
    def deviation(self) -> np.ndarray:
        return np.sqrt(self._squares / self._count)


def make_or_open(
    path: Path,
    command: str,
    settings: dict[str, Any],
    make: Callable[[], object],
    leftovers: Sequence[str] = (),
) -> DataStore:
    """Make a store. If the same command already made it with the same settings, only open it.

    Args:
        path: the store's directory. This process owns it while `make` runs.
        command: the command's name, which is the key of its settings in the provenance.
        settings: the settings that determine the data, as JSON.
        make: writes the store, or continues an unfinished store.
        leftovers: names of folders in the directory that are deleted when the store is complete.

    Raises:
        UserError: the directory holds something else, or another process owns it.
    """
    done = (path / MANIFEST).exists()
    # If a lock or leftovers exist, a killed command did not tidy up, or another command still runs.
    if done and not any((path / name).exists() for name in (LOCK, *leftovers)):
        return _open_finished(path, command, settings)
    if not done:
        _check_output(path)
    with owned(path):
        if not (path / MANIFEST).exists():
            make()
        store = _open_finished(path, command, settings)
        for name in leftovers:
            shutil.rmtree(path / name, ignore_errors=True)
    return store


def _open_finished(path: Path, command: str, settings: dict[str, Any]) -> DataStore:
    """Open a complete store. Raise UserError if it was made with other settings."""
    store = DataStore.open(path)
    found = store.provenance.get(command)
    found = found if isinstance(found, dict) else {}
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} already holds a store with {name} = {found.get(name)} instead of {value}: "
                f"choose another --output or delete {path}"
            )
    return store


def _check_output(path: Path) -> None:
    """Raise UserError if a path exists and is neither empty nor an unfinished store."""
    if not path.exists() or (path / UNFINISHED).exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file: choose a directory that is new or empty")
    if (path / MANIFEST).exists():
        raise UserError(f"{path} already holds a store: choose another directory or delete {path}")
    # A kill before the first save leaves the lock and the temporary file of `unfinished.json`.
    if any(
        file.name != LOCK and not file.name.startswith(f".{UNFINISHED}.") for file in path.iterdir()
    ):
        raise UserError(f"{path} holds other files: choose a directory that is new or empty")


def _check_episode(episode: Episode, environment: EnvironmentSpec) -> None:
    steps = len(episode.rewards)
    shapes = {
        "observations": (steps, environment.observation_size),
        "actions": (steps, environment.action_size),
        "rewards": (steps,),
    }
    for name, shape in shapes.items():
        found = np.shape(getattr(episode, name))
        if found != shape:
            raise ValueError(f"{name} has the shape {found}, but {shape} is needed")
    if not steps:
        raise ValueError("the episode has no steps")
    if episode.success != UNKNOWN and not environment.success:
        raise ValueError(f"{environment.family} defines no success, but the episode has one")
