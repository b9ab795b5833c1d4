"""Reads local Minari data sets, in all storage formats of Minari.

SOURCE is the folder that MINARI_DATASETS_PATH names, by default ~/.minari/datasets. A data set lies
below it, in the folder named by its id. Minari does not name tasks, so `--dataset ID=TASK` names
the task of each data set. A task may have several data sets. A data set whose name ends in
`-prompts` holds the prompts of its task.

In Minari an episode of T steps has T + 1 observations. The importer leaves out the last
observation, which follows the last action. An episode is solved if `infos["success"]` is not 0 at
some step; without this array, its success is unknown. The termination and the truncation of the
last step say how the episode ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ...environments import EnvironmentFamily
from ...errors import UserError, raise_refusal
from ..store import UNKNOWN, Episode
from . import Importer
from .arrays import as_float32, ending, flags_of, one_per_step, solved

PROMPTS = "-prompts"
"""The name of a data set of prompts ends with this, followed only by the version."""

_SMALLEST = 100  # bytes that every episode takes on disk; in HDF5 even an empty one takes more
_LARGEST = 2**26  # most bytes of an episode; a Meta-World episode has 180,000


class MinariEpisode(NamedTuple):
    """An unread episode."""

    dataset: str
    number: int
    path: Path

    def __str__(self) -> str:
        return f"{self.path}, episode {self.number}"


class MinariImporter(Importer):
    """Reads the named data sets, one episode at a time."""

    takes_datasets = True

    def __init__(self, source: Path, family: EnvironmentFamily, datasets: Mapping[str, str]):
        super().__init__(source, family, datasets)
        self._storages: dict[str, Any] = {}  # the opened storages, by name of the data set

    def tasks(self) -> tuple[str, ...]:
        """The tasks of the data sets, in the order of the --dataset arguments."""
        return tuple(dict.fromkeys(map(self._task_of, self.datasets)))

    def episodes(self, task: str) -> list[MinariEpisode]:
        """The episodes of all data sets of a task, without prompts."""
        names = [name for name in self._named(task) if not _holds_prompts(name)]
        if not names:
            raise UserError(
                f"no --dataset gives episodes of {task}: add --dataset NAME={task}, or leave the "
                "task out of --tasks"
            )
        return self._episodes(names)

    def prompts(self, task: str) -> list[MinariEpisode]:
        """The episodes of a task's data sets of prompts; empty if there are none."""
        return self._episodes([name for name in self._named(task) if _holds_prompts(name)])

    def read(self, episode: MinariEpisode) -> Episode:
        """Read one episode."""
        where = str(episode)
        with _readable(where):
            storage = self._open(episode.dataset)
            if storage.FORMAT == "hdf5":  # a few bytes of HDF5 can expand to any size
                _check_size(episode)
            found = next(iter(storage.get_episodes([episode.number])))
            metadata = next(iter(storage.get_episode_metadata([episode.number])))
            _check_lengths(where, found, metadata)
            observations = as_float32(where, "observations", found["observations"][:-1])
            success = (found["infos"] or {}).get("success")
        flags = flags_of(found.keys(), lambda key: as_float32(where, key, found[key]))
        return Episode(
            observations=observations,
            actions=as_float32(where, "actions", found["actions"]),
            rewards=one_per_step(as_float32(where, "rewards", found["rewards"])),
            success=UNKNOWN
            if success is None
            else _read_success(where, success, len(observations)),
            terminated=ending(where, flags, observations),
        )

    def files(self, task: str) -> list[Path]:
        """All files of a task's data sets."""
        folders = [self.source / name / "data" for name in self._named(task)]
        return [file for folder in folders for file in folder.rglob("*") if file.is_file()]

    def _task_of(self, name: str) -> str:
        tasks = self.family.resolve_tasks([self.datasets[name]])
        if len(tasks) != 1:
            raise UserError(
                f"--dataset {name}={self.datasets[name]} names {len(tasks)} tasks: a data set "
                "belongs to one task, so name only that task"
            )
        return tasks[0]

    def _named(self, task: str) -> list[str]:
        """The data sets of a task."""
        return [name for name in self.datasets if self._task_of(name) == task]

    def _episodes(self, names: list[str]) -> list[MinariEpisode]:
        episodes = []
        for name in names:
            path = self.source / name
            with _readable(str(path)):
                storage = self._open(name)
                count = range(storage.total_episodes)
            if not count:
                raise UserError(f"{path} holds no episode: download or record it again")
            _check_total(path, storage)
            episodes += [MinariEpisode(name, number, path) for number in count]
        return episodes

    def _open(self, name: str) -> Any:
        """Open the storage of a data set, and check that its spaces fit the family."""
        if name in self._storages:
            return self._storages[name]
        path, kind = self.source / name, minari_storage()
        if not (path / "data").is_dir():
            raise UserError(
                f"there is no Minari data set {path}: give the folder of all data sets as SOURCE, "
                "such as ~/.minari/datasets, and the path below it as NAME, such as "
                "D4RL/door/human-v2"
            )
        with _readable(str(path)):
            size = _size_of(path / "data")
            # If the metadata lack the spaces, Minari makes the environment that they name, and
            # thus runs any code.
            known = kind.read_raw_metadata(path / "data").keys()
            if not known >= {"observation_space", "action_space"}:
                raise UserError(
                    f"{path} does not describe its spaces: record it again with Minari 0.5 or later"
                )
            storage = kind.read(path / "data")
            if storage.total_episodes * _SMALLEST > size:
                raise UserError(
                    f"the metadata of {path} claim more episodes than its files can hold: download "
                    "or record it again"
                )
        spec = self.family.spec
        _check_space(str(path), "observation", storage.observation_space, spec.observation_size)
        _check_space(str(path), "action", storage.action_space, spec.action_size)
        self._storages[name] = storage
        return storage


def minari_storage() -> Any:
    """Minari's class for a data set on disk.

    Raises:
        UserError: Minari is not installed.
    """
    try:
        from minari.dataset.minari_storage import MinariStorage  # an optional dependency
    except ImportError as error:
        raise UserError(
            "Minari's data sets need the package minari: pip install 'harmodt[minari]'"
        ) from error
    return MinariStorage


def _holds_prompts(name: str) -> bool:
    return re.search(rf"{PROMPTS}(-v[0-9]+)?$", name) is not None


def _size_of(folder: Path) -> int:
    """The total size of all files in a folder, in bytes.

    Raises:
        UserError: the folder holds something that is not a regular file.
    """
    files = [file for file in folder.rglob("*") if not file.is_dir()]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} is not a regular file but a broken link, a pipe or a device: remove it "
                "and download or record the data set again"
            )
    return sum(file.stat().st_size for file in files)


def _check_size(episode: MinariEpisode) -> None:
    """Raise UserError if an episode in HDF5 would take far more memory than a genuine episode."""
    import h5py  # an optional dependency

    sizes = []
    with h5py.File(episode.path / "data" / "main_data.hdf5") as file:
        group = file[f"episode_{episode.number}"]
        group.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
    if sum(sizes) > _LARGEST:
        raise UserError(
            f"{episode} would take {sum(sizes) / 1e9:.1f} GB of memory, which is too much for an "
            "episode: download or record it again"
        )


def _check_total(path: Path, storage: Any) -> None:
    """Raise UserError if a data set has another number of steps than its metadata say."""
    try:
        declared = storage.total_steps
        metadata = storage.get_episode_metadata(range(storage.total_episodes))
        steps = sum(episode["total_steps"] for episode in metadata)
    except Exception:  # an episode is damaged, and `read` reports it later
        return
    if steps != declared:
        raise UserError(
            f"{path}: its episodes have {steps} steps, but its metadata say {declared}: download "
            "or record it again"
        )


def _check_lengths(where: str, found: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raise UserError if an episode has a wrong number of observations or steps."""
    observations, actions = len(found["observations"]), len(found["actions"])
    if observations != actions + 1:
        raise UserError(
            f"{where}: it has {observations} observations and {actions} actions, but an episode in "
            "Minari has one observation more than actions: record it again, or leave it out "
            "with --skip-bad-episodes"
        )
    declared = metadata.get("total_steps", actions)
    if declared != actions:
        raise UserError(
            f"{where}: it has {actions} steps, but its metadata say {declared}: download or record "
            "it again"
        )


def _read_success(where: str, success: Any, length: int) -> int:
    """1 if an episode of `length` steps is solved at any step, else 0."""
    steps = one_per_step(as_float32(where, "success", success))
    if steps.ndim and len(steps) == length + 1:  # the first entry belongs to the reset
        steps = steps[1:]
    return solved(where, steps, length)


def _check_space(where: str, kind: str, space: Any, size: int) -> None:
    """Raise UserError if a space is not a Box of vectors with `size` numbers."""
    from gymnasium import spaces  # slow to import; Minari has already imported it here

    if isinstance(space, spaces.Dict) and kind == "observation":
        raise UserError(
            f"{where}: its observations are dictionaries, but vectors of {size} numbers are "
            "needed: record it again with gymnasium's FlattenObservation around the environment"
        )
    if not isinstance(space, spaces.Box) or space.shape != (size,):
        raise UserError(
            f"{where}: its {kind} space is a {type(space).__name__} of shape {space.shape}, but a "
            f"Box of shape ({size},) is needed: give the right tasks or the right --family"
        )


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn every error of Minari, HDF5 or Arrow into a sentence."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:  # the storage format needs a package that is not installed
        raise UserError(f"{where} cannot be read: {error}") from error
    except Exception as error:  # damage leads to dozens of kinds of errors
        raise_refusal(error, where)
        raise UserError(
            f"{where} is damaged or not Minari data ({type(error).__name__}): download or record "
            "it again"
        ) from error
