"""Draws dropout: a hash of an element's index and of a seed decides if the element is dropped.

So every device drops the same elements. A backward pass draws again, so the forward pass stores no
dropout mask. The seed is a tensor that the kernels read on the device: the host never waits for it,
and a replayed CUDA graph reads the seed's new value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_for(drop: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a draw: the caller's, or one that the device's generator draws.

    Args:
        drop: the probability of dropping an element.
        seed: int64 [] or [1], at least 0 and below 2³¹; or None, to draw one.
        device: the device of the operands.

    Returns:
        The seed, or None if `drop` is 0.

    Raises:
        TypeError: the seed's dtype is not int64.
        ValueError: the seed has more than one element, or is on another device.
    """
    if drop == 0.0:
        return None
    if seed is None:
        return torch.randint(2**31, (1,), device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed is {seed.dtype}: it must be int64")
    if seed.shape not in ((), (1,)):
        raise ValueError(f"seed has shape {list(seed.shape)}: it must be one number, [] or [1]")
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device} and the operands on {device}")
    return seed


def kept(shape: Sequence[int], drop: float, seed: Tensor) -> Tensor:
    """The dropout factors, float32 [*shape]: 0 for a dropped element, else 1 / (1 - drop).

    The hash takes an element's row-major index in the shape, modulo 2³².
    """
    draw = torch.arange(math.prod(shape), device=seed.device).view(*shape) * 0x9E3779B1 + seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        draw = draw & 0xFFFFFFFF  # keep the low 32 bits of the int64, as an unsigned number
        draw = (draw ^ (draw >> shift)) * factor
    draw = draw & 0xFFFFFFFF
    draw = (draw ^ (draw >> 16)) & 0x7FFFFFFF
    threshold, factor_of_kept = rate(drop)
    return torch.where(draw < threshold, 0.0, factor_of_kept)


def rate(drop: float) -> tuple[int, float]:
    """The probability of dropping times 2³¹, and the factor of kept elements, for the kernels."""
    rounded = float(np.float32(drop))  # the C++ kernels get `drop` as a float32
    return int(rounded * 2**31), 1 / (1 - rounded)
