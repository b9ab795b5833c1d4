"""Triton kernels of the masked linear layer.

Shapes in comments: G groups, R rows of each, K inputs, N outputs, T tasks; x is [G, R, K], y is
[G, R, N], the weight is [N, K]. The mask of a weight tile is expanded from its words where the tile
is in registers, so that neither W ⊙ M nor an unpacked mask exists in memory.

The masked weight is the left operand of its products, whose results are hence transposed: matrix
units can take that operand from registers (wgmma) or from tensor memory (tcgen05). Triton still
brings it into their layout through shared memory, in every turn of the loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import bits_of, kept, masked_vector
from ..dropout import rate
from ..launch import launch, precision_of


@triton.jit
def load_dy(
    dy, y, start, place, mask, seed, threshold, factor, RELU: tl.constexpr, DROPOUT: tl.constexpr
):
    """dy where ReLU and dropout let y pass, else 0.

    Tensors, a place in them and a draw of dropout are an argument each.
    """
    dy_tile = tl.load(dy + start + place, mask=mask, other=0.0)
    if RELU:
        y_tile = tl.load(y + start + place, mask=mask, other=0.0)
        dy_tile = tl.where(y_tile <= 0.0, 0.0, dy_tile)
    if DROPOUT:
        draw = start.to(tl.uint32) + place.to(tl.uint32)
        dy_tile = dy_tile.to(tl.float32) * kept(draw, seed, threshold, factor)
    return dy_tile


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


@triton.jit(do_not_specialize=["groups", "rows", "seed", "threshold"])
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of one tile. A launch takes no structures: what a kernel needs is an argument each."""
    tiles_of_group = tl.cdiv(rows, BLOCK_R)
    row_tile, column_tile = tile_of(groups * tiles_of_group, tl.cdiv(outputs, BLOCK_N))
    group = row_tile // tiles_of_group
    first = row_tile % tiles_of_group * BLOCK_R
    task = tl.load(task_ids + group)
    row = tl.arange(0, BLOCK_R)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = first + row < rows, n < outputs
    # Rows and outputs beyond the last are computed as the last and not stored.
    x_row = tl.minimum(row, rows - 1 - first)
    w_row = tl.minimum(n, outputs - 1)
    start = group.to(tl.int64) * rows + first
    x += start * inputs
    before = start * outputs
    y += before
    weight_bits += task * task_stride
    if DROPOUT:
        seed = tl.load(seed).to(tl.uint32)
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        word = k0 // 32 + tl.arange(0, BLOCK_K // 32)
        w = tl.load(
            weight + w_row[:, None] * weight_stride + k[None, :],
            mask=(k < inputs)[None, :],
            other=0.0,
        )
        words = tl.load(
            weight_bits + w_row[:, None] * bits_stride + word[None, :],
            mask=(word * 32 < inputs)[None, :],
            other=0,
        )
        x_tile = tl.load(
            x + x_row[:, None] * inputs + k[None, :],
            mask=(k < inputs)[None, :],
            other=0.0,
        )
        w = tl.where(bits_of(words, BLOCK_N, BLOCK_K), w, 0.0).to(x_tile.dtype)
        total = tl.dot(w, tl.trans(x_tile), total, input_precision=PRECISION)
    if HAS_BIAS:
        b = tl.load(bias + n, mask=in_outputs, other=0.0).to(tl.float32)
        total += masked_vector(b, bias_bits + task * bias_task_stride, n, outputs)[:, None]
    if RELU:
        total = tl.where(total <= 0.0, 0.0, total)  # NaN stays
    result = tl.trans(total)
    place = row[:, None] * outputs + n[None, :]
    inside = in_rows[:, None] & in_outputs[None, :]
    if DROPOUT:
        draw = before.to(tl.uint32) + place.to(tl.uint32)
        result *= kept(draw, seed, threshold, factor)
    if HAS_RESIDUAL:
        result += tl.load(residual + before + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["groups", "rows", "seed", "threshold"])
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
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one tile. A launch takes no structures: what a kernel needs is an argument each."""
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


@triton.jit
def sums_of_rows(
    dy,  # [groups, rows, outputs]
    y,  # as dy, or None
    bias_bits,  # int32 [tasks, words], bias_task_stride apart
    task_ids,  # int64 [groups]
    first,
    last,
    n,
    rows,
    outputs,
    bias_task_stride,
    seed,
    threshold,
    factor,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The bias gradient of outputs n: the masked sums of dy over the rows of each group.

    A part of the kernel below, with its arguments.
    """
    row = tl.arange(0, BLOCK_R)
    place = n[:, None] + row[None, :] * outputs
    total = tl.zeros([BLOCK_N], tl.float32)
    for group in range(first, last):
        start = group * rows
        of_group = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for r0 in tl.range(0, rows, BLOCK_R, num_stages=4):
            inside = (n < outputs)[:, None] & (r0 + row < rows)[None, :]
            of_group += load_dy(
                dy,
                y,
                (start + r0) * outputs,
                place,
                inside,
                seed,
                threshold,
                factor,
                RELU=RELU,
                DROPOUT=DROPOUT,
            ).to(tl.float32)
        sums = tl.sum(of_group, 1)
        task = tl.load(task_ids + group)
        total += masked_vector(sums, bias_bits + task * bias_task_stride, n, outputs)
    return total


@triton.jit(do_not_specialize=["groups", "rows", "groups_of_program", "seed", "threshold"])
def masked_linear_weight_gradient_kernel(
    dy,  # [groups, rows, outputs]
    y,  # as dy, or None
    x,  # [groups, rows, inputs]
    weight_bits,  # int32 [tasks, outputs, words], task_stride and bits_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart, or None
    task_ids,  # int64 [groups]
    weight_out,  # [parts, outputs, inputs], weight_part_stride and weight_row_stride apart
    bias_out,  # [parts, outputs], bias_part_stride apart, or None
    groups,
    rows,
    inputs,
    outputs,
    groups_of_program,
    task_stride,
    bits_stride,
    bias_task_stride,
    weight_part_stride,
    weight_row_stride,
    bias_part_stride,
    seed,  # int64 [1], or None
    threshold,
    factor,  # of elements that dropout keeps
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of weight_out, or of bias_out, for some groups one after the other.

    A launch takes no structures: what a kernel needs is an argument each. The loops over groups and
    rows stay in one function, where Triton overlaps loads and products.
    """
    k_tiles = tl.cdiv(inputs, BLOCK_K)
    columns = k_tiles + 1 if HAS_BIAS else k_tiles  # the bias is a column of its own
    tiles = tl.cdiv(outputs, BLOCK_N) * columns
    tile = tl.program_id(0) % tiles
    part = (tl.program_id(0) // tiles).to(tl.int64)
    first = part * groups_of_program
    last = tl.minimum(first + groups_of_program, groups)
    n = tile // columns * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile % columns
    in_outputs = n < outputs
    if DROPOUT:
        seed = tl.load(seed).to(tl.uint32)
    if HAS_BIAS:  # noqa: SIM102 (decided at compile time)
        if column == k_tiles:
            bias_out += part * bias_part_stride
            sums = sums_of_rows(
                dy=dy,
                y=y,
                bias_bits=bias_bits,
                task_ids=task_ids,
                first=first,
                last=last,
                n=n,
                rows=rows,
                outputs=outputs,
                bias_task_stride=bias_task_stride,
                seed=seed,
                threshold=threshold,
                factor=factor,
                RELU=RELU,
                DROPOUT=DROPOUT,
                BLOCK_N=BLOCK_N,
                BLOCK_R=BLOCK_R,
            )
            tl.store(bias_out + n, sums.to(bias_out.dtype.element_ty), mask=in_outputs)
            return
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    word = column * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    row = tl.arange(0, BLOCK_R)
    in_inputs = k < inputs
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for group in range(first, last):
        start = group * rows
        of_group = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r0 in range(0, rows, BLOCK_R):
            # Rows beyond the last are read as the last, and x or dy is 0 there. dy is read
            # transposed, as it is multiplied: before tl.trans its loads would be narrower.
            in_rows = r0 + row < rows
            near = tl.minimum(row, rows - 1 - r0)
            dy_place = n[:, None] + near[None, :] * outputs
            x_place = near[:, None] * inputs + k[None, :]
            x_mask = in_inputs[None, :]
            dy_before = (start + r0) * outputs
            dy_tile = tl.load(dy + dy_before + dy_place, mask=in_outputs[:, None], other=0.0)
            if RELU:
                y_tile = tl.load(y + dy_before + dy_place, mask=in_outputs[:, None], other=0.0)
                dy_tile = tl.where((y_tile <= 0.0) | ~in_rows[None, :], 0.0, dy_tile)
            else:
                x_mask = x_mask & in_rows[:, None]
            x_tile = tl.load(x + (start + r0) * inputs + x_place, mask=x_mask, other=0.0)
            if DROPOUT:
                draw = dy_before.to(tl.uint32) + dy_place.to(tl.uint32)
                dy_tile = dy_tile.to(tl.float32) * kept(draw, seed, threshold, factor)
            dy_tile = dy_tile.to(x_tile.dtype)
            of_group = tl.dot(dy_tile, x_tile, of_group, input_precision=PRECISION)
        task = tl.load(task_ids + group)
        words = tl.load(
            weight_bits + task * task_stride + n[:, None] * bits_stride + word[None, :],
            mask=in_outputs[:, None] & (word * 32 < inputs)[None, :],
            other=0,
        )
        total += tl.where(bits_of(words, BLOCK_N, BLOCK_K), of_group, 0.0)
    weight_out += part * weight_part_stride
    tl.store(
        weight_out + n[:, None] * weight_row_stride + k[None, :],
        total.to(weight_out.dtype.element_ty),
        mask=in_outputs[:, None] & in_inputs[None, :],
    )


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
    "ieee": (Tile(64, 64, 16, 4, 4),),
    "tf32": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
}
# Rows are outputs, columns inputs. With 64 rows wgmma would be used, whose operands of TF32 must be
# transposed in shared memory: they would be copied there 4 bytes at a time.
WEIGHT_GRADIENT = {
    "ieee": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
    "tf32": (Tile(32, 32, 32, 4, 3),),
    "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 4)),
}

# Programs that keep a GPU busy.
ENOUGH = 128


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
) -> Tensor:
    """`harmodt::masked_linear`; residual and dropout are further arguments for linear_residual."""
    x = x.contiguous()
    groups, rows, inputs = x.shape
    outputs = len(weight)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(groups, rows, outputs, dtype=dtype, device=x.device)
    precision, tile = product_tile(FORWARD, x, x.dtype, outputs)
    threshold, factor = rate(drop)
    launch(
        masked_linear_kernel,
        (groups * triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),),
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
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        DROPOUT=drop > 0,
        PRECISION="tf32" if precision == "tf32" else "ieee",
        BLOCK_R=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return y


def masked_linear_input_gradient(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    weight_bits: Tensor,
    task_ids: Tensor,
    dtype: torch.dtype | None = None,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    dy = dy.contiguous()
    groups, rows, outputs = dy.shape
    inputs = weight.shape[1]
    dx = torch.empty(groups, rows, inputs, dtype=dtype or dy.dtype, device=dy.device)
    precision, tile = product_tile(INPUT_GRADIENT, dy, dx.dtype, inputs)
    threshold, factor = rate(drop)
    launch(
        masked_linear_input_gradient_kernel,
        (groups * triton.cdiv(rows, tile.rows) * triton.cdiv(inputs, tile.columns),),
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
        PRECISION="tf32" if precision == "tf32" else "ieee",
        BLOCK_R=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_N=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return dx


def masked_linear_group_gradients(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """`harmodt::masked_linear_group_gradients`; dropout's arguments are for linear_residual."""
    operands = dy, y, x, weight_bits, bias_bits, task_ids
    groups, outputs = len(x), dy.shape[2]
    if len(weight_out) == groups:
        launch_weight_gradient(*operands, weight_out, bias_out, 1, drop, seed)
        return
    each = groups_per_program(x, outputs)
    parts = triton.cdiv(groups, each)
    if parts == 1:
        launch_weight_gradient(*operands, weight_out, bias_out, each, drop, seed)
        return
    weight_parts = torch.empty(parts, outputs, x.shape[2], device=x.device)
    bias_parts = torch.empty(parts, 0 if bias_bits is None else outputs, device=x.device)
    launch_weight_gradient(*operands, weight_parts, bias_parts, each, drop, seed)
    weight_out.copy_(weight_parts.sum(0, keepdim=True))
    if bias_out is not None:
        bias_out.copy_(bias_parts.sum(0, keepdim=True))


def launch_weight_gradient(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None,
    groups_of_program: int,
    drop: float,
    seed: Tensor | None,
) -> None:
    """Write the sums of each `groups_of_program` groups.

    Args:
        weight_out, bias_out: [parts, N, K] and [parts, N]. The other arguments are those of the
            operations, hence eleven in all.
    """
    dy, x = dy.contiguous(), x.contiguous()
    groups, rows, inputs = x.shape
    outputs = dy.shape[2]
    precision, tile = weight_gradient_tile(x, outputs)
    columns = triton.cdiv(inputs, tile.columns) + (bias_bits is not None)
    threshold, factor = rate(drop)
    launch(
        masked_linear_weight_gradient_kernel,
        (len(weight_out) * triton.cdiv(outputs, tile.rows) * columns,),
        dy=dy,
        y=y,
        x=x,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        weight_out=weight_out,
        bias_out=bias_out,
        groups=groups,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        groups_of_program=groups_of_program,
        task_stride=weight_bits.stride(0),
        bits_stride=weight_bits.stride(1),
        bias_task_stride=0 if bias_bits is None else bias_bits.stride(0),
        weight_part_stride=weight_out.stride(0),
        weight_row_stride=weight_out.stride(1),
        bias_part_stride=0 if bias_out is None else bias_out.stride(0),
        seed=seed,
        threshold=threshold,
        factor=factor,
        RELU=y is not None,
        DROPOUT=drop > 0,
        HAS_BIAS=bias_bits is not None,
        PRECISION="tf32" if precision == "tf32" else "ieee",
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def product_tile(
    table: dict[str, tuple[Tile, ...]], x: Tensor, dtype: torch.dtype, columns: int
) -> tuple[str, Tile]:
    """Precision of products of a dtype, and tile for a result with the groups and rows of x."""
    precision = precision_of(dtype)
    groups, rows, _ = x.shape
    return precision, largest_tile(table[precision], 2 * ENOUGH, groups, rows, columns)


def weight_gradient_tile(x: Tensor, outputs: int) -> tuple[str, Tile]:
    precision = precision_of(x.dtype)
    tiles = WEIGHT_GRADIENT[precision]
    return precision, largest_tile(tiles, ENOUGH // 2, 1, outputs, x.shape[2])


def largest_tile(
    tiles: tuple[Tile, ...], enough: int, results: int, rows: int, columns: int
) -> Tile:
    """The first tile of which there are enough in results of rows by columns, else the last."""
    for tile in tiles:
        if results * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= enough:
            return tile
    return tiles[-1]


def groups_per_program(x: Tensor, outputs: int) -> int:
    """How many groups a program of the weight gradient sums; the rest is summed afterwards.

    As many as leave enough programs to fill a GPU, two at least, and so many that the sums take no
    more memory than the gradient of x, which is computed after they are freed.
    """
    groups, rows, inputs = x.shape
    _, tile = weight_gradient_tile(x, outputs)
    tiles = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    room = groups * rows * x.element_size() // (4 * outputs)
    parts = max(1, min(ENOUGH // tiles, room, groups // 2))
    return max(1, triton.cdiv(groups, parts))
