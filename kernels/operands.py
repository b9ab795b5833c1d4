"""Checks the tensors that an operation gets from its caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Dtypes = torch.dtype | tuple[torch.dtype, ...]
Layout = Literal["any", "rows", "contiguous"]


def check(
    name: str,
    tensor: Tensor,
    dtype: Dtypes,
    shape: Sequence[int | range | None],
    device: torch.device,
    *,
    layout: Layout = "any",
    beside: Sequence[tuple[str, Tensor]] = (),
) -> None:
    """Raise an error that names the tensor and what it must be, unless all is as expected.

    Args:
        name: the caller's name for the tensor.
        tensor: the tensor.
        dtype: the accepted dtype, or several.
        shape: for each dimension the size, a range of sizes, or None for any size.
        device: the device of the operation.
        layout: "any" strides; "rows" if the last dimension must have stride 1; or "contiguous".
        beside: names and tensors from which the shape follows. The message shows their shapes.

    Raises:
        TypeError: the argument is no tensor, or has another dtype.
        ValueError: the shape, the device or the strides are wrong.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a torch.Tensor")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}: it must be {' or '.join(map(str, dtypes))}")
    if len(shape) != tensor.dim() or not all(map(_fits, tensor.shape, shape)):
        given = " and ".join(f"{other} {list(t.shape)}" for other, t in beside)
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}: {f'with {given} ' if given else ''}it must be "
            f"[{', '.join(map(_size, shape))}]"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, and other operands are on {device}")
    if layout == "contiguous" and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: pass {name}.contiguous()")
    if layout == "rows" and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1")


def _fits(size: int, expected: int | range | None) -> bool:
    if expected is None:
        return True
    return size in expected if isinstance(expected, range) else size == expected


def _size(expected: int | range | None) -> str:
    if isinstance(expected, range):
        return f"{expected.start} to {expected.stop - 1}"
    return "any" if expected is None else str(expected)
