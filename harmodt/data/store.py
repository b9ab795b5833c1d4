"""The store of offline data on disk: memory-mapped arrays for each task, and a manifest.

    DIR/manifest.json              format, version, provenance, statistics, checksums
    DIR/<task>/<array>.npy         the training episodes of a task, one after the other
    DIR/<task>/prompts/<array>.npy the prompt episodes of a task, one after the other

The writer writes the manifest last and atomically (`writer.py`). A directory without a manifest
is therefore not a store.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from .. import sealed
from ..environments import EnvironmentSpec
from ..errors import UserError
from ..files import json_checksum
from ..settings import Count, Whole, from_json

FORMAT = "harmodt-store"
VERSION = 3
EARLIER = (2,)
"""Earlier versions that can still be read. Stores of version 2 do not say how episodes ended."""
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
PROMPTS = "prompts"
UNKNOWN = -1
"""Stands for the success or the ending of an episode if the source does not give it."""

KIND = sealed.Kind(
    name="the manifest of a HarmoDT store",
    format=FORMAT,
    version=VERSION,
    also_reads=EARLIER,
    instead="give a store's directory",
    again="make the store again in another folder, with the settings that the file lists under "
    "provenance, by `python -m harmodt.collect` or `python -m harmodt.data import`",
    remedy=f"{sealed.RESTORE}, or make the store again",
)
_UNFINISHED = replace(
    KIND, remedy=f"{sealed.RESTORE}, or move its folder away and give the same command again"
)

_HEADER_SIZE = 128
"""Bytes before the data in every array file."""


class Episode(NamedTuple):
    """One episode of T steps, all float32.

    Attributes:
        observations: [T, observation_size].
        actions: [T, action_size].
        rewards: [T].
        success: 1 if the task was solved at any step, 0 if not, or UNKNOWN.
        terminated: 1 if the task ended with the last step (termination), so that nothing follows;
            0 if the recording was cut there (truncation); or UNKNOWN.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    success: int
    terminated: int = UNKNOWN


@dataclass(frozen=True)
class Episodes:
    """Episodes of one task, one after the other: E episodes with S steps in total.

    This class defines the arrays of a store. Every field is one file. A field's metadata give the
    dtype of the array. If each entry of the array is a vector, the metadata also name the attribute
    of EnvironmentSpec that gives the vector's size.

    Attributes:
        observations: float32 [S, observation_size], unnormalised.
        actions: float32 [S, action_size].
        rewards: float32 [S].
        returns_to_go: float32 [S], undiscounted sum of this and all later rewards of the episode.
        episode_starts: int64 [E + 1], first step of each episode, then S.
        successes: int8 [E], 1 solved, 0 not solved, -1 unknown.
        terminated: int8 [E], 1 terminated, 0 truncated, -1 unknown. The default is -1 for every
            episode.
    """

    observations: np.ndarray = field(metadata={"dtype": "<f4", "size": "observation_size"})
    actions: np.ndarray = field(metadata={"dtype": "<f4", "size": "action_size"})
    rewards: np.ndarray = field(metadata={"dtype": "<f4"})
    returns_to_go: np.ndarray = field(metadata={"dtype": "<f4"})
    episode_starts: np.ndarray = field(metadata={"dtype": "<i8"})
    successes: np.ndarray = field(metadata={"dtype": "|i1"})
    terminated: np.ndarray = field(default=None, metadata={"dtype": "|i1"})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.terminated is None:
            unknown = np.full(len(self.successes), UNKNOWN, np.int8)
            object.__setattr__(self, "terminated", unknown)  # the dataclass is frozen

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


EPISODE_ARRAYS: tuple[str, ...] = tuple(array.name for array in fields(Episodes))
"""Names of the arrays in `Episodes`, in order."""


def array_types(environment: EnvironmentSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype, and the shape of one entry, of every array in `Episodes`, by the array's name."""
    types: dict[str, tuple[str, tuple[int, ...]]] = {}
    for array in fields(Episodes):
        size = array.metadata.get("size")
        shape = (getattr(environment, size),) if size else ()
        types[array.name] = (array.metadata["dtype"], shape)
    return types


@dataclass(frozen=True)
class TaskData:
    """The data of one task in a store.

    Attributes:
        name: the task's name in its family.
        train, prompts: the training episodes and the prompt episodes.
        observation_mean, observation_std: float32 [O], statistics of the training episodes.
        best_return, mean_return: the best and the mean return of the training episodes.
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
    """A finished store that is open for reading. The arrays stay on disk until they are used."""

    path: Path
    manifest: dict[str, Any]
    _opened: dict[str, TaskData] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> DataStore:
        """Open the store in a directory: read the manifest and check that all files are there.

        Raises:
            UserError: there is no store, or it is unfinished, damaged or of another version.
        """
        path = Path(path)
        try:
            store = cls(path, read_manifest(path / MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_why_no_store(path)) from None
        for name, entry in store.files.items():
            _check_size(path / name, entry)
        return store

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the manifest's order."""
        return tuple(self.manifest["tasks"])

    @property
    def environment(self) -> EnvironmentSpec:
        """The environment in which the data were recorded."""
        return EnvironmentSpec.from_json(self.manifest["environment"])

    @property
    def checksum(self) -> str:
        """The checksum of the manifest.

        The manifest holds the checksums of all arrays, so only equal stores have equal checksums.
        """
        return json_checksum(self.manifest)

    @property
    def provenance(self) -> dict[str, Any]:
        """The origin of the data: the settings of the command that made the store."""
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

    def shared_prompts(self, task: str) -> int:
        """The number of a task's prompt episodes that are also training episodes."""
        return self.manifest["tasks"][task].get("shared_prompts", 0)

    @property
    def steps(self) -> int:
        """Number of steps in the training episodes of all tasks."""
        return sum(content["steps"] for content in self.manifest["tasks"].values())

    def longest_episode(self, tasks: Sequence[str]) -> int:
        """Number of steps of the longest training episode of the given tasks.

        The result is at most the environment's `episode_length`.
        """
        longest = max(int(self.task(name).train.lengths.max()) for name in tasks)
        return min(longest, self.environment.episode_length)

    def verify(
        self,
        progress: Callable[[str], None] | None = None,
        tasks: Sequence[str] = (),
        prompts_of: Sequence[str] = (),
    ) -> None:
        """Read every array once and compare its checksum.

        Args:
            progress: called with the name of each file before it is read.
            tasks: tasks whose arrays are all read. If neither `tasks` nor `prompts_of` names a
                task, all arrays of the store are read.
            prompts_of: tasks of which only the prompts are read.

        Raises:
            UserError: a file has changed since it was written.
        """
        chosen = (
            *(f"{task}/" for task in tasks),
            *(f"{task}/{PROMPTS}/" for task in prompts_of),
        )
        for name, entry in self.files.items():
            if chosen and not name.startswith(chosen):
                continue
            if progress:
                progress(name)
            _check_size(self.path / name, entry)
            array = _open_array(self.path / name, entry)
            crc32 = f"{zlib.crc32(array.data):08x}"
            sealed.check(self.path / name, crc32, entry["crc32"], KIND.remedy)

    def size(self, task: str) -> int:
        """Size of one task's arrays on disk, in bytes."""
        files = self.manifest["tasks"][task]["files"]
        return sum((self.path / task / f"{name}.npy").stat().st_size for name in files)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The dtype, shape and checksum of every array, by its path below the store."""
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


def _why_no_store(path: Path) -> str:
    if (path / UNFINISHED).exists():
        return f"the store {path} is unfinished: to continue, repeat the command that began it"
    return f"there is no store in {path}: make one with python -m harmodt.collect --output {path}"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a store that is finished or unfinished.

    Raises:
        UserError: the file is damaged, or another program or version wrote it.
    """
    kind = _UNFINISHED if path.name == UNFINISHED else KIND
    manifest = sealed.read(path, dict[str, Any], kind)
    _check_manifest(path, manifest, kind.remedy)
    return manifest


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    """The manifest's entry for one array file."""

    dtype: str
    shape: list[Whole]
    crc32: str


class _Task(msgspec.Struct, forbid_unknown_fields=True):
    """The manifest's entry for one task.

    `shared_prompts` is the number of prompt episodes that are also training episodes.
    """

    episodes: Count
    steps: Count
    prompt_episodes: Whole
    best_return: float
    mean_return: float
    observation_mean: list[float]
    observation_std: list[float]
    files: dict[str, _Array]
    shared_prompts: Whole = 0


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """A manifest without its checksum.

    A task's name is also the name of its folder. The pattern allows no path that leaves the store.
    """

    format: str
    version: int
    provenance: dict[str, Any]
    environment: dict[str, Any]
    tasks: dict[Annotated[str, Meta(pattern=r"\A(?!\.)[^/\0\ud800-\udfff]+\Z")], _Task]


def _check_manifest(path: Path, manifest: dict[str, Any], remedy: str) -> None:
    """Raise UserError if a manifest has a wrong form, or if its entries contradict each other."""
    found = sealed.convert(path, manifest, _Manifest, remedy)
    environment = from_json(EnvironmentSpec, found.environment, f"environment in {path}")
    for name, task in found.tasks.items():
        arrays = {
            **_shapes(environment, "", task.files, task.episodes, task.steps),
            **_shapes(environment, f"{PROMPTS}/", task.files, task.prompt_episodes),
        }
        if found.version == 2:
            del arrays["terminated"], arrays[f"{PROMPTS}/terminated"]
        entries = {key: (entry.dtype, entry.shape) for key, entry in task.files.items()}
        sizes = {len(task.observation_mean), len(task.observation_std)}
        fits = sizes == {environment.observation_size}
        if entries != arrays or not fits or task.shared_prompts > task.prompt_episodes:
            raise sealed.damaged(path, f"the entries of {name} do not fit together", remedy)


def _shapes(
    environment: EnvironmentSpec,
    prefix: str,
    files: dict[str, _Array],
    episodes: int,
    steps: int | None = None,
) -> dict[str, tuple[str, list[int]]]:
    """The dtype and the shape that each array must have, by the array's name.

    Args:
        environment: gives the sizes of the entries.
        prefix: begins the names of the arrays.
        files: the manifest's entries of the arrays.
        episodes: the number of episodes.
        steps: the number of steps; by default the entry of the rewards gives it.
    """
    rewards = files.get(f"{prefix}rewards")
    if steps is None:
        steps = rewards.shape[0] if rewards and rewards.shape else 0
    lengths = {"episode_starts": episodes + 1, "successes": episodes, "terminated": episodes}
    return {
        f"{prefix}{name}": (dtype, [lengths.get(name, steps), *shape])
        for name, (dtype, shape) in array_types(environment).items()
    }


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    """Raise UserError if an array's file is missing or has the wrong size."""
    expected = np.dtype(entry["dtype"]).itemsize * math.prod(entry["shape"])
    try:
        surplus = path.stat().st_size - expected - _HEADER_SIZE
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing: {KIND.remedy}") from error
    if surplus:
        size = f"{abs(surplus)} bytes too {'few' if surplus < 0 else 'many'}"
        raise sealed.damaged(path, f"it has {size}", KIND.remedy)


def _open_episodes(path: Path, files: dict[str, Any], prefix: str) -> Episodes:
    entries = {n: files[f"{prefix}{n}"] for n in EPISODE_ARRAYS if f"{prefix}{n}" in files}
    episodes = Episodes(
        **{name: _open_array(path / f"{prefix}{name}.npy", e) for name, e in entries.items()}
    )
    starts = episodes.episode_starts
    rise = (starts[:-1] < starts[1:]).all()  # np.diff could overflow
    if starts[0] != 0 or starts[-1] != len(episodes.rewards) or not rise:
        where = path / f"{prefix}episode_starts.npy"
        raise sealed.damaged(where, "its numbers are not starts of episodes", KIND.remedy)
    return episodes


def _open_array(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """Map an array's file into memory.

    Raises:
        OSError: the system refuses to open the file.
        UserError: the file is damaged.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise sealed.damaged(path, f"it is not an array: {error}", KIND.remedy) from error
    if array.dtype.str != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise sealed.damaged(path, "its dtype or shape differs from the manifest", KIND.remedy)
    return array
