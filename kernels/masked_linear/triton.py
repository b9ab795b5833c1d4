"""Triton kernels of the masked linear layer.

Shapes in comments: G groups, R rows of each, K inputs, N outputs, T tasks; x is [G, R, K], y is
[G, R, N], the weight is [N, K]. The mask of a weight tile is expanded from its words where the tile
is in registers, so that neither W ⊙ M nor an unpacked mask exists in memory.

The masked weight is the left operand of its products, whose results are hence transposed: matrix
units can take that operand from registers (wgmma) or from tensor memory (tcgen05). Triton still
brings it into their layout through shared memory, once for every time that it is masked.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import bits_of, kept, masked_vector
from ..dropout import rate
from ..launch import launch, precision_of
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

    Programs go down 8 row tiles before the next column: they share the tile of the weight, and a
    wave of them needs few tiles of both operands.
    """
    program = tl.program_id(0)
    first = program // (8 * column_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    within = program % (8 * column_tiles)
    return first + within % height, within // height


@triton.jit
def place_of_rows(rows, tiles_of_program, column_tiles, BLOCK_R: tl.constexpr):
    """Group, first row, row after the last, and column tile of a program with some tiles of rows.

    Programs with the same rows are next to each other.
    """
    height = tiles_of_program * BLOCK_R
    parts = tl.cdiv(rows, height)
    part, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    first = part % parts * height
    return part // parts, first, tl.minimum(first + height, rows), column_tile


@triton.jit(do_not_specialize=["groups", "rows", "tiles_of_program", "seed", "threshold"])
def masked_linear_kernel(
    x,  # [groups, rows, inputs]
    weight,  # [outputs, inputs], rows weight_stride apart
    bias,  # [outputs], or None
    weight_bits,  # int32 [tasks, outputs, words], task_stride and bits_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart, or None
    task_ids,  # int64 [groups]
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
    factor,  # of elements that dropout keeps
    norm,  # a Norm, or None
    tiles_of_program,  # if it is STATIONARY
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
    """y of one tile, or of some tiles of a group's rows, one after the other (`STATIONARY`).

    A tile of W ⊙ M that holds all inputs stays for all of those. What a kernel needs is an argument
    each, and a LayerNorm before it is one more.
    """
    if STATIONARY:
        place = place_of_rows(rows, tiles_of_program, tl.cdiv(outputs, BLOCK_N), BLOCK_R)
        group, first, end, column_tile = place
        task = tl.load(task_ids + group)
        k, word = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 32)
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_bits += task * task_stride
        w = masked_weight(
            *(weight, weight_bits, n, k, word, outputs, inputs, weight_stride, bits_stride),
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        ).to(y.dtype.element_ty if norm is not None else x.dtype.element_ty)
        b = 0.0
        if HAS_BIAS:
            b = masked_bias(bias, bias_bits + task * bias_task_stride, n, outputs)
        if DROPOUT:
            seed = tl.load(seed).to(tl.uint32)
        if norm is not None:
            gain, shift = gain_and_shift(norm, task, k, inputs)
            if (first == 0) & (column_tile == 0):
                begin_group(norm, group, task, inputs, BLOCK_K)
        row = tl.arange(0, BLOCK_R)
        for r0 in range(first, end, BLOCK_R):
            start = group.to(tl.int64) * rows + r0
            # Rows beyond the last are computed as the last.
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
        task = tl.load(task_ids + group)
        row = tl.arange(0, BLOCK_R)
        near = tl.minimum(row, rows - 1 - first)  # rows beyond the last are computed as the last
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        start = group.to(tl.int64) * rows + first
        x += start * inputs
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
            b = masked_bias(bias, bias_bits + task * bias_task_stride, n, outputs)
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
    weight_bits,  # int32 [tasks, outputs, words], task_stride and bits_stride apart
    task_ids,  # int64 [groups]
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
    factor,  # of elements that dropout keeps
    tiles_of_program,  # if it is STATIONARY
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    STATIONARY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one tile, or of some tiles of a group's rows, one after the other (`STATIONARY`).

    A tile of W ⊙ M that holds all outputs stays for all of those. For one tile W is loaded here,
    though `masked_weight` does the same: with that, registers spill. What a kernel needs is an
    argument each.
    """
    if STATIONARY:
        place = place_of_rows(rows, tiles_of_program, tl.cdiv(inputs, BLOCK_K), BLOCK_R)
        group, first, end, column_tile = place
        n = tl.arange(0, BLOCK_N)
        k = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        word = column_tile * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        weight_bits += tl.load(task_ids + group) * task_stride
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
            of_dy, mask = near[:, None] * outputs + n[None, :], (n < outputs)[None, :]
            dy_tile = load_dy(
                *(dy, y, start * outputs, of_dy, mask, seed, threshold, factor),
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
        task = tl.load(task_ids + group)
        row = tl.arange(0, BLOCK_R)
        k = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        word = column_tile * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        in_rows, in_inputs = first + row < rows, k < inputs
        dy_row = tl.minimum(row, rows - 1 - first)  # rows beyond the last are not stored
        start = group.to(tl.int64) * rows + first
        dx += start * inputs
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
            words = tl.load(
                weight_bits + n[:, None] * bits_stride + word[None, :],
                mask=in_outputs[:, None] & (word * 32 < inputs)[None, :],
                other=0,
            )
            place = dy_row[:, None] * outputs + n[None, :]
            dy_tile = load_dy(
                dy,
                y,
                start * outputs,
                place,
                in_outputs[None, :],
                seed,
                threshold,
                factor,
                RELU=RELU,
                DROPOUT=DROPOUT,
            ).to(dx.dtype.element_ty)
            w = tl.where(bits_of(words, BLOCK_N, BLOCK_K), w, 0.0).to(dy_tile.dtype)
            total = tl.dot(tl.trans(w), tl.trans(dy_tile), total, input_precision=PRECISION)
        tl.store(
            dx + row[:, None] * inputs + k[None, :],
            tl.trans(total).to(dx.dtype.element_ty),
            mask=in_rows[:, None] & in_inputs[None, :],
        )


class Layer(NamedTuple):
    """A layer as the kernels below take it.

    Of numbers in tuples Triton always compiles anew where they become 1, or multiples of 16.
    """

    dy: Tensor  # [groups, rows, outputs]
    y: Tensor | None  # as dy; None without ReLU
    x: Tensor  # [groups, rows, inputs]
    weight_bits: Tensor  # int32 [tasks, outputs, words], task_stride and bits_stride apart
    bias_bits: Tensor | None  # int32 [tasks, words], bias_task_stride apart; None without a bias
    task_ids: Tensor  # int64 [groups]
    weight_out: Tensor  # [parts, outputs, inputs], weight_part_stride and weight_row_stride apart
    bias_out: Tensor | None  # [parts, outputs], bias_part_stride apart; None without a bias
    groups: int
    rows: int
    inputs: int
    outputs: int
    groups_of_program: int
    task_stride: int
    bits_stride: int
    bias_task_stride: int
    weight_part_stride: int
    weight_row_stride: int
    bias_part_stride: int
    seed: Tensor | None  # int64 [1]; None without dropout
    threshold: int
    factor: float  # of elements that dropout keeps
    statistics: Tensor | None  # of the LayerNorm before the layer: as `LayerGradients` has them
    affine: Tensor | None


@triton.jit
def columns_of(layer, BLOCK_K: tl.constexpr):
    """Tiles side by side in the weight, and one more for the bias."""
    tiles = tl.cdiv(layer.inputs, BLOCK_K)
    return tiles if layer.bias_bits is None else tiles + 1


@triton.jit
def bias_gradient_tile(layer, part, n, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """One part of bias_out for outputs n: the masked sums of dy over the rows of its groups."""
    row = tl.arange(0, BLOCK_R)
    place = n[:, None] + row[None, :] * layer.outputs
    seed = layer.seed
    if layer.seed is not None:
        seed = tl.load(layer.seed).to(tl.uint32)
    total = tl.zeros([BLOCK_N], tl.float32)
    first = part * layer.groups_of_program
    for group in range(first, tl.minimum(first + layer.groups_of_program, layer.groups)):
        start = group * layer.rows
        of_group = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for r0 in tl.range(0, layer.rows, BLOCK_R, num_stages=4):
            of_group += load_dy(
                layer.dy,
                layer.y,
                (start + r0) * layer.outputs,
                place,
                (n < layer.outputs)[:, None] & (r0 + row < layer.rows)[None, :],
                seed,
                layer.threshold,
                layer.factor,
                RELU=layer.y is not None,
                DROPOUT=layer.seed is not None,
            ).to(tl.float32)
        bits = layer.bias_bits + tl.load(layer.task_ids + group) * layer.bias_task_stride
        total += masked_vector(tl.sum(of_group, 1), bits, n, layer.outputs)
    out = layer.bias_out + part * layer.bias_part_stride
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < layer.outputs)


@triton.jit
def weight_gradient_tile(
    layer,
    part,
    n,
    column,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One part of weight_out for outputs n and a column of inputs.

    Its arguments are one by one what the tile needs. The loops over groups and rows stay in one
    function, where Triton overlaps loads and products.
    """
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    word = column * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    row = tl.arange(0, BLOCK_R)
    in_outputs, in_inputs = n < layer.outputs, k < layer.inputs
    if layer.seed is not None:
        seed = tl.load(layer.seed).to(tl.uint32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first = part * layer.groups_of_program
    for group in range(first, tl.minimum(first + layer.groups_of_program, layer.groups)):
        start = group * layer.rows
        if layer.statistics is not None:
            affine = layer.affine + group * 2 * layer.inputs
        of_group = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r0 in range(0, layer.rows, BLOCK_R):
            # Rows beyond the last are read as the last, and x or dy is 0 there. dy is read
            # transposed, as it is multiplied: before tl.trans its loads would be narrower.
            in_rows = r0 + row < layer.rows
            near = tl.minimum(row, layer.rows - 1 - r0)
            dy_place = n[:, None] + near[None, :] * layer.outputs
            x_place = near[:, None] * layer.inputs + k[None, :]
            x_mask = in_inputs[None, :]
            dy_before = (start + r0) * layer.outputs
            dy_tile = tl.load(layer.dy + dy_before + dy_place, mask=in_outputs[:, None], other=0.0)
            if layer.y is not None:
                y_tile = tl.load(
                    layer.y + dy_before + dy_place, mask=in_outputs[:, None], other=0.0
                )
                dy_tile = tl.where(y_tile <= 0.0, 0.0, dy_tile)
            if (layer.y is not None) | (layer.statistics is not None):
                dy_tile = tl.where(in_rows[None, :], dy_tile, 0.0)
            else:
                x_mask = x_mask & in_rows[:, None]
            x_before = (start + r0) * layer.inputs
            x_tile = tl.load(layer.x + x_before + x_place, mask=x_mask, other=0.0)
            if layer.statistics is not None:
                statistics = layer.statistics + (start + r0) * 2 + near * 2
                mean, scale = tl.load(statistics), tl.load(statistics + 1)
                gain = tl.load(affine + k, mask=in_inputs, other=0.0)
                shift = tl.load(affine + layer.inputs + k, mask=in_inputs, other=0.0)
                x_tile = normalised(x_tile, mean, scale, gain, shift).to(layer.dy.dtype.element_ty)
            if layer.seed is not None:
                draw = dy_before.to(tl.uint32) + dy_place.to(tl.uint32)
                dy_tile = dy_tile.to(tl.float32) * kept(draw, seed, layer.threshold, layer.factor)
            dy_tile = dy_tile.to(x_tile.dtype)
            of_group = tl.dot(dy_tile, x_tile, of_group, input_precision=PRECISION)
        words = tl.load(
            layer.weight_bits
            + tl.load(layer.task_ids + group) * layer.task_stride
            + n[:, None] * layer.bits_stride
            + word[None, :],
            mask=in_outputs[:, None] & (word * 32 < layer.inputs)[None, :],
            other=0,
        )
        total += tl.where(bits_of(words, BLOCK_N, BLOCK_K), of_group, 0.0)
    out = layer.weight_out + part * layer.weight_part_stride
    tl.store(
        out + n[:, None] * layer.weight_row_stride + k[None, :],
        total.to(out.dtype.element_ty),
        mask=in_outputs[:, None] & in_inputs[None, :],
    )


@triton.jit
def masked_linear_weight_gradients_kernel(
    layers,  # a Layer each
    LAYERS: tl.constexpr,  # how many: of tuples with None in them Triton 3.6 finds no length
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of some layer's weight_out, or of its bias_out, for some groups after one another.

    The programs of a layer follow those of the one before.
    """
    program = tl.program_id(0)
    for i in tl.static_range(LAYERS):
        layer = layers[i]
        columns = columns_of(layer, BLOCK_K)
        tiles = tl.cdiv(layer.outputs, BLOCK_N) * columns
        programs = tiles * tl.cdiv(layer.groups, layer.groups_of_program)
        if (program >= 0) & (program < programs):
            tile = program % tiles
            part = (program // tiles).to(tl.int64)
            n = tile // columns * BLOCK_N + tl.arange(0, BLOCK_N)
            column = tile % columns
            if column * BLOCK_K >= layer.inputs:
                if layer.bias_bits is not None:
                    bias_gradient_tile(layer, part, n, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R)
            else:
                weight_gradient_tile(
                    layer,
                    part,
                    n,
                    column,
                    PRECISION=PRECISION,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                    BLOCK_R=BLOCK_R,
                )
        program -= programs


class Sum(NamedTuple):
    """Parts that the kernel below adds up."""

    parts: Tensor  # [number, rows, columns]
    out: Tensor  # [rows, columns], row_stride apart
    number: int
    rows: int
    columns: int
    row_stride: int


@triton.jit
def sum_of_parts_kernel(
    sums,  # a Sum each
    BLOCK: tl.constexpr,
):
    """Some elements of one `out`: the sums of the parts, first to last."""
    program = tl.program_id(0)
    for i in tl.static_range(len(sums)):
        of = sums[i]
        size = of.rows * of.columns
        programs = tl.cdiv(size, BLOCK)
        if (program >= 0) & (program < programs):
            place = program * BLOCK + tl.arange(0, BLOCK)
            inside = place < size
            parts = of.parts + place
            total = tl.zeros([BLOCK], tl.float32)
            for _ in range(of.number):
                total += tl.load(parts, mask=inside, other=0.0)
                parts += size
            out = of.out + place // of.columns * of.row_stride + place % of.columns
            tl.store(out, total.to(of.out.dtype.element_ty), mask=inside)
        program -= programs


class Tile(NamedTuple):
    """What one program computes: rows by columns of a result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By how the products are computed, "half" being those of 16-bit numbers; the largest tile of which
# there are enough is taken. None spills registers on any target that it is compiled for, or takes
# more shared memory than the GPUs with the least: 99 KiB on NVIDIA's, 64 KiB on AMD's. IEEE float32
# is computed without matrix units, and larger tiles spill.

# Rows are those of x, columns outputs.
FORWARD = {
    "ieee": (Tile(64, 64, 32, 4, 3),),
    "tf32": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "half": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 32, 4, 3)),
}
# Columns are inputs.
INPUT_GRADIENT = {
    "ieee": (Tile(64, 64, 16, 8, 4),),
    "tf32": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
}
# For sums of up to `depth` products of 16-bit numbers, where every program gets several tiles of
# rows: by the bytes that are loaded for an element of x, or of dy and y.
STATIONARY = {2: Tile(64, 64, 128, 4, 3), 4: Tile(64, 64, 128, 4, 2)}
# Rows are outputs, columns inputs. With 64 rows wgmma would be used, whose operands of TF32 must be
# transposed in shared memory: they would be copied there 4 bytes at a time.
WEIGHT_GRADIENT = {
    "ieee": (Tile(64, 64, 16, 4, 4), Tile(32, 32, 16, 4, 3)),
    "tf32": (Tile(32, 32, 32, 4, 2),),
    "half": (Tile(128, 128, 16, 8, 4), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 4)),
}

# Programs that keep a GPU busy: one for each multiprocessor of NVIDIA's H100.
ENOUGH = 132

# Sums over groups that are divided among programs: for how many times as many programs as that, and
# of how many groups at least.
PARTS_OF_ENOUGH = 4
GROUPS_OF_PART = 4

# Elements that a program adds up.
SUM_BLOCK = 1024


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    relu: bool,
    residual: Tensor | None = None,
    drop: float = 0.0,
    seed: Tensor | None = None,
    norm: Norm | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`harmodt::masked_linear`, and the last two arguments: those of `harmodt::norm_linear`."""
    x = x.contiguous()
    groups, rows, inputs = x.shape
    outputs, dtype = len(weight), dtype or x.dtype
    of_sum = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    y = torch.empty(groups, rows, outputs, dtype=of_sum, device=x.device)
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
        task_stride=weight_bits.stride(0),
        bits_stride=weight_bits.stride(1),
        bias_task_stride=0 if bias_bits is None else bias_bits.stride(0),
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
    weight_bits: Tensor,
    task_ids: Tensor,
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
        task_stride=weight_bits.stride(0),
        bits_stride=weight_bits.stride(1),
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
    """`harmodt::masked_linear_weight_gradients`: two launches, or one if no sums are in parts."""
    layers = layers_of(*operands)
    precision, tile, parts = weight_gradient_plan(layers)
    described = [describe(layer, parts) for layer in layers]
    tiles = (tiles_of(layer, tile, with_bias=True) for layer in layers)
    launch(
        masked_linear_weight_gradients_kernel,
        (sum(n * len(of.weight_out) for n, of in zip(tiles, described, strict=True)),),
        layers=tuple(described),
        LAYERS=len(described),
        PRECISION="tf32" if precision == "tf32" else "ieee",
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    add_parts(layers, described)


def describe(layer: LayerGradients, parts: int) -> Layer:
    """A layer as the kernel takes it, its sums in up to so many parts."""
    dy, x, bias_bits = layer.dy.contiguous(), layer.x.contiguous(), layer.bias_bits
    groups, rows, inputs = x.shape
    weight_out, bias_out = layer.weight_out, layer.bias_out
    each = groups_per_program(layer, parts)
    if len(weight_out) != triton.cdiv(groups, each):
        weight_out = torch.empty(triton.cdiv(groups, each), *weight_out.shape[1:], device=x.device)
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
        groups_of_program=each,
        task_stride=layer.weight_bits.stride(0),
        bits_stride=layer.weight_bits.stride(1),
        bias_task_stride=0 if bias_bits is None else bias_bits.stride(0),
        weight_part_stride=weight_out.stride(0),
        weight_row_stride=weight_out.stride(1),
        bias_part_stride=0 if bias_out is None else bias_out.stride(0),
        seed=layer.seed,
        threshold=threshold,
        factor=factor,
        statistics=layer.statistics,
        affine=layer.affine,
    )


def add_parts(layers: list[LayerGradients], described: list[Layer]) -> None:
    """Write the sums that are in parts to where the layers want them, in one launch."""
    pairs = []
    for layer, of in zip(layers, described, strict=True):
        for parts, out in ((of.weight_out, layer.weight_out), (of.bias_out, layer.bias_out)):
            if parts is not None and out is not None and parts is not out:
                pairs.append((parts, out))
    if not pairs:
        return
    sums = [
        Sum(parts, out, len(parts), math.prod(out.shape[:-1]), out.shape[-1], out.stride(-2))
        for parts, out in pairs
    ]
    launch(
        sum_of_parts_kernel,
        (sum(triton.cdiv(out.numel(), SUM_BLOCK) for _, out in pairs),),
        sums=tuple(sums),
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


class Plan(NamedTuple):
    """How a product is divided among programs.

    Attributes:
        stationary: whether a program keeps its tile of the weight for some tiles of a group's rows.
        tiles_of_program: how many, else 1.
    """

    precision: str
    tile: Tile
    programs: int
    stationary: bool = False
    tiles_of_program: int = 1

    def options(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {
            "tiles_of_program": self.tiles_of_program,
            "PRECISION": "tf32" if self.precision == "tf32" else "ieee",
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
    """Of products of a dtype with the groups and rows of x, so many columns, and sums so deep.

    Args:
        loaded: bytes for each element of x.
    """
    precision = precision_of(dtype)
    groups, rows, _ = x.shape
    tile = STATIONARY.get(loaded)
    if tile is not None and precision == "half" and depth <= tile.depth:
        of_group, others = triton.cdiv(rows, tile.rows), groups * triton.cdiv(columns, tile.columns)
        parts = triton.cdiv(2 * ENOUGH, others)
        if 2 * parts <= of_group:
            each = of_group // parts
            tile = tile._replace(depth=max(32, triton.next_power_of_2(depth)))
            return Plan(precision, tile, others * triton.cdiv(of_group, each), True, each)
    tile = largest_tile(table[precision], 2 * ENOUGH, groups, rows, columns)
    tiles = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Plan(precision, tile, tiles)


def largest_tile(
    tiles: tuple[Tile, ...], enough: int, results: int, rows: int, columns: int
) -> Tile:
    """The first tile of which there are enough in results of rows by columns, else the last."""
    for tile in tiles:
        if results * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= enough:
            return tile
    return tiles[-1]


def weight_gradient_plan(layers: list[LayerGradients]) -> tuple[str, Tile, int]:
    """Precision and tile of the layers' weight gradients, and in how many parts sums are computed.

    The tile is the first that makes enough programs of all layers together. Where a sum is of many
    groups they are divided among programs, `GROUPS_OF_PART` each at least, and so that all parts
    take no more memory than the layers' inputs do.
    """
    dtypes = {layer.dtype for layer in layers}
    precision = precision_of(torch.float32 if torch.float32 in dtypes else dtypes.pop())
    groups = min(len(layer.x) for layer in layers)
    sizes = 4 * sum(layer.weight_out[0].numel() for layer in layers)
    room = sum(layer.x.numel() * layer.dtype.itemsize for layer in layers) // sizes
    most = max(1, min(groups // GROUPS_OF_PART, room))
    for tile in WEIGHT_GRADIENT[precision]:
        of_layers = [tiles_of(layer, tile) for layer in layers]
        parts = min(most, triton.cdiv(PARTS_OF_ENOUGH * ENOUGH, sum(of_layers)))
        programs = (
            tiles * triton.cdiv(len(layer.x), groups_per_program(layer, parts))
            for tiles, layer in zip(of_layers, layers, strict=True)
        )
        if sum(programs) >= ENOUGH:
            break
    return precision, tile, parts


def tiles_of(layer: LayerGradients, tile: Tile, *, with_bias: bool = False) -> int:
    """Tiles of a layer's weight, and those of its bias, which are a column beside them."""
    _, outputs, inputs = layer.weight_out.shape
    columns = triton.cdiv(inputs, tile.columns) + (with_bias and layer.bias_out is not None)
    return triton.cdiv(outputs, tile.rows) * columns


def groups_per_program(layer: LayerGradients, parts: int) -> int:
    """How many groups a program sums, in up to so many parts; one, if each group is wanted."""
    groups = len(layer.x)
    return 1 if len(layer.weight_out) == groups else triton.cdiv(groups, parts)
