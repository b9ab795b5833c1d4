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
def masked_vector(values, bits, index, size):
    """The elements `values` of a vector, whose indices are `index`; 0 where the mask bit is 0."""
    inside = index < size
    words = tl.load(bits + index // 32, mask=inside, other=0)
    return tl.where(((words >> (index % 32)) & 1) != 0, values, 0.0)


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
    draw = index * tl.cast(0x9E3779B1, tl.uint32) + tl.cast(seed, tl.uint32)
    draw ^= draw >> 16
    draw *= 0x7FEB352D
    draw ^= draw >> 15
    draw *= 0x846CA68B
    draw ^= draw >> 16
    dropped = (draw & 0x7FFFFFFF) < tl.cast(threshold, tl.uint32)
    return tl.where(dropped, 0.0, tl.cast(scale, tl.float32))
