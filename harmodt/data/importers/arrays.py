"""Functions of several importers: they turn errors into sentences, and check arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, raise_refusal
from ..store import UNKNOWN
from . import check_array

TERMINATED = ("terminals", "terminations", "terminated", "next.terminated")
TRUNCATED = ("timeouts", "truncations", "truncated", "next.truncated")
ENDS = (*TERMINATED, *TRUNCATED, "dones", "done", "next.done")
"""Keys of flags, one per step, that are true at the end of an episode. The last three do not say
whether the episode was terminated or truncated."""


@contextmanager
def reading(path: Path, damaged: str) -> Iterator[None]:
    """Turn every error of the code that reads a file into a sentence.

    Libraries raise dozens of kinds of errors for damaged files.

    Args:
        path: the file.
        damaged: what is wrong with the file, and what to do; it completes "FILE is ...".

    Raises:
        OSError: the system refuses to read the file.
        UserError: replaces every other error.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file but a folder, a pipe or a device: remove it")
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: download it again") from error
    except Exception as error:
        raise_refusal(error, path)
        raise UserError(f"{path} is {damaged}") from error


def as_float32(where: str, key: str, values: Any) -> np.ndarray:
    """Convert values to a float32 array.

    A value beyond the range of float32 becomes infinity, which `check_array` refuses later.

    Raises:
        UserError: the values are not plain numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise UserError(f"{where}: {key} does not hold plain numbers: download or write it again")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def one_per_step(array: np.ndarray) -> np.ndarray:
    """Turn the shape (T, 1) into (T,); other shapes stay."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def solved(where: str, success: np.ndarray, length: int) -> int:
    """1 if an episode of `length` steps is solved at any step, else 0.

    Raises:
        UserError: `success` does not have one number per step, or a number is not finite.
    """
    check_array(where, "success", success, (), length)
    return int(success.any())


def ending(where: str, flags: Mapping[str, np.ndarray], observations: np.ndarray) -> int:
    """How an episode ended: 1 terminated, 0 truncated, or UNKNOWN.

    Args:
        where: tells a person where the episode is.
        flags: the result of `flags_of`.
        observations: the episode's observations, which give its number of steps.

    Raises:
        UserError: a flag does not have one number per step, or it is true before the last step.
    """
    if not observations.ndim:
        return UNKNOWN  # `check_episode` refuses this shape later
    length = len(observations)
    found = {key: one_per_step(values) for key, values in flags.items()}
    for key, values in found.items():
        check_array(where, key, values, (), length)
        if values[:-1].any():
            raise UserError(
                f"{where}: {key} is true at step {np.flatnonzero(values)[0]} of 0 to {length - 1}, "
                "so another episode begins after that step: split the data there, or rename the "
                "key if it does not mark the end of an episode"
            )
    if any(found[key][-1:].any() for key in TERMINATED if key in found):
        return 1
    truncated = any(found[key][-1:].any() for key in TRUNCATED if key in found)
    return 0 if truncated or found.keys() & set(TERMINATED) else UNKNOWN


def flags_of(keys: Collection[str], read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Read the flags in `ENDS` that are among a source's keys, by key."""
    return {key: read(key) for key in ENDS if key in keys}
