"""Reads npz files with one episode each, the format of the public Meta-World data sets.

Two layouts can be read: `<root>/<task>-v2/<i>.npz` and MTDiff's
`<root>/<task>/<run>/dataset/*.npz`. A task's folder may have any name that the family's
`resolve_tasks` knows. The importer reads the keys observations (T, observation_size), actions
(T, action_size) and rewards (T,) or (T, 1). If they exist, it also reads success and the flags of
an episode's end (terminals, timeouts, dones and others), each (T,) or (T, 1).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...errors import UserError, raise_refusal
from ..store import UNKNOWN, Episode
from . import Importer
from .arrays import as_float32, ending, flags_of, one_per_step, reading, solved

_LARGEST = 2**26  # most bytes of one array; the observations of 500 steps take 78,000
_ENCRYPTED = 1  # this bit of a zip entry's flags is set if the entry is encrypted


class NpzImporter(Importer):
    """Reads a folder per task; each file is one episode."""

    def tasks(self) -> tuple[str, ...]:
        """The tasks that have a folder, sorted by name."""
        if not self.source.is_dir():
            raise UserError(
                f"{self.source} is not a folder: give the folder that holds a folder per task"
            )
        tasks = {task for folder in self._folders() if (task := self._task_of(folder))}
        if not tasks:
            raise UserError(
                f"{self.source} holds no folder named after a task: give the folder that holds "
                "reach-v2, push-v2 and so on"
            )
        return tuple(sorted(tasks))

    def episodes(self, task: str) -> list[Path]:
        """The files of a task in the order of their numbers."""
        folders = [folder for folder in self._folders() if self._task_of(folder) == task]
        if not folders:
            raise UserError(
                f"{self.source} has no folder for {task}: add it, or leave the task out of --tasks"
            )
        if len(folders) > 1:
            names = " and ".join(sorted(folder.name for folder in folders))
            raise UserError(
                f"{self.source} has several folders for {task}, {names}: keep only one of them"
            )
        files = list(folders[0].glob("*.npz")) or list(folders[0].glob("*/dataset/*.npz"))
        if not files:
            raise UserError(f"{folders[0]} holds no .npz file: download the task's episodes again")
        return sorted(files, key=_natural_order)

    def files(self, task: str) -> list[Path]:
        """The files of a task, one per episode."""
        return self.episodes(task)

    def read(self, episode: Path) -> Episode:
        """Read one file."""
        with reading(episode, "truncated or not an npz file: download it again or remove it"):
            # mmap_mode: a large .npy file is not read into memory before it is refused below.
            file = np.load(episode, mmap_mode="r", allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{episode} is a single array: give an .npz file with named arrays")
            with file:
                return _read_keys(episode, file)

    def _folders(self) -> list[Path]:
        return [folder for folder in self.source.iterdir() if folder.is_dir()]

    def _task_of(self, folder: Path) -> str | None:
        """The task after which a folder is named, or None."""
        if folder.name in self.family.task_sets:
            return None
        try:
            return self.family.resolve_tasks([folder.name])[0]
        except UserError:
            return None


def _read_keys(path: Path, file: np.lib.npyio.NpzFile) -> Episode:
    for key in ("observations", "actions", "rewards"):
        if key not in file:
            raise UserError(
                f"{path} has no key {key!r} (it has {', '.join(file.files) or 'none'}): rename or "
                "add it"
            )
    observations = _read_array(path, file, "observations")
    flags = flags_of(file.files, lambda key: _read_array(path, file, key))
    return Episode(
        observations=observations,
        actions=_read_array(path, file, "actions"),
        rewards=one_per_step(_read_array(path, file, "rewards")),
        success=_read_success(path, file, len(observations)) if "success" in file else UNKNOWN,
        terminated=ending(str(path), flags, observations),
    )


def _read_success(path: Path, file: np.lib.npyio.NpzFile, length: int) -> int:
    """1 if an episode of `length` steps is solved at any step, else 0."""
    return solved(str(path), one_per_step(_read_array(path, file, "success")), length)


def _read_array(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """Read one array as float32."""
    try:
        assert file.zip is not None  # None only after the file was closed
        entry = file.zip.getinfo(f"{key}.npy")
        if entry.flag_bits & _ENCRYPTED:
            raise UserError(f"{path} is encrypted: write it again without a password")
        if entry.file_size > _LARGEST:
            raise UserError(
                f"{path}: {key} would take {entry.file_size / 1e9:.1f} GB of memory, which is too "
                "much for an episode: download or write the file again"
            )
        array = np.asarray(file[key])
    except UserError:
        raise
    except Exception as error:  # damage leads to dozens of kinds of errors
        raise_refusal(error, path)
        raise UserError(
            f"{path}: {key} is damaged or does not hold plain numbers: download or write the file "
            "again"
        ) from error
    return as_float32(str(path), key, array)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """A sort key that puts 2.npz before 10.npz."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", str(path))]
