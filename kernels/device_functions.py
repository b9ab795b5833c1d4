"""What several Triton kernels compute inside: expanding masks."""

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
    """values[index] where the bit is set, else 0."""
    inside = index < size
    words = tl.load(bits + index // 32, mask=inside, other=0)
    return tl.where(((words >> (index % 32)) & 1) != 0, values, 0.0)
