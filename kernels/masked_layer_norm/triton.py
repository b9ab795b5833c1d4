"""Triton kernels of the masked LayerNorm.

Shapes in comments: G groups, R rows of each, d elements of a row. A program holds whole rows in
registers, and computes in float32 whatever the operands are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import masked_vector
from ..launch import launch

# Elements of x that a program holds at a time: 32 for each thread.
ELEMENTS = 4096
NUM_WARPS = 4
# Rows whose gradients one program adds up, at most: as many programs as fill a GPU are left of the
# 600 rows of a group.
ROWS = 16
# Parts of those sums that are added at a time, and columns of one program.
PARTS, COLUMNS = 32, 32


@triton.jit(do_not_specialize=["rows"])
def masked_layer_norm_kernel(
    x,  # [groups, rows, size]
    weight,  # [size]
    bias,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart
    task_ids,  # int64 [groups]
    y,  # [groups, rows, size]
    statistics,  # float32 [groups, rows, 2]: mean and inverse deviation
    rows,
    size,
    weight_task_stride,
    bias_task_stride,
    epsilon,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y of some rows. A launch takes no structures: what a kernel needs is an argument each."""
    tiles = tl.cdiv(rows, BLOCK_R)
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_R
    task = tl.load(task_ids + group)
    start = group.to(tl.int64) * rows + first
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rows, in_size = first + row < rows, column < size
    inside = in_rows[:, None] & in_size[None, :]
    place = row[:, None] * size + column[None, :]
    values = tl.load(x + start * size + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / size
    centred = tl.where(in_size[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / size
    scale = tl.rsqrt(variance + tl.cast(epsilon, tl.float32))
    gain = tl.load(weight + column, mask=in_size, other=0.0).to(tl.float32)
    gain = masked_vector(gain, weight_bits + task * weight_task_stride, column, size)
    shift = tl.load(bias + column, mask=in_size, other=0.0).to(tl.float32)
    shift = masked_vector(shift, bias_bits + task * bias_task_stride, column, size)
    result = centred * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(y + start * size + place, result.to(y.dtype.element_ty), mask=inside)
    tl.store(statistics + (start + row) * 2, mean, mask=in_rows)
    tl.store(statistics + (start + row) * 2 + 1, scale, mask=in_rows)


@triton.jit(do_not_specialize=["rows"])
def masked_layer_norm_gradient_kernel(
    dy,  # [groups, rows, size]
    d_residual,  # as x, or None
    x,  # [groups, rows, size]
    statistics,  # float32 [groups, rows, 2]
    weight,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart
    task_ids,  # int64 [groups]
    dx,  # [groups, rows, size]
    sums,  # float32 [groups, tiles, 2, size]: of dy times normalised x, and of dy
    rows,
    size,
    weight_task_stride,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx of some rows, and the sums over them that gain and bias get.

    A launch takes no structures: what a kernel needs is an argument each.
    """
    tiles = tl.cdiv(rows, BLOCK_R)
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_R
    task = tl.load(task_ids + group)
    start = group.to(tl.int64) * rows + first
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rows, in_size = first + row < rows, column < size
    inside = in_rows[:, None] & in_size[None, :]
    place = row[:, None] * size + column[None, :]
    values = tl.load(x + start * size + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + start * size + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(statistics + (start + row) * 2, mask=in_rows, other=0.0)
    scale = tl.load(statistics + (start + row) * 2 + 1, mask=in_rows, other=0.0)
    normalised = tl.where(inside, (values - mean[:, None]) * scale[:, None], 0.0)
    sums += tl.program_id(0).to(tl.int64) * 2 * size
    tl.store(sums + column, tl.sum(d * normalised, 0), mask=in_size)
    tl.store(sums + size + column, tl.sum(d, 0), mask=in_size)
    gain = tl.load(weight + column, mask=in_size, other=0.0).to(tl.float32)
    gain = masked_vector(gain, weight_bits + task * weight_task_stride, column, size)
    d *= gain[None, :]
    along = tl.sum(d * normalised, 1) / size
    result = (d - (tl.sum(d, 1) / size)[:, None] - normalised * along[:, None]) * scale[:, None]
    if HAS_RESIDUAL:
        result += tl.load(d_residual + start * size + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start * size + place, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def masked_layer_norm_sums_kernel(
    sums,  # float32 [groups, tiles, 2, size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart
    task_ids,  # int64 [groups]
    weight_out,  # [outs, size], weight_group_stride apart: of each group, or of all
    bias_out,  # [outs, size], bias_group_stride apart
    groups_of_out,
    tiles,
    size,
    weight_task_stride,
    bias_task_stride,
    weight_group_stride,
    bias_group_stride,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The masked gradients of some gains and biases, of one group or of all, in a fixed order.

    A launch takes no structures: what a kernel needs is an argument each.
    """
    out = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, PARTS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_size = column < size
    d_gain = tl.zeros([COLUMNS], tl.float32)
    d_shift = tl.zeros([COLUMNS], tl.float32)
    for group in range(out * groups_of_out, (out + 1) * groups_of_out):
        task = tl.load(task_ids + group)
        gain = tl.zeros([PARTS, COLUMNS], tl.float32)
        shift = tl.zeros([PARTS, COLUMNS], tl.float32)
        for first in range(0, tiles, PARTS):
            inside = (first + part < tiles)[:, None] & in_size[None, :]
            place = (group * tiles + first + part)[:, None] * 2 * size + column[None, :]
            gain += tl.load(sums + place, mask=inside, other=0.0)
            shift += tl.load(sums + size + place, mask=inside, other=0.0)
        gain_bits = weight_bits + task * weight_task_stride
        shift_bits = bias_bits + task * bias_task_stride
        d_gain += masked_vector(tl.sum(gain, 0), gain_bits, column, size)
        d_shift += masked_vector(tl.sum(shift, 0), shift_bits, column, size)
    tl.store(weight_out + out * weight_group_stride + column, d_gain, mask=in_size)
    tl.store(bias_out + out * bias_group_stride + column, d_shift, mask=in_size)


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    groups, rows, size = x.shape
    y = torch.empty_like(x)
    statistics = torch.empty(groups, rows, 2, device=x.device)
    block_r, block_d = block_of(size)
    launch(
        masked_layer_norm_kernel,
        (groups * triton.cdiv(rows, block_r),),
        x=x,
        weight=weight,
        bias=bias,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        y=y,
        statistics=statistics,
        rows=rows,
        size=size,
        weight_task_stride=weight_bits.stride(0),
        bias_task_stride=bias_bits.stride(0),
        epsilon=epsilon,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return y, statistics


def masked_layer_norm_gradient(
    dy: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
) -> Tensor:
    """Its arguments are the operands of the registered operation, one by one."""
    dy, x = dy.contiguous(), x.contiguous()
    groups, rows, size = x.shape
    block_r, block_d = block_of(size)
    tiles = triton.cdiv(rows, block_r)
    dx = torch.empty_like(x)
    sums = torch.empty(groups, tiles, 2, size, device=x.device)
    launch(
        masked_layer_norm_gradient_kernel,
        (groups * tiles,),
        dy=dy,
        d_residual=None if d_residual is None else d_residual.contiguous(),
        x=x,
        statistics=statistics,
        weight=weight,
        weight_bits=weight_bits,
        task_ids=task_ids,
        dx=dx,
        sums=sums,
        rows=rows,
        size=size,
        weight_task_stride=weight_bits.stride(0),
        HAS_RESIDUAL=d_residual is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    launch(
        masked_layer_norm_sums_kernel,
        (len(weight_out), triton.cdiv(size, COLUMNS)),
        sums=sums,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        weight_out=weight_out,
        bias_out=bias_out,
        groups_of_out=groups // len(weight_out),
        tiles=tiles,
        size=size,
        weight_task_stride=weight_bits.stride(0),
        bias_task_stride=bias_bits.stride(0),
        weight_group_stride=weight_out.stride(0),
        bias_group_stride=bias_out.stride(0),
        PARTS=PARTS,
        COLUMNS=COLUMNS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return dx


def block_of(size: int) -> tuple[int, int]:
    """Rows of a program, and elements of a row rounded up to a power of two."""
    columns = triton.next_power_of_2(size)
    return max(1, min(ROWS, ELEMENTS // columns)), columns
