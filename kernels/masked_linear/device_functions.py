"""Functions on tiles that the Triton kernels of the masked linear layer call.

triton.py describes the shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import bits_of, kept, masked_vector


@triton.jit
def masked_weight(
    weight,
    weight_bits,
    n,
    k,
    word,
    outputs,
    inputs,
    weight_stride,
    bits_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile W ⊙ M of outputs n and inputs k; 0 outside the weight.

    `word` holds the indices of the mask words of inputs k. If `weight_bits` is None, the tile is W.
    """
    in_outputs, near = (n < outputs)[:, None], tl.minimum(n, outputs - 1)[:, None]
    w = tl.load(weight + near * weight_stride + k[None, :], mask=(k < inputs)[None, :], other=0.0)
    if weight_bits is None:
        w = tl.where(in_outputs, w, 0.0)
    else:
        words = tl.load(
            weight_bits + n[:, None] * bits_stride + word[None, :],
            mask=in_outputs & (word * 32 < inputs)[None, :],
            other=0,
        )
        w = tl.where(bits_of(words, BLOCK_N, BLOCK_K), w, 0.0)
    return w


@triton.jit
def masked_bias(bias, bits, before, n, outputs):
    """The bias of outputs n with a task's mask, float32. `masked_vector` explains `before`."""
    b = tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    return masked_vector(b, bits, before, n, outputs)


@triton.jit
def load_x(x, row, k, inputs):
    """A tile of x: some rows and inputs k; 0 beyond the last input."""
    return tl.load(x + row[:, None] * inputs + k[None, :], mask=(k < inputs)[None, :], other=0.0)


@triton.jit
def load_dy(
    dy, y, start, offset, mask, seed, threshold, factor, RELU: tl.constexpr, DROPOUT: tl.constexpr
):
    """A tile of dy with the gradients of ReLU and dropout applied.

    The tile is at elements start + offset of dy and y.
    """
    dy_tile = tl.load(dy + start + offset, mask=mask, other=0.0)
    if RELU:
        y_tile = tl.load(y + start + offset, mask=mask, other=0.0)
        dy_tile = tl.where(y_tile <= 0.0, 0.0, dy_tile)
    if DROPOUT:
        index = start.to(tl.uint32) + offset.to(tl.uint32)
        dy_tile = dy_tile.to(tl.float32) * kept(index, seed, threshold, factor)
    return dy_tile


@triton.jit
def store_y(
    total,
    y,
    residual,
    start,
    row,
    n,
    rows_left,
    outputs,
    b,
    seed,
    threshold,
    factor,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Add the bias to sums [outputs, rows], apply ReLU and dropout, add the residual, store y."""
    if HAS_BIAS:
        total += b[:, None]
    if RELU:
        total = tl.where(total <= 0.0, 0.0, total)  # NaN stays NaN
    result = tl.trans(total)
    before = start * outputs
    offset = row[:, None] * outputs + n[None, :]
    inside = (row < rows_left)[:, None] & (n < outputs)[None, :]
    if DROPOUT:
        index = before.to(tl.uint32) + offset.to(tl.uint32)
        result *= kept(index, seed, threshold, factor)
    if HAS_RESIDUAL:
        result += tl.load(residual + before + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + before + offset, result.to(y.dtype.element_ty), mask=inside)


class Norm(NamedTuple):
    """The LayerNorm before the layer: the forward kernel's operands, and three outputs."""

    gain: Tensor  # [inputs]
    shift: Tensor  # [inputs]
    gain_bits: Tensor  # int32 [tasks, words], gain_task_stride apart
    shift_bits: Tensor  # int32 [tasks, words], shift_task_stride apart
    gain_task_stride: int
    shift_task_stride: int
    epsilon: float
    statistics: Tensor  # output, float32 [groups, rows, 2]: mean and inverse standard deviation
    affine: Tensor  # output, float32 [groups, 2, inputs]: gain and shift with masks
    arrivals: Tensor  # output, int32 [groups]: 0; the LayerNorm's gradient counts programs in it


@triton.jit
def row_statistics(x, row, inputs, epsilon, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and inverse standard deviation of some rows, which are read twice."""
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        total += load_x(x, row, k, inputs).to(tl.float32)
    mean = tl.sum(total, 1) / inputs
    squares = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        centred = load_x(x, row, k, inputs).to(tl.float32) - mean[:, None]
        centred = tl.where((k < inputs)[None, :], centred, 0.0)
        squares += centred * centred
    variance = tl.sum(squares, 1) / inputs
    return mean, tl.rsqrt(variance + tl.cast(epsilon, tl.float32))


@triton.jit
def tile_statistics(x_tile, k, inputs, epsilon):
    """Mean and inverse standard deviation of a tile of whole rows, 0 beyond the last input."""
    values = x_tile.to(tl.float32)
    mean = tl.sum(values, 1) / inputs
    centred = tl.where((k < inputs)[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / inputs
    return mean, tl.rsqrt(variance + tl.cast(epsilon, tl.float32))


@triton.jit
def store_statistics(norm, start, row, rows_left, mean, scale):
    """Store the statistics of some rows for the backward pass."""
    out = norm.statistics + (start + row) * 2
    tl.store(out, mean, mask=row < rows_left)
    tl.store(out + 1, scale, mask=row < rows_left)


@triton.jit
def gain_and_shift(norm, task, k, inputs):
    """Gain and shift of the LayerNorm for inputs k, with a task's mask."""
    gain = tl.load(norm.gain + k, mask=k < inputs, other=0.0)
    gain = masked_vector(gain, norm.gain_bits, task * norm.gain_task_stride, k, inputs)
    shift = tl.load(norm.shift + k, mask=k < inputs, other=0.0)
    shift = masked_vector(shift, norm.shift_bits, task * norm.shift_task_stride, k, inputs)
    return gain, shift


@triton.jit
def begin_group(norm, group, task, inputs, BLOCK_K: tl.constexpr):
    """Write what the backward pass needs for a group: masked gain and shift, a counter of 0."""
    tl.store(norm.arrivals + group, 0)
    affine = norm.affine + group.to(tl.int64) * 2 * inputs
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        gain, shift = gain_and_shift(norm, task, k, inputs)
        tl.store(affine + k, gain, mask=k < inputs)
        tl.store(affine + inputs + k, shift, mask=k < inputs)


@triton.jit
def normalised(x_tile, mean, scale, gain, shift):
    """A tile of rows after the LayerNorm, float32."""
    centred = x_tile.to(tl.float32) - mean[:, None]
    return centred * scale[:, None] * gain[None, :] + shift[None, :]
