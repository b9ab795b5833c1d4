"""The on-disk store of offline data: memory-mapped arrays per task and a manifest.

    DIR/manifest.json              format, version, provenance, statistics, checksums
    DIR/<task>/<array>.npy         the training episodes of a task, one after the other
    DIR/<task>/prompts/<array>.npy the prompt episodes, held apart

The manifest is written last and atomically, so a directory without one is no store yet. While
a store is being written the finished tasks are listed in `unfinished.json`, from which an
interrupted writer goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..environments.metaworld_names import ACTION_SIZE, OBSERVATION_SIZE
from ..errors import UserError
from ..files import replace_directory, sync_directory, write_json

FORMAT = "harmodt-store"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
PROMPTS = "prompts"
UNKNOWN = -1
"""The success of an episode whose source does not tell."""

_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "observations": ("<f4", (OBSERVATION_SIZE,)),
    "actions": ("<f4", (ACTION_SIZE,)),
    "rewards": ("<f4", ()),
    "returns_to_go": ("<f4", ()),
    "episode_starts": ("<i8", ()),
    "successes": ("|i1", ()),
}
"""Name of every array, its dtype and the shape of one entry."""

_HEADER_SIZE = 128
"""Bytes before the data of every array's file."""


class Episode(NamedTuple):
    """One episode of T steps: observations [T, 39], actions [T, 4], rewards [T], all float32.

    The success is 1 or 0 (at any step), or -1 where the source does not say.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    success: int


@dataclass(frozen=True)
class Episodes:
    """Episodes of one task, one after the other; E episodes with S steps in all.

    Attributes:
        observations: float32 [S, 39], unnormalised.
        actions: float32 [S, 4].
        rewards: float32 [S].
        returns_to_go: float32 [S], undiscounted sum of this and all later rewards of the episode.
        episode_starts: int64 [E + 1], first step of each episode, then S.
        successes: int8 [E], 1 solved, 0 not solved, -1 unknown.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    returns_to_go: np.ndarray
    episode_starts: np.ndarray
    successes: np.ndarray

    def __len__(self) -> int:
        return len(self.successes)

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, int64 [E]."""
        return np.diff(self.episode_starts)

    @property
    def returns(self) -> np.ndarray:
        """Return of each episode, float32 [E]."""
        return self.returns_to_go[self.episode_starts[:-1]]


@dataclass(frozen=True)
class TaskData:
    """What a store holds of one task.

    Attributes:
        name: the v3 task name.
        train, prompts: the training episodes and the prompt episodes.
        observation_mean, observation_std: float32 [39], over the steps of the training episodes;
            the population deviation, without a floor.
        best_return, mean_return: over the training episodes.
    """

    name: str
    train: Episodes
    prompts: Episodes
    observation_mean: np.ndarray
    observation_std: np.ndarray
    best_return: float
    mean_return: float


@dataclass(frozen=True)
class DataStore:
    """A finished store, opened for reading; the arrays stay on disk until they are used."""

    path: Path
    manifest: dict[str, Any]
    _opened: dict[str, TaskData] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> DataStore:
        """Open the store in a directory: reads the manifest, checks that the files are there.

        Raises:
            UserError: no store, an unfinished or damaged one, or one of another version.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(_why_no_store(path))
        store = cls(path, _read_manifest(path / MANIFEST))
        for name, entry in store.files.items():
            _check_size(path / name, entry)
        return store

    @property
    def tasks(self) -> tuple[str, ...]:
        """The v3 names of the tasks, in the order in which they were written."""
        return tuple(self.manifest["tasks"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the data come from: the settings of the command that made the store."""
        return self.manifest["provenance"]

    def task(self, name: str) -> TaskData:
        """The data of one task.

        Raises:
            UserError: the store has no such task.
        """
        if name not in self.manifest["tasks"]:
            raise UserError(
                f"the store {self.path} has no task {name!r}: it holds {', '.join(self.tasks)}"
            )
        if name not in self._opened:
            self._opened[name] = self._open_task(name)
        return self._opened[name]

    @property
    def steps(self) -> int:
        """Training steps of all tasks."""
        return sum(content["steps"] for content in self.manifest["tasks"].values())

    def verify(self, progress: Callable[[str], None] | None = None) -> None:
        """Read every array once and compare its checksum; `progress` is told each file's name.

        Raises:
            UserError: a file differs from what was written.
        """
        for name, entry in self.files.items():
            if progress:
                progress(name)
            array = _open_array(self.path / name, entry)
            if f"{zlib.crc32(array.data):08x}" != entry["crc32"]:
                raise UserError(
                    f"the checksum of {self.path / name} fails: the file has changed since it was "
                    "written; restore it from a copy or make the store again"
                )

    def size(self, task: str) -> int:
        """Bytes on disk of one task's arrays."""
        files = self.manifest["tasks"][task]["files"]
        return sum((self.path / task / f"{name}.npy").stat().st_size for name in files)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Path of every array below the store, with its dtype, shape and checksum."""
        return {
            f"{task}/{name}.npy": entry
            for task, content in self.manifest["tasks"].items()
            for name, entry in content["files"].items()
        }

    def _open_task(self, name: str) -> TaskData:
        content = self.manifest["tasks"][name]
        return TaskData(
            name=name,
            train=_open_episodes(self.path / name, content["files"], ""),
            prompts=_open_episodes(self.path / name, content["files"], f"{PROMPTS}/"),
            observation_mean=np.array(content["observation_mean"], np.float32),
            observation_std=np.array(content["observation_std"], np.float32),
            best_return=content["best_return"],
            mean_return=content["mean_return"],
        )


class StoreWriter:
    """Writes a store task by task, an episode at a time in memory.

    Finished tasks survive a kill: a writer opened again with the same provenance goes on after
    them.

        with writer.task("reach-v3") as task:
            task.add(episode)
            task.add_prompt(episode)
        writer.finish()

    Args:
        path: the store's directory, made where it is missing.
        provenance: settings that determine the content, as JSON.

    Raises:
        UserError: the directory holds a store, or the beginning of one with another provenance.
    """

    def __init__(self, path: Path, provenance: dict[str, Any]) -> None:
        self.path = Path(path)
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "provenance": json.loads(json.dumps(provenance)),
            "tasks": {},
        }
        check_output(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / UNFINISHED).exists():
            unfinished = _read_manifest(self.path / UNFINISHED)
            if unfinished["provenance"] != self._manifest["provenance"]:
                raise UserError(
                    f"{self.path} holds the beginning of a store made with other settings: repeat "
                    "the command with those, choose another directory or delete it"
                )
            self._manifest = unfinished
        for leftover in self.path.glob(f".{UNFINISHED}.*.tmp"):
            leftover.unlink()
        self._save()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are written whole."""
        return tuple(self._manifest["tasks"])

    @contextmanager
    def task(self, name: str) -> Iterator[TaskWriter]:
        """Write the episodes of one task; they become part of the store when the block ends."""
        temporary = self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with TaskWriter(temporary) as writer:
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
        checksum = _manifest_checksum(self._manifest)
        write_json(self.path / UNFINISHED, {**self._manifest, "crc32": checksum})


class TaskWriter:
    """Writes the arrays of one task; made by `StoreWriter.task`."""

    def __init__(self, path: Path) -> None:
        (path / PROMPTS).mkdir(parents=True)
        self._train = _EpisodesWriter(path)
        self._prompts = _EpisodesWriter(path / PROMPTS)
        self._moments = _Moments()

    def add(self, episode: Episode) -> None:
        """Append a training episode."""
        self._train.add(episode)
        self._moments.add(episode.observations)

    def add_prompt(self, episode: Episode) -> None:
        """Append a prompt episode."""
        self._prompts.add(episode)

    def finish(self) -> dict[str, Any]:
        """Complete the arrays; returns the entry of the task in the manifest."""
        train, prompts = self._train.finish(), self._prompts.finish()
        returns = self._train.returns
        return {
            "episodes": len(returns),
            "steps": self._train.steps,
            "prompt_episodes": len(self._prompts.returns),
            "successful_episodes": self._train.successes.count(1),
            "best_return": max(returns),
            "mean_return": float(np.mean(returns)),
            "observation_mean": self._moments.mean.tolist(),
            "observation_std": self._moments.deviation.tolist(),
            "files": train | {f"{PROMPTS}/{name}": entry for name, entry in prompts.items()},
        }

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._train.close()
        self._prompts.close()


class _EpisodesWriter:
    """Appends episodes to the six arrays of one `Episodes`."""

    def __init__(self, path: Path) -> None:
        self._arrays = {
            name: _ArrayWriter(path / f"{name}.npy", dtype, shape)
            for name, (dtype, shape) in _ARRAYS.items()
        }
        self._arrays["episode_starts"].append(np.zeros(1))
        self.steps = 0
        self.returns: list[float] = []
        self.successes: list[int] = []

    def add(self, episode: Episode) -> None:
        rewards = np.asarray(episode.rewards, np.float64)
        returns_to_go = rewards[::-1].cumsum()[::-1].astype(np.float32)
        self.steps += len(rewards)
        self.returns.append(float(returns_to_go[0]))
        self.successes.append(episode.success)
        self._arrays["observations"].append(episode.observations)
        self._arrays["actions"].append(episode.actions)
        self._arrays["rewards"].append(rewards)
        self._arrays["returns_to_go"].append(returns_to_go)
        self._arrays["episode_starts"].append(np.array([self.steps]))
        self._arrays["successes"].append(np.array([episode.success]))

    def finish(self) -> dict[str, Any]:
        return {name: array.finish() for name, array in self._arrays.items()}

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()


class _ArrayWriter:
    """Appends to an .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._length = 0
        self._crc32 = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        block = np.ascontiguousarray(values, self._dtype)
        if block.shape[1:] != self._shape:
            raise ValueError(f"entries of shape {block.shape[1:]} in an array of {self._shape}")
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

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header so that a longer first dimension fits in the same room.
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, *self._shape), self._dtype))
        header["shape"] = (self._length, *self._shape)
        np.lib.format.write_array_header_1_0(self._file, header)


class _Moments:
    """Mean and population deviation of rows that arrive in blocks (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self._count = 0
        self._squares = np.zeros(OBSERVATION_SIZE)
        self.mean = np.zeros(OBSERVATION_SIZE)

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


def check_output(path: Path) -> None:
    """Check that a store can be begun, or gone on with, in a directory.

    Raises:
        UserError: the path is a file, or holds a store or anything else already.
    """
    if not path.exists() or (path / UNFINISHED).exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file: choose a directory that is new or empty")
    if (path / MANIFEST).exists():
        raise UserError(f"{path} already holds a store: choose another directory or delete it")
    # A kill at the very beginning leaves only the temporary file of the list of tasks.
    if any(not file.name.startswith(f".{UNFINISHED}.") for file in path.iterdir()):
        raise UserError(f"{path} holds other files: choose a directory that is new or empty")


def _why_no_store(path: Path) -> str:
    if (path / UNFINISHED).exists():
        return f"the store {path} is unfinished: run the command that began it again to go on"
    return f"there is no store in {path}: make one with python -m harmodt.collect --output {path}"


def _read_manifest(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged: restore it from a copy or make the store again"
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(damaged) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a HarmoDT store: give a store's directory")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has version {manifest.get('version')} and this program reads version "
            f"{VERSION}: make the store again, or use the program that wrote it"
        )
    if manifest.pop("crc32", None) != _manifest_checksum(manifest):
        raise UserError(damaged)
    return manifest


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    """Raise UserError where an array's file is missing, or shorter or longer than its data."""
    expected = np.dtype(entry["dtype"]).itemsize * math.prod(entry["shape"])
    try:
        header = path.stat().st_size - expected
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it or make the store again") from error
    if header != _HEADER_SIZE:
        raise UserError(
            f"{path} has {abs(header - _HEADER_SIZE)} bytes too "
            f"{'few' if header < _HEADER_SIZE else 'many'}: restore it or make the store again"
        )


def _open_episodes(path: Path, files: dict[str, Any], prefix: str) -> Episodes:
    names = {name: f"{prefix}{name}" for name in _ARRAYS}
    return Episodes(
        **{name: _open_array(path / f"{file}.npy", files[file]) for name, file in names.items()}
    )


def _open_array(path: Path, entry: dict[str, Any]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): mend that first") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: restore it or make the store again") from error
    if array.dtype.str != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise UserError(f"{path} does not fit the manifest: restore it or make the store again")
    return array
