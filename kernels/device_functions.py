"""Functions that several Triton kernels call: they expand masks and draw dropout."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Expand words [ROWS, COLUMNS / 32] to bool [ROWS, COLUMNS]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return bits.reshape(ROWS, COLUMNS) != 0


@triton.jit
def task_of(task_ids, group):
    """The task of a group, int64. Without masks `task_ids` is None and the task is 0."""
    if task_ids is None:
        task = tl.zeros([], tl.int64)
    else:
        task = tl.load(task_ids + group)
    return task


@triton.jit
def masked_vector(values, bits, before, index, size):
    """The elements `values` of a vector, whose indices are `index`; 0 where the mask bit is 0.

    If `bits` is None, every bit counts as 1. The mask begins `before` words after `bits`.
    """
    if bits is not None:
        words = tl.load(bits + before + index // 32, mask=index < size, other=0)
        values = tl.where(((words >> (index % 32)) & 1) != 0, values, 0.0)
    return values


@triton.jit
def hashed(v, key):
    """Hash uint32 numbers to random-looking ones. The key enters between two multiplications too:
    so the hashes of consecutive numbers under one key are no shift of those under another."""
    v ^= v >> 16
    v *= 0x7FEB352D
    v ^= key
    v ^= v >> 15
    v *= 0x846CA68B
    v ^= v >> 16
    return v


@triton.jit
def kept(index, seed, threshold, scale):
    """The dropout factor of an element: `scale` if the element is kept, else 0.

    `dropout_add.h` draws the same factors on a CPU.

    Args:
        index: uint32, the element's index modulo 2³².
        seed: the seed of the draw.
        threshold: the probability of dropping, times 2³¹.
        scale: 1 / (1 - probability of dropping).
    """
    factor = tl.cast(0x9E3779B1, tl.uint32)
    key = hashed(tl.cast(seed, tl.uint32) + factor, tl.cast(0, tl.uint32))
    draw = hashed(index * factor + key, key)
    dropped = (draw & 0x7FFFFFFF) < tl.cast(threshold, tl.uint32)
    return tl.where(dropped, 0.0, tl.cast(scale, tl.float32))
