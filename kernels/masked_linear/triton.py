"""Triton kernels of the masked linear layer.

There are G groups of R rows, K inputs, N outputs and T tasks: x is [G, R, K], y is [G, R, N], the
weight is [N, K]. The kernels expand a mask's words while the tile of the weight is in registers. So
neither W ⊙ M nor an unpacked mask exists in memory.

The kernels compute transposed results, for example yᵀ = (W ⊙ M) xᵀ, so that the masked weight is
the left operand. NVIDIA's matrix units can read a left operand from registers (wgmma) or from
tensor memory (tcgen05), but a right operand only from shared memory. Triton still moves each masked
tile through shared memory once, to change its layout.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import bits_of, kept, masked_vector, task_of
from ..dropout import rate
from ..launch import input_precision, launch, precision_of
from ..masks import stride_of
from .device_functions import (
    Norm,
    begin_group,
    gain_and_shift,
    load_dy,
    load_x,
    masked_bias,
    masked_weight,
    normalised,
    row_statistics,
    store_statistics,
    store_y,
    tile_statistics,
)
from .gradients import LayerGradients, layers_of


@triton.jit
def tile_of(row_tiles, column_tiles):
    """Row tile and column tile of this program.

    Consecutive programs take 8 row tiles of one column, then the same row tiles of the next column.
    So programs that run at the same time need few different tiles of x and of the weight.
    """
    program = tl.program_id(0)
    first = program // (8 * column_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    within = program % (8 * column_tiles)
    return first + within % height, within // height


@triton.jit
def rows_of_program(rows, tiles_of_program, column_tiles, BLOCK_R: tl.constexpr):
    """Group, first row, end of the rows, and column tile of a program with several tiles of rows.

    Programs with the same rows have consecutive numbers.
    """
    height = tiles_of_program * BLOCK_R
    ranges = tl.cdiv(rows, height)
    index, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    first = index % ranges * height
    return index // ranges, first, tl.minimum(first + height, rows), column_tile


@triton.jit(do_not_specialize=["groups", "rows", "tiles_of_program", "seed", "threshold"])
def masked_linear_kernel(
    x,  # [groups, rows, inputs]
    weight,  # [outputs, inputs], rows weight_stride apart
    bias,  # [outputs], or None
    weight_bits,  # int32 [tasks, outputs, words], task_stride and bits_stride apart, or None
    bias_bits,  # int32 [tasks, words], bias_task_stride apart, or None
    task_ids,  # int64 [groups], or None
    residual,  # as y, or None
    y,  # [groups, rows, outputs]
    groups,
    rows,
    inputs,
    outputs,
    weight_stride,
    task_stride,
    bits_stride,
    bias_task_stride,
    seed,  # int64 [1], or None
    threshold,
    factor,  # multiplies the elements that dropout keeps
    norm,  # a Norm, or None
    tiles_of_program,  # tiles of rows per program, if STATIONARY
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    STATIONARY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of y; if STATIONARY, several tiles of a group's rows one after another.

    A stationary program keeps its tile of W ⊙ M, which has all inputs, for all of its tiles.
    """
    if STATIONARY:
        group, first, end, column_tile = rows_of_program(
            rows, tiles_of_program, tl.cdiv(outputs, BLOCK_N), BLOCK_R
        )
        task = task_of(task_ids, group)
        k, word = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 32)
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if weight_bits is not None:
            weight_bits += task * task_stride
        w = masked_weight(
            *(weight, weight_bits, n, k, word, outputs, inputs, weight_stride, bits_stride),
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        ).to(y.dtype.element_ty if norm is not None else x.dtype.element_ty)
        b = 0.0
        if HAS_BIAS:
            b = masked_bias(bias, bias_bits, task * bias_task_stride, n, outputs)
        if DROPOUT:
            seed = tl.load(seed).to(tl.uint32)
        if norm is not None:
            gain, shift = gain_and_shift(norm, task, k, inputs)
            if (first == 0) & (column_tile == 0):
                begin_group(norm, group, task, inputs, BLOCK_K)
        row = tl.arange(0, BLOCK_R)
        for r0 in range(first, end, BLOCK_R):
            start = group.to(tl.int64) * rows + r0
            # Rows beyond the last are computed with the last row's data, and not stored.
            x_tile = load_x(x + start * inputs, tl.minimum(row, rows - 1 - r0), k, inputs)
            if norm is not None:
                mean, scale = tile_statistics(x_tile, k, inputs, norm.epsilon)
                left = tl.where(column_tile == 0, rows - r0, 0)
                store_statistics(norm, start, row, left, mean, scale)
                x_tile = normalised(x_tile, mean, scale, gain, shift).to(w.dtype)
            total = tl.dot(w, tl.trans(x_tile), input_precision=PRECISION)
            store_y(
                *(total, y, residual, start, row, n, rows - r0, outputs, b),
                *(seed, threshold, factor),
                HAS_BIAS=HAS_BIAS,
                HAS_RESIDUAL=HAS_RESIDUAL,
                RELU=RELU,
                DROPOUT=DROPOUT,
            )
    else:
        tiles_of_group = tl.cdiv(rows, BLOCK_R)
        row_tile, column_tile = tile_of(groups * tiles_of_group, tl.cdiv(outputs, BLOCK_N))
        group = row_tile // tiles_of_group
        first = row_tile % tiles_of_group * BLOCK_R
        task = task_of(task_ids, group)
        row = tl.arange(0, BLOCK_R)
        near = tl.minimum(row, rows - 1 - first)  # rows beyond the last read the last row
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        start = group.to(tl.int64) * rows + first
        x += start * inputs
        if weight_bits is not None:
            weight_bits += task * task_stride
        if DROPOUT:
            seed = tl.load(seed).to(tl.uint32)
        if norm is not None:
            mean, scale = row_statistics(x, near, inputs, norm.epsilon, BLOCK_R, BLOCK_K)
            if column_tile == 0:
                store_statistics(norm, start, row, rows - first, mean, scale)
            if (first == 0) & (column_tile == 0):
                begin_group(norm, group, task, inputs, BLOCK_K)
        total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for k0 in range(0, inputs, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            word = k0 // 32 + tl.arange(0, BLOCK_K // 32)
            w = masked_weight(
                *(weight, weight_bits, n, k, word, outputs, inputs, weight_stride, bits_stride),
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
            )
            x_tile = load_x(x, near, k, inputs)
            if norm is not None:
                gain, shift = gain_and_shift(norm, task, k, inputs)
                x_tile = normalised(x_tile, mean, scale, gain, shift).to(y.dtype.element_ty)
            total = tl.dot(w.to(x_tile.dtype), tl.trans(x_tile), total, input_precision=PRECISION)
        b = 0.0
        if HAS_BIAS:
            b = masked_bias(bias, bias_bits, task * bias_task_stride, n, outputs)
        store_y(
            *(total, y, residual, start, row, n, rows - first, outputs, b),
            *(seed, threshold, factor),
            HAS_BIAS=HAS_BIAS,
            HAS_RESIDUAL=HAS_RESIDUAL,
            RELU=RELU,
            DROPOUT=DROPOUT,
        )


@triton.jit(do_not_specialize=["groups", "rows", "tiles_of_program", "seed", "threshold"])
def masked_linear_input_gradient_kernel(
    dy,  # [groups, rows, outputs]
    y,  # as dy, or None
    weight,  # [outputs, inputs], rows weight_stride apart
    weight_bits,  # int32 [tasks, outputs, words], task_stride and bits_stride apart, or None
    task_ids,  # int64 [groups], or None
    dx,  # [groups, rows, inputs]
    groups,
    rows,
    inputs,
    outputs,
    weight_stride,
    task_stride,
    bits_stride,
    seed,  # int64 [1], or None
    threshold,
    factor,  # multiplies the elements that dropout keeps
    tiles_of_program,  # tiles of rows per program, if STATIONARY
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    STATIONARY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes one tile of dx; if STATIONARY, several tiles of a group's rows one after another.

    A stationary program keeps its tile of W ⊙ M, which has all outputs, for all of its tiles. The
    other branch loads W without `masked_weight`, with which registers would spill to memory.
    """
    if STATIONARY:
        group, first, end, column_tile = rows_of_program(
            rows, tiles_of_program, tl.cdiv(inputs, BLOCK_K), BLOCK_R
        )
        n = tl.arange(0, BLOCK_N)
        k = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        word = column_tile * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        if weight_bits is not None:
            weight_bits += task_of(task_ids, group) * task_stride
        w = masked_weight(
            *(weight, weight_bits, n, k, word, outputs, inputs, weight_stride, bits_stride),
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )
        w = tl.trans(w.to(dx.dtype.element_ty))
        if DROPOUT:
            seed = tl.load(seed).to(tl.uint32)
        row = tl.arange(0, BLOCK_R)
        for r0 in range(first, end, BLOCK_R):
            near = tl.minimum(row, rows - 1 - r0)  # rows beyond the last are not stored
            start = group.to(tl.int64) * rows + r0
            dy_offset, mask = near[:, None] * outputs + n[None, :], (n < outputs)[None, :]
            dy_tile = load_dy(
                *(dy, y, start * outputs, dy_offset, mask, seed, threshold, factor),
                RELU=RELU,
                DROPOUT=DROPOUT,
            )
            total = tl.dot(w, tl.trans(dy_tile.to(w.dtype)), input_precision=PRECISION)
            tl.store(
                dx + start * inputs + row[:, None] * inputs + k[None, :],
                tl.trans(total).to(dx.dtype.element_ty),
                mask=(r0 + row < rows)[:, None] & (k < inputs)[None, :],
            )
    else:
        tiles_of_group = tl.cdiv(rows, BLOCK_R)
        row_tile, column_tile = tile_of(groups * tiles_of_group, tl.cdiv(inputs, BLOCK_K))
        group = row_tile // tiles_of_group
        first = row_tile % tiles_of_group * BLOCK_R
        task = task_of(task_ids, group)
        row = tl.arange(0, BLOCK_R)
        k = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        word = column_tile * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        in_rows, in_inputs = first + row < rows, k < inputs
        dy_row = tl.minimum(row, rows - 1 - first)  # rows beyond the last are not stored
        start = group.to(tl.int64) * rows + first
        dx += start * inputs
        if weight_bits is not None:
            weight_bits += task * task_stride
        if DROPOUT:
            seed = tl.load(seed).to(tl.uint32)
        total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
        for n0 in range(0, outputs, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            in_outputs = n < outputs
            w = tl.load(
                weight + tl.minimum(n, outputs - 1)[:, None] * weight_stride + k[None, :],
                mask=in_inputs[None, :],
                other=0.0,
            )
            if weight_bits is not None:
                words = tl.load(
                    weight_bits + n[:, None] * bits_stride + word[None, :],
                    mask=in_outputs[:, None] & (word * 32 < inputs)[None, :],
                    other=0,
                )
            offset = dy_row[:, None] * outputs + n[None, :]
            dy_tile = load_dy(
                dy,
                y,
                start * outputs,
                offset,
                in_outputs[None, :],
                seed,
                threshold,
                factor,
                RELU=RELU,
                DROPOUT=DROPOUT,
            ).to(dx.dtype.element_ty)
            if weight_bits is None:
                w = tl.where(in_outputs[:, None], w, 0.0)
            else:
                w = tl.where(bits_of(words, BLOCK_N, BLOCK_K), w, 0.0)
            w = w.to(dy_tile.dtype)
            total = tl.dot(tl.trans(w), tl.trans(dy_tile), total, input_precision=PRECISION)
        tl.store(
            dx + row[:, None] * inputs + k[None, :],
            tl.trans(total).to(dx.dtype.element_ty),
            mask=in_rows[:, None] & in_inputs[None, :],
        )


class Layer(NamedTuple):
    """A layer as an argument of `masked_linear_weight_gradients_kernel`.

    The kernel takes a tuple of them, because the number of layers varies. So Triton compiles the
    kernel again when an integer in a layer becomes 1 or a multiple of 16.
    """

    dy: Tensor  # [groups, rows, outputs]
    y: Tensor | None  # as dy; None without ReLU
    x: Tensor  # [groups, rows, inputs]
    weight_bits: Tensor | None  # int32 [tasks, outputs, words], task_stride and bits_stride apart
    bias_bits: Tensor | None  # int32 [tasks, words], bias_task_stride apart
    task_ids: Tensor | None  # int64 [groups]; None without masks, as the bits
    weight_out: Tensor  # [chunks, outputs, inputs], weight_chunk_stride, weight_row_stride apart
    bias_out: Tensor | None  # [chunks, outputs], bias_chunk_stride apart; None without a bias
    groups: int
    rows: int
    inputs: int
    outputs: int
    groups_of_program: int
    rows_of_program: int  # a multiple of BLOCK_R
    ranges: int  # of rows in a group
    task_stride: int
    bits_stride: int
    bias_task_stride: int
    weight_chunk_stride: int
    weight_row_stride: int
    bias_chunk_stride: int
    seed: Tensor | None  # int64 [1]; None without dropout
    threshold: int
    factor: float  # multiplies the elements that dropout keeps
    statistics: Tensor | None  # of the LayerNorm before the layer: see `LayerGradients`
    affine: Tensor | None


@triton.jit
def columns_of(layer, BLOCK_K: tl.constexpr):
    """The number of tiles in a row of the weight, plus 1 if there is a bias."""
    tiles = tl.cdiv(layer.inputs, BLOCK_K)
    return tiles if layer.bias_out is None else tiles + 1


@triton.jit
def chunk_of(layer, chunk):
    """First group, end of the groups, first row and end of the rows of a chunk."""
    group = chunk // layer.ranges * layer.groups_of_program
    row = (chunk % layer.ranges).to(tl.int32) * layer.rows_of_program
    group_end = tl.minimum(group + layer.groups_of_program, layer.groups)
    return group, group_end, row, tl.minimum(row + layer.rows_of_program, layer.rows)


@triton.jit
def bias_gradient_tile(layer, chunk, n, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Computes bias_out for outputs n and one chunk: sums of dy over rows, with masks."""
    row = tl.arange(0, BLOCK_R)
    offset = n[:, None] + row[None, :] * layer.outputs
    seed = layer.seed
    if layer.seed is not None:
        seed = tl.load(layer.seed).to(tl.uint32)
    total = tl.zeros([BLOCK_N], tl.float32)
    first, end, first_row, row_end = chunk_of(layer, chunk)
    for group in range(first, end):
        start = group * layer.rows
        group_sum = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for r0 in tl.range(first_row, row_end, BLOCK_R, num_stages=4):
            group_sum += load_dy(
                layer.dy,
                layer.y,
                (start + r0) * layer.outputs,
                offset,
                (n < layer.outputs)[:, None] & (r0 + row < layer.rows)[None, :],
                seed,
                layer.threshold,
                layer.factor,
                RELU=layer.y is not None,
                DROPOUT=layer.seed is not None,
            ).to(tl.float32)
        before = task_of(layer.task_ids, group) * layer.bias_task_stride
        group_bias = tl.sum(group_sum, 1)
        total += masked_vector(group_bias, layer.bias_bits, before, n, layer.outputs)
    out = layer.bias_out + chunk * layer.bias_chunk_stride
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < layer.outputs)


@triton.jit
def weight_gradient_tile(
    layer,
    chunk,
    n,
    column,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes weight_out for outputs n, one column of tiles and one chunk.

    The loops over groups and rows are in one function, so that Triton overlaps loads and products.
    """
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    word = column * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    row = tl.arange(0, BLOCK_R)
    in_outputs, in_inputs = n < layer.outputs, k < layer.inputs
    if layer.seed is not None:
        seed = tl.load(layer.seed).to(tl.uint32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first, end, first_row, row_end = chunk_of(layer, chunk)
    for group in range(first, end):
        start = group * layer.rows
        if layer.statistics is not None:
            affine = layer.affine + group * 2 * layer.inputs
        group_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r0 in range(first_row, row_end, BLOCK_R):
            # Rows beyond the last read the last row; x or dy is set to 0 there, so they add
            # nothing. The addresses of dy transpose it, as the product needs it. If tl.trans
            # transposed it, each load would read fewer bytes.
            in_rows = r0 + row < layer.rows
            near = tl.minimum(row, layer.rows - 1 - r0)
            dy_offset = n[:, None] + near[None, :] * layer.outputs
            x_offset = near[:, None] * layer.inputs + k[None, :]
            x_mask = in_inputs[None, :]
            dy_before = (start + r0) * layer.outputs
            dy_tile = tl.load(layer.dy + dy_before + dy_offset, mask=in_outputs[:, None], other=0.0)
            if layer.y is not None:
                y_tile = tl.load(
                    layer.y + dy_before + dy_offset, mask=in_outputs[:, None], other=0.0
                )
                dy_tile = tl.where(y_tile <= 0.0, 0.0, dy_tile)
            if (layer.y is not None) | (layer.statistics is not None):
                dy_tile = tl.where(in_rows[None, :], dy_tile, 0.0)
            else:
                x_mask = x_mask & in_rows[:, None]
            x_before = (start + r0) * layer.inputs
            x_tile = tl.load(layer.x + x_before + x_offset, mask=x_mask, other=0.0)
            if layer.statistics is not None:
                statistics = layer.statistics + (start + r0) * 2 + near * 2
                mean, scale = tl.load(statistics), tl.load(statistics + 1)
                gain = tl.load(affine + k, mask=in_inputs, other=0.0)
                shift = tl.load(affine + layer.inputs + k, mask=in_inputs, other=0.0)
                x_tile = normalised(x_tile, mean, scale, gain, shift).to(layer.dy.dtype.element_ty)
            if layer.seed is not None:
                index = dy_before.to(tl.uint32) + dy_offset.to(tl.uint32)
                dy_tile = dy_tile.to(tl.float32) * kept(index, seed, layer.threshold, layer.factor)
            dy_tile = dy_tile.to(x_tile.dtype)
            group_sum = tl.dot(dy_tile, x_tile, group_sum, input_precision=PRECISION)
        if layer.weight_bits is not None:
            words = tl.load(
                layer.weight_bits
                + tl.load(layer.task_ids + group) * layer.task_stride
                + n[:, None] * layer.bits_stride
                + word[None, :],
                mask=in_outputs[:, None] & (word * 32 < layer.inputs)[None, :],
                other=0,
            )
            group_sum = tl.where(bits_of(words, BLOCK_N, BLOCK_K), group_sum, 0.0)
        total += group_sum
    out = layer.weight_out + chunk * layer.weight_chunk_stride
    tl.store(
        out + n[:, None] * layer.weight_row_stride + k[None, :],
        total.to(out.dtype.element_ty),
        mask=in_outputs[:, None] & in_inputs[None, :],
    )


@triton.jit
def masked_linear_weight_gradients_kernel(
    layers,  # a tuple of Layer
    LAYERS: tl.constexpr,  # len(layers), which Triton 3.6 lacks for tuples that contain None
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes one tile of a layer's weight_out or bias_out for one chunk.

    A chunk has all rows of `groups_of_program` groups, or `rows_of_program` rows of one group.

    The first programs belong to the first layer, the next ones to the second, and so on.
    """
    program = tl.program_id(0)
    for i in tl.static_range(LAYERS):
        layer = layers[i]
        columns = columns_of(layer, BLOCK_K)
        tiles = tl.cdiv(layer.outputs, BLOCK_N) * columns
        programs = tiles * layer.ranges * tl.cdiv(layer.groups, layer.groups_of_program)
        if (program >= 0) & (program < programs):
            tile = program % tiles
            chunk = (program // tiles).to(tl.int64)
            n = tile // columns * BLOCK_N + tl.arange(0, BLOCK_N)
            column = tile % columns
            if column * BLOCK_K >= layer.inputs:
                if layer.bias_out is not None:
                    bias_gradient_tile(layer, chunk, n, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R)
            else:
                weight_gradient_tile(
                    layer,
                    chunk,
                    n,
                    column,
                    PRECISION=PRECISION,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                    BLOCK_R=BLOCK_R,
                )
        program -= programs


class Sum(NamedTuple):
    """The chunks of a weight or bias gradient, and the buffer for their sum."""

    chunks: Tensor  # [number, rows, columns]
    out: Tensor  # [rows, columns], row_stride apart
    number: int
    rows: int
    columns: int
    row_stride: int


@triton.jit
def sum_chunks_kernel(
    sums,  # a tuple of Sum
    BLOCK: tl.constexpr,
):
    """Computes one block of elements of one `out`. The chunks are added from first to last."""
    program = tl.program_id(0)
    for i in tl.static_range(len(sums)):
        gradient = sums[i]
        size = gradient.rows * gradient.columns
        programs = tl.cdiv(size, BLOCK)
        if (program >= 0) & (program < programs):
            index = program * BLOCK + tl.arange(0, BLOCK)
            inside = index < size
            chunks = gradient.chunks + index
            total = tl.zeros([BLOCK], tl.float32)
            for _ in range(gradient.number):
                total += tl.load(chunks, mask=inside, other=0.0)
                chunks += size
            row, column = index // gradient.columns, index % gradient.columns
            out = gradient.out + row * gradient.row_stride + column
            tl.store(out, total.to(gradient.out.dtype.element_ty), mask=inside)
        program -= programs


class Tile(NamedTuple):
    """The rows and columns of the result that a program computes, and the depth of one product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Tiles by precision ("half": 16-bit operands), larger ones first. Of the tiles that make enough
# programs, the largest is used. No tile spills registers on any target that the tests compile for,
# but two of weight gradients: on gfx942 with dropout, the smallest one spills 2 registers, and on
# sm_120 the one of 64 × 64 × 64 spills 8 bytes.
# None needs more shared memory than the smallest GPUs have: 99 KiB on NVIDIA's, 64 KiB on AMD's.
# IEEE float32 is computed without matrix units, where larger tiles would spill. The smallest tiles
# are deep: a program loops seldom, and each loop has many loads on their way at the same time.

# Rows are rows of x, columns are outputs.
FORWARD = {
    "ieee": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 2), Tile(16, 32, 64, 4, 2)),
    "tf32x3": (Tile(64, 64, 32, 4, 2), Tile(32, 32, 32, 4, 3), Tile(16, 32, 64, 4, 2)),
    "tf32": (
        *(Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        *(Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    ),
    "half": (
        *(Tile(128, 128, 64, 8, 2), Tile(64, 64, 32, 4, 3)),
        *(Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    ),
}
# Rows are rows of dy, columns are inputs.
INPUT_GRADIENT = {
    "ieee": (Tile(64, 64, 16, 8, 4), Tile(32, 32, 32, 4, 3), Tile(16, 32, 64, 4, 2)),
    "tf32x3": (Tile(64, 64, 32, 4, 2), Tile(32, 32, 32, 4, 3), Tile(16, 32, 64, 4, 2)),
    "tf32": (
        *(Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        *(Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    ),
    "half": (
        *(Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
        *(Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    ),
}
# The tiles of stationary programs. They need 16-bit operands, sums of at most `depth` products, and
# at least two tiles of rows per program. The keys are numbers of bytes: of an element of x in the
# forward pass; of an element of dy, plus one of y if the layer has a ReLU, in the backward pass.
STATIONARY = {2: Tile(64, 64, 128, 4, 3), 4: Tile(64, 64, 128, 4, 2)}
# Rows are outputs, columns are inputs. TF32 has no tile of 64 rows, because Triton multiplies such
# a tile with wgmma. For TF32, wgmma needs operands that are transposed in shared memory, and Triton
# copies them there only 4 bytes at a time.
WEIGHT_GRADIENT = {
    "ieee": (Tile(64, 64, 16, 4, 4), Tile(32, 32, 16, 4, 3)),
    "tf32x3": (Tile(32, 32, 32, 4, 2),),
    "tf32": (Tile(32, 32, 32, 4, 2),),
    "half": (Tile(128, 128, 16, 8, 4), Tile(64, 64, 64, 8, 2), Tile(32, 32, 128, 4, 2)),
}

# Enough programs to keep a GPU busy: one for each multiprocessor of an NVIDIA H100.
ENOUGH = 132

# The sums of weight gradients over groups and rows are cut into chunks, to make up to
# CHUNKED_PROGRAMS times ENOUGH programs. A chunk has at least ROWS_OF_CHUNK rows. Fewer chunks than
# FEWEST_CHUNKS are not worth the launch that adds them. A smaller tile is used where the programs
# of a larger one would loop more than MOST_STEPS times.
CHUNKED_PROGRAMS = 5
ROWS_OF_CHUNK = 2048
FEWEST_CHUNKS = 4
MOST_STEPS = 50

# Elements per program of `sum_chunks_kernel`.
SUM_BLOCK = 1024


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    relu: bool,
    residual: Tensor | None = None,
    drop: float = 0.0,
    seed: Tensor | None = None,
    norm: Norm | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes `harmodt::masked_linear`; with `norm` and `dtype`, `harmodt::norm_linear`.

    It takes the arguments of their schemas.
    """
    x = x.contiguous()
    groups, rows, inputs = x.shape
    outputs, dtype = len(weight), dtype or x.dtype
    y_dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    y = torch.empty(groups, rows, outputs, dtype=y_dtype, device=x.device)
    plan = product_plan(FORWARD, x, dtype, inputs, outputs, x.element_size())
    threshold, factor = rate(drop)
    launch(
        masked_linear_kernel,
        (plan.programs,),
        x=x,
        weight=weight,
        bias=bias,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        residual=None if residual is None else residual.contiguous(),
        y=y,
        groups=groups,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        weight_stride=weight.stride(0),
        task_stride=stride_of(weight_bits, 0),
        bits_stride=stride_of(weight_bits, 1),
        bias_task_stride=stride_of(bias_bits, 0),
        seed=seed,
        threshold=threshold,
        factor=factor,
        norm=norm,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        DROPOUT=drop > 0,
        BLOCK_R=plan.tile.rows,
        BLOCK_N=plan.tile.columns,
        BLOCK_K=plan.tile.depth,
        **plan.options(),
    )
    return y


def masked_linear_input_gradient(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    weight_bits: Tensor | None,
    task_ids: Tensor | None,
    dtype: torch.dtype,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    dy = dy.contiguous()
    groups, rows, outputs = dy.shape
    inputs = weight.shape[1]
    dx = torch.empty(groups, rows, inputs, dtype=dtype, device=dy.device)
    loaded = dy.element_size() + (0 if y is None else y.element_size())
    plan = product_plan(INPUT_GRADIENT, dy, dtype, outputs, inputs, loaded)
    threshold, factor = rate(drop)
    launch(
        masked_linear_input_gradient_kernel,
        (plan.programs,),
        dy=dy,
        y=y,
        weight=weight,
        weight_bits=weight_bits,
        task_ids=task_ids,
        dx=dx,
        groups=groups,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        weight_stride=weight.stride(0),
        task_stride=stride_of(weight_bits, 0),
        bits_stride=stride_of(weight_bits, 1),
        seed=seed,
        threshold=threshold,
        factor=factor,
        RELU=y is not None,
        DROPOUT=drop > 0,
        BLOCK_R=plan.tile.rows,
        BLOCK_K=plan.tile.columns,
        BLOCK_N=plan.tile.depth,
        **plan.options(),
    )
    return dx


def masked_linear_weight_gradients(*operands: list) -> None:
    """Computes `harmodt::masked_linear_weight_gradients`. A second launch sums chunks."""
    layers = layers_of(*operands)
    precision, tile, chunks = weight_gradient_plan(layers)
    kernel_layers = [kernel_layer(layer, chunks, tile.depth) for layer in layers]
    tiles = (tiles_of(layer, tile, with_bias=True) for layer in layers)
    launch(
        masked_linear_weight_gradients_kernel,
        (sum(n * len(layer.weight_out) for n, layer in zip(tiles, kernel_layers, strict=True)),),
        layers=tuple(kernel_layers),
        LAYERS=len(kernel_layers),
        PRECISION=input_precision(precision),
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    sum_chunks(layers, kernel_layers)


def kernel_layer(layer: LayerGradients, chunks: int, depth: int) -> Layer:
    """A layer as the kernel's argument, with sums over groups and rows in up to `chunks` chunks."""
    dy, x, bias_bits = layer.dy.contiguous(), layer.x.contiguous(), layer.bias_bits
    groups, rows, inputs = x.shape
    weight_out, bias_out = layer.weight_out, layer.bias_out
    each = chunks_of(layer, chunks, depth)
    if len(weight_out) != each.number:
        weight_out = torch.empty(
            each.number, *weight_out.shape[1:], dtype=torch.float32, device=x.device
        )
        bias_out = None if bias_out is None else weight_out.new_empty(weight_out.shape[:2])
    threshold, factor = rate(layer.drop)
    return Layer(
        dy=dy,
        y=layer.y,
        x=x,
        weight_bits=layer.weight_bits,
        bias_bits=bias_bits,
        task_ids=layer.task_ids,
        weight_out=weight_out,
        bias_out=bias_out,
        groups=groups,
        rows=rows,
        inputs=inputs,
        outputs=dy.shape[2],
        groups_of_program=each.groups,
        rows_of_program=each.rows,
        ranges=each.ranges,
        task_stride=stride_of(layer.weight_bits, 0),
        bits_stride=stride_of(layer.weight_bits, 1),
        bias_task_stride=stride_of(bias_bits, 0),
        weight_chunk_stride=weight_out.stride(0),
        weight_row_stride=weight_out.stride(1),
        bias_chunk_stride=0 if bias_out is None else bias_out.stride(0),
        seed=layer.seed,
        threshold=threshold,
        factor=factor,
        statistics=layer.statistics,
        affine=layer.affine,
    )


def sum_chunks(layers: list[LayerGradients], kernel_layers: list[Layer]) -> None:
    """Sum the gradients that were computed in chunks into the layers' buffers, in one launch."""
    pairs = []
    for layer, computed in zip(layers, kernel_layers, strict=True):
        for chunks, out in (
            (computed.weight_out, layer.weight_out),
            (computed.bias_out, layer.bias_out),
        ):
            if chunks is not None and out is not None and chunks is not out:
                pairs.append((chunks, out))
    if not pairs:
        return
    sums = [
        Sum(chunks, out, len(chunks), math.prod(out.shape[:-1]), out.shape[-1], out.stride(-2))
        for chunks, out in pairs
    ]
    launch(
        sum_chunks_kernel,
        (sum(triton.cdiv(out.numel(), SUM_BLOCK) for _, out in pairs),),
        sums=tuple(sums),
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


class Plan(NamedTuple):
    """How a product is divided among programs.

    Attributes:
        stationary: whether a program keeps its tile of the weight for several tiles of rows.
        tiles_of_program: the number of these tiles, else 1.
    """

    precision: str
    tile: Tile
    programs: int
    stationary: bool = False
    tiles_of_program: int = 1

    def options(self) -> dict[str, Any]:
        """The arguments of a launch that follow from the plan."""
        return {
            "tiles_of_program": self.tiles_of_program,
            "PRECISION": input_precision(self.precision),
            "STATIONARY": self.stationary,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "enable_fp_fusion": True,
        }


def product_plan(
    table: dict[str, tuple[Tile, ...]],
    x: Tensor,
    dtype: torch.dtype,
    depth: int,
    columns: int,
    loaded: int,
) -> Plan:
    """The plan for a product.

    Args:
        table: the tiles by precision.
        x: gives the groups and the rows of the product.
        dtype: the dtype of the product's operands.
        depth: the number of products in a sum.
        columns: the columns of the result.
        loaded: bytes that are loaded for each element of x.
    """
    precision = precision_of(dtype)
    groups, rows, _ = x.shape
    tile = STATIONARY.get(loaded)
    if tile is not None and precision == "half" and depth <= tile.depth:
        row_tiles = triton.cdiv(rows, tile.rows)
        # Each group's rows are cut into ranges, one per program, to make enough programs.
        others = groups * triton.cdiv(columns, tile.columns)
        ranges = triton.cdiv(2 * ENOUGH, others)
        if 2 * ranges <= row_tiles:
            each = row_tiles // ranges
            tile = tile._replace(depth=max(32, triton.next_power_of_2(depth)))
            return Plan(precision, tile, others * triton.cdiv(row_tiles, each), True, each)
    tile = largest_tile(table[precision], 2 * ENOUGH, groups, rows, columns)
    tiles = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Plan(precision, tile, tiles)


def largest_tile(
    tiles: tuple[Tile, ...], enough: int, results: int, rows: int, columns: int
) -> Tile:
    """The first tile that cuts `results` matrices [rows, columns] into at least `enough` tiles.

    If no tile does, the last tile.
    """
    for tile in tiles:
        if results * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= enough:
            return tile
    return tiles[-1]


def weight_gradient_plan(layers: list[LayerGradients]) -> tuple[str, Tile, int]:
    """The precision, the tile and the number of chunks for the layers' weight gradients.

    It is the first tile that makes enough programs of at most `MOST_STEPS` steps for all layers
    together. If there is none, it is the first tile that makes enough programs, else the last tile.
    All chunks together take no more memory than the layers' inputs.
    """
    dtypes = {layer.dtype for layer in layers}
    precision = precision_of(torch.float32 if torch.float32 in dtypes else dtypes.pop())
    sizes = 4 * sum(layer.weight_out[0].numel() for layer in layers)
    room = sum(layer.x.numel() * layer.dtype.itemsize for layer in layers) // max(1, sizes)
    most = min(max(layer.x.shape[:2].numel() for layer in layers) // ROWS_OF_CHUNK, room)
    most = most if most >= FEWEST_CHUNKS else 1
    found = None
    for tile in WEIGHT_GRADIENT[precision]:
        tiles = [tiles_of(layer, tile) for layer in layers]
        chunks = min(most, triton.cdiv(CHUNKED_PROGRAMS * ENOUGH, max(1, sum(tiles))))
        each = [chunks_of(layer, chunks, tile.depth) for layer in layers]
        if sum(n * of_layer.number for n, of_layer in zip(tiles, each, strict=True)) >= ENOUGH:
            steps = max(part.groups * triton.cdiv(part.rows, tile.depth) for part in each)
            if steps <= MOST_STEPS:
                return precision, tile, chunks
            found = found or (precision, tile, chunks)
    return found or (precision, tile, chunks)


def tiles_of(layer: LayerGradients, tile: Tile, *, with_bias: bool = False) -> int:
    """The number of tiles of a layer's weight; with the bias, one more column of tiles."""
    _, outputs, inputs = layer.weight_out.shape
    columns = triton.cdiv(inputs, tile.columns) + (with_bias and layer.bias_out is not None)
    return triton.cdiv(outputs, tile.rows) * columns


class Chunks(NamedTuple):
    """How the sums over a layer's groups and rows are divided among programs.

    Attributes:
        number: the number of chunks.
        groups: the groups of a chunk.
        rows: the rows of a chunk in each of its groups.
        ranges: the number of chunks in a group; 1 if a chunk has several groups.
    """

    number: int
    groups: int
    rows: int
    ranges: int


def chunks_of(layer: LayerGradients, chunks: int, depth: int) -> Chunks:
    """Divide a layer's sums into at most `chunks` chunks; one per group if `weight_out` has those.

    Args:
        depth: the rows of one product.
    """
    groups, rows, _ = layer.x.shape
    if len(layer.weight_out) == groups > 1:
        return Chunks(groups, 1, triton.cdiv(rows, depth) * depth, 1)
    each = triton.cdiv(groups, chunks)
    ranges = max(1, chunks // groups)
    steps = max(1, triton.cdiv(triton.cdiv(rows, depth), ranges))
    ranges = max(1, triton.cdiv(rows, steps * depth))
    return Chunks(ranges * triton.cdiv(groups, each), each, steps * depth, ranges)
