"""What dropout drops: a hash of an element's place and a seed, so that every device drops the same.

Gradients draw it again in place of storing it. The seed is a tensor, which a GPU's kernels read by
themselves: the host waits for nothing, and a CUDA graph draws anew whenever it is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_for(drop: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a draw: the one that is given, or one of the device's generator.

    Args:
        drop: probability of dropping an element.
        seed: int64 [] or [1], at least 0 and below 2³¹, or None.
        device: of the operands.

    Returns:
        The seed, or None where nothing is dropped.

    Raises:
        TypeError: the seed is no int64.
        ValueError: it is more than one number, or on another device.
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
    """The factors of elements: 0 where one is dropped, else 1 / (1 - drop), float32 [*shape].

    An element's place is its number in the order of the shape; places count modulo 2³².
    """
    draw = torch.arange(math.prod(shape), device=seed.device).view(*shape) * 0x9E3779B1 + seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        draw = draw & 0xFFFFFFFF  # of int64, as an unsigned number of 32 bits
        draw = (draw ^ (draw >> shift)) * factor
    draw = draw & 0xFFFFFFFF
    draw = (draw ^ (draw >> 16)) & 0x7FFFFFFF
    threshold, factor_of_kept = rate(drop)
    return torch.where(draw < threshold, 0.0, factor_of_kept)


def rate(drop: float) -> tuple[int, float]:
    """How kernels draw what is dropped: its probability times 2³¹, and the factor of the rest."""
    rounded = float(np.float32(drop))  # as the CPU's kernels take it
    return int(rounded * 2**31), 1 / (1 - rounded)
