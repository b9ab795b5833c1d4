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

from .operands import check


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
        ValueError: `drop` is not in [0, 1), or the seed has more than one element or is on another
            device.
    """
    check_probability(drop)
    if drop == 0.0:
        return None
    if seed is None:
        return torch.randint(2**31, (1,), device=device)
    check("seed", seed, torch.int64, () if seed.dim() == 0 else (1,), device)
    return seed


def check_probability(drop: float) -> None:
    """Raise ValueError unless 0 ≤ drop < 1."""
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop is {drop}: the probability must be at least 0 and below 1")


def kept(shape: Sequence[int], drop: float, seed: Tensor) -> Tensor:
    """The dropout factors, float32 [*shape]: 0 for a dropped element, else 1 / (1 - drop).

    The hash takes an element's row-major index in the shape, modulo 2³².
    """
    seed = seed.view(())
    key = _hashed(seed + _INDEX_FACTOR, torch.zeros_like(seed))
    index = torch.arange(math.prod(shape), device=seed.device).view(tuple(shape))
    draw = _hashed(index * _INDEX_FACTOR + key, key) & 0x7FFFFFFF
    threshold, factor_of_kept = rate(drop)
    return (draw >= threshold).to(torch.float32) * factor_of_kept


def _hashed(v: Tensor, key: Tensor) -> Tensor:
    """Hash the low 32 bits of int64 numbers. The key enters between two multiplications too: so the
    hashes of consecutive numbers under one key are no shift of those under another."""
    v = v & 0xFFFFFFFF
    v = ((v ^ (v >> 16)) * 0x7FEB352D & 0xFFFFFFFF) ^ key
    v = (v ^ (v >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return v ^ (v >> 16)


_INDEX_FACTOR = 0x9E3779B1


def rate(drop: float) -> tuple[int, float]:
    """The probability of dropping times 2³¹, and the factor of kept elements, for the kernels."""
    rounded = float(np.float32(drop))  # the C++ kernels get `drop` as a float32
    return int(rounded * 2**31), 1 / (1 - rounded)
