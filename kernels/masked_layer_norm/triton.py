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


@triton.jit
def comes_last(arrivals, programs):
    """Whether this program is the last of some to ask here: it sees what all stored before.

    The barrier puts the stores of a program's threads before its count, which one thread adds.
    `acq_rel` hands them on to who counts later, and to this program those of who counted before,
    on the whole GPU. AMD's barrier does not wait for stores: there, each thread has used what it
    loaded after it stored, by when its stores are done. Nobody waits for another program, and the
    last one puts the counter back to 0.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sums_of_parts(parts, count, column, size, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of [count, 2, size] over the parts, in a fixed order."""
    part = tl.arange(0, PARTS)
    gains = tl.zeros([PARTS, BLOCK_D], tl.float32)
    shifts = tl.zeros([PARTS, BLOCK_D], tl.float32)
    for first in range(0, count, PARTS):
        place = (first + part).to(tl.int64)[:, None] * 2 * size + column[None, :]
        inside = (first + part < count)[:, None] & (column < size)[None, :]
        gains += tl.load(parts + place, mask=inside, other=0.0)
        shifts += tl.load(parts + size + place, mask=inside, other=0.0)
    return tl.sum(gains, 0), tl.sum(shifts, 0)


@triton.jit(do_not_specialize=["rows", "tiles"])
def masked_layer_norm_kernel(
    x,  # [groups, rows, size]
    weight,  # [size]
    bias,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart
    task_ids,  # int64 [groups]
    y,  # [groups, rows, size]
    statistics,  # float32 [groups, rows, 2]: mean and inverse deviation
    arrivals,  # int32 [groups]: 0, for the gradient's programs to count
    rows,
    tiles,
    size,
    weight_task_stride,
    bias_task_stride,
    epsilon,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y of some rows. A launch takes no structures: what a kernel needs is an argument each."""
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
    if first == 0:
        tl.store(arrivals + group, 0)


@triton.jit(do_not_specialize=["rows", "tiles"])
def masked_layer_norm_gradient_kernel(
    dy,  # [groups, rows, size]
    d_residual,  # as x, or None
    x,  # [groups, rows, size]
    statistics,  # float32 [groups, rows, 2]
    arrivals,  # int32 [groups], 0: the programs of each group that are done, or of all
    weight,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart
    bias_bits,  # int32 [tasks, words], bias_task_stride apart
    task_ids,  # int64 [groups]
    dx,  # [groups, rows, size]
    sums,  # float32 [groups, tiles, 2, size]: the masked gradients by some rows
    weight_out,  # [groups, size], weight_group_stride apart, or [1, size]
    bias_out,  # [groups, size], bias_group_stride apart, or [1, size]
    rows,
    tiles,
    size,
    weight_task_stride,
    bias_task_stride,
    weight_group_stride,
    bias_group_stride,
    OF_GROUPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dx of some rows, and the gradients of gain and bias: of each group, or of all.

    A program stores the sums over its rows, and the last one adds up what all have stored: in order
    of the rows, so that it has no effect which one that is.

    A launch takes no structures: what a kernel needs is an argument each.
    """
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
    weight_bits += task * weight_task_stride
    bias_bits += task * bias_task_stride
    d_gain = masked_vector(tl.sum(d * normalised, 0), weight_bits, column, size)
    d_shift = masked_vector(tl.sum(d, 0), bias_bits, column, size)
    of_rows = sums + tl.program_id(0).to(tl.int64) * 2 * size
    tl.store(of_rows + column, d_gain, mask=in_size)
    tl.store(of_rows + size + column, d_shift, mask=in_size)
    gain = tl.load(weight + column, mask=in_size, other=0.0).to(tl.float32)
    gain = masked_vector(gain, weight_bits, column, size)
    d *= gain[None, :]
    along = tl.sum(d * normalised, 1) / size
    result = (d - (tl.sum(d, 1) / size)[:, None] - normalised * along[:, None]) * scale[:, None]
    if HAS_RESIDUAL:
        result += tl.load(d_residual + start * size + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start * size + place, result.to(dx.dtype.element_ty), mask=inside)
    out, programs = tl.zeros([], tl.int64), tl.num_programs(0)
    if OF_GROUPS:
        out, programs = group.to(tl.int64), tiles
    if comes_last(arrivals + out, programs):
        parts = sums + out * tiles * 2 * size
        d_gain, d_shift = sums_of_parts(parts, programs, column, size, PARTS, BLOCK_D)
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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    groups, rows, size = x.shape
    y = torch.empty_like(x, dtype=dtype)
    statistics = torch.empty(groups, rows, 2, device=x.device)
    arrivals = torch.empty(groups, dtype=torch.int32, device=x.device)
    tiles, block_r, block_d = tiles_of(rows, size)
    launch(
        masked_layer_norm_kernel,
        (groups * tiles,),
        x=x,
        weight=weight,
        bias=bias,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        y=y,
        statistics=statistics,
        arrivals=arrivals,
        rows=rows,
        tiles=tiles,
        size=size,
        weight_task_stride=weight_bits.stride(0),
        bias_task_stride=bias_bits.stride(0),
        epsilon=epsilon,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return y, statistics, arrivals


def masked_layer_norm_gradient(
    dy: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    arrivals: Tensor,
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
    tiles, block_r, block_d = tiles_of(rows, size)
    dx = torch.empty_like(x)
    sums = torch.empty(groups, tiles, 2, size, device=x.device)
    launch(
        masked_layer_norm_gradient_kernel,
        (groups * tiles,),
        dy=dy,
        d_residual=None if d_residual is None else d_residual.contiguous(),
        x=x,
        statistics=statistics,
        arrivals=arrivals,
        weight=weight,
        weight_bits=weight_bits,
        bias_bits=bias_bits,
        task_ids=task_ids,
        dx=dx,
        sums=sums,
        weight_out=weight_out,
        bias_out=bias_out,
        rows=rows,
        tiles=tiles,
        size=size,
        weight_task_stride=weight_bits.stride(0),
        bias_task_stride=bias_bits.stride(0),
        weight_group_stride=weight_out.stride(0),
        bias_group_stride=bias_out.stride(0),
        OF_GROUPS=len(weight_out) == groups,
        HAS_RESIDUAL=d_residual is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        PARTS=max(1, ELEMENTS // 2 // block_d),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return dx


def tiles_of(rows: int, size: int) -> tuple[int, int, int]:
    """Programs of a group, one at least; rows of each; a row's size rounded to a power of two."""
    columns = triton.next_power_of_2(size)
    of_program = max(1, min(ROWS, ELEMENTS // columns))
    return max(1, triton.cdiv(rows, of_program)), of_program, columns
