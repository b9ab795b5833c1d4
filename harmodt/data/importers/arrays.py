"""What formats that record plain arrays have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UserError
from . import check_array


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
