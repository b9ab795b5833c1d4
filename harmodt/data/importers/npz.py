"""The public Meta-World data sets as npz files, one episode each.

Two layouts are known: `<root>/<task>-v2/<i>.npz` and MTDiff's `<root>/<task>/<run>/dataset/*.npz`
(the task's name with or without its version). Keys read: observations (T, 39), actions (T, 4),
rewards (T,) or (T, 1), and success (T,) or (T, 1) where there is one.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ...environments.metaworld_names import ACTION_SIZE, OBSERVATION_SIZE, TASK_SETS, resolve_tasks
from ...errors import UserError
from ..store import UNKNOWN, Episode

_SHAPES: dict[str, tuple[int, ...]] = {
    "observations": (OBSERVATION_SIZE,),
    "actions": (ACTION_SIZE,),
    "rewards": (),
}


def find_tasks(root: Path) -> tuple[str, ...]:
    """The v3 names of the tasks that have a folder of their own in `root`, sorted.

    Raises:
        UserError: no folder, or none of its folders is named after a task.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the one that holds a folder per task")
    tasks = {_task_of(folder) for folder in root.iterdir() if folder.is_dir()} - {None}
    if not tasks:
        raise UserError(
            f"{root} holds no folder named after a task: give the folder that holds "
            "reach-v2, push-v2 and so on"
        )
    return tuple(sorted(task for task in tasks if task))


def find_episodes(root: Path, task: str) -> list[Path]:
    """The npz files of a task in the order of their numbers.

    Raises:
        UserError: the task has no folder, or no npz file in it.
    """
    folders = [folder for folder in root.iterdir() if folder.is_dir() and _task_of(folder) == task]
    if not folders:
        raise UserError(
            f"{root} has no folder for {task}: add it, or leave the task out of --tasks"
        )
    if len(folders) > 1:
        names = " and ".join(sorted(folder.name for folder in folders))
        raise UserError(f"{root} has several folders for {task}, {names}: leave one of them")
    files = list(folders[0].glob("*.npz")) or list(folders[0].glob("*/dataset/*.npz"))
    if not files:
        raise UserError(f"{folders[0]} holds no .npz file: download the task's episodes again")
    return sorted(files, key=_natural_order)


def read_episode(path: Path, min_length: int) -> Episode:
    """Read one episode.

    Raises:
        UserError: the file is missing or damaged, a key is missing, has the wrong shape, or holds
            a value that is not finite, or the episode is shorter than `min_length` steps.
    """
    arrays = _read_arrays(path)
    length = len(arrays["observations"])
    if length < max(1, min_length):
        raise UserError(
            f"{path}: the episode has {length} steps and training needs {min_length}: remove the "
            "file, or lower --min-length if you train with a shorter context"
        )
    for key in _SHAPES:
        if len(arrays[key]) != length:
            raise UserError(
                f"{path}: {key} has {len(arrays[key])} steps and observations has {length}: "
                "download or write the file again"
            )
        if not np.isfinite(arrays[key]).all():
            raise UserError(
                f"{path}: {key} holds NaN or infinity: remove the file or repair its values"
            )
    success = int(arrays["success"].any()) if "success" in arrays else UNKNOWN
    return Episode(arrays["observations"], arrays["actions"], arrays["rewards"], success)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise UserError(f"{path} is a single array: an episode is an .npz with named arrays")
        with file:
            return _read_keys(path, file)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check it") from error
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or no npz file: download it again or remove it"
        ) from error


def _read_keys(path: Path, file: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    for key in _SHAPES:
        if key not in file:
            raise UserError(
                f"{path} has no key {key!r} (it has {', '.join(file.files) or 'none'}): rename or "
                "add it"
            )
    arrays = {key: _read_array(path, file, key, shape) for key, shape in _SHAPES.items()}
    if "success" in file:
        arrays["success"] = _read_array(path, file, "success", ())
    return arrays


def _read_array(
    path: Path, file: np.lib.npyio.NpzFile, key: str, shape: tuple[int, ...]
) -> np.ndarray:
    """One array as float32 [T, *shape]; a trailing axis of size 1 is dropped."""
    try:
        array = np.asarray(file[key])
        if array.dtype.kind not in "fiub":
            raise ValueError(array.dtype)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: {key} is damaged or holds no plain numbers: download or write the file again"
        ) from error
    if shape == () and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 0 or array.shape[1:] != shape:
        expected = ", ".join(["T", *map(str, shape)])
        raise UserError(
            f"{path}: {key} has the shape {array.shape} and ({expected}) is needed: is this "
            "Meta-World data?"
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return array.astype(np.float32)


def _task_of(folder: Path) -> str | None:
    """The task after which a folder is named, if there is one."""
    try:
        return None if folder.name in TASK_SETS else resolve_tasks([folder.name])[0]
    except UserError:
        return None


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.npz before 10.npz."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", str(path))]
