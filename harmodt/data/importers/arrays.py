"""What formats have in common: files that cannot be read, and plain arrays."""

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
"""Keys of flags, one per step, that are true where an episode ends; dones do not say how."""


@contextmanager
def reading(path: Path, damaged: str) -> Iterator[None]:
    """Say in a sentence why a file cannot be read.

    Args:
        damaged: what is wrong, and what to do, where whatever reads the file fails inside:
            libraries meet damage with dozens of kinds of errors.

    Raises:
        OSError: the system refuses to read the file.
        UserError: in the place of every other error.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file, but a folder, a pipe or a device: remove it")
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
    """Values as a float32 array; what does not fit becomes infinite, and is refused as such.

    Raises:
        UserError: they are no plain numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise UserError(f"{where}: {key} holds no plain numbers: download or write it again")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def one_per_step(array: np.ndarray) -> np.ndarray:
    """(T, 1) as (T,)."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def solved(where: str, success: np.ndarray, length: int) -> int:
    """Whether an episode of `length` steps is solved at any of them: 1 or 0.

    Raises:
        UserError: there is not one number per step, or one that is not finite.
    """
    check_array(where, "success", success, (), length)
    return int(success.any())


def ending(where: str, flags: Mapping[str, np.ndarray], observations: np.ndarray) -> int:
    """How the episode with these observations ended: 1 terminated, 0 truncated, or UNKNOWN.

    Args:
        flags: those of `ENDS` that the source has, by `flags_of`.

    Raises:
        UserError: a flag does not have one number per step, or it is true before the last step.
    """
    if not observations.ndim:
        return UNKNOWN  # `check_episode` will refuse their shape
    length = len(observations)
    found = {key: one_per_step(values) for key, values in flags.items()}
    for key, values in found.items():
        check_array(where, key, values, (), length)
        if values[:-1].any():
            raise UserError(
                f"{where}: {key} is true at step {np.flatnonzero(values)[0]} of 0 to {length - 1}, "
                "so another episode begins after it: split the data there, or rename the key if it "
                "does not mark the end of an episode"
            )
    if any(found[key][-1:].any() for key in TERMINATED if key in found):
        return 1
    truncated = any(found[key][-1:].any() for key in TRUNCATED if key in found)
    return 0 if truncated or found.keys() & set(TERMINATED) else UNKNOWN


def flags_of(keys: Collection[str], read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Those of `ENDS` that are among a source's keys, each as `read` returns it."""
    return {key: read(key) for key in ENDS if key in keys}
