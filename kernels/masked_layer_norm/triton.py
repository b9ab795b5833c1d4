"""Triton kernels of the masked LayerNorm.

A program holds whole rows in registers. It computes in float32, whatever the operands' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import masked_vector, task_of
from ..launch import launch
from ..masks import stride_of

# Elements of x that a program holds at a time: 32 per thread.
ELEMENTS = 4096
NUM_WARPS = 4
# The most rows whose gradients one program sums. With this limit, a group of 600 rows still makes
# enough programs to fill a GPU.
ROWS = 16


@triton.jit
def is_last(arrivals, programs):
    """Count this program's arrival, and return whether it is the last of `programs` to arrive.

    The last program sees everything that the others stored before they arrived. No program waits
    for another, and the last one sets the counter back to 0.

    It sees the stores for two reasons. At the barrier, one thread waits until all threads of its
    program have stored; then this thread counts. `acq_rel` makes these stores visible to every
    program of the GPU that counts later. On AMD's GPUs, the barrier does not wait until stores are
    complete. There, the stores are complete before the barrier: after its stores, each thread has
    loaded values and used them.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sum_chunks(chunks, count, column, size, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of [count, 2, size] over the first dimension, in a fixed order."""
    chunk = tl.arange(0, CHUNKS)
    gains = tl.zeros([CHUNKS, BLOCK_D], tl.float32)
    shifts = tl.zeros([CHUNKS, BLOCK_D], tl.float32)
    for first in range(0, count, CHUNKS):
        offset = (first + chunk).to(tl.int64)[:, None] * 2 * size + column[None, :]
        inside = (first + chunk < count)[:, None] & (column < size)[None, :]
        gains += tl.load(chunks + offset, mask=inside, other=0.0)
        shifts += tl.load(chunks + size + offset, mask=inside, other=0.0)
    return tl.sum(gains, 0), tl.sum(shifts, 0)


@triton.jit(do_not_specialize=["rows", "tiles"])
def masked_layer_norm_kernel(
    x,  # [groups, rows, size]
    weight,  # [size]
    bias,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart, or None
    bias_bits,  # int32 [tasks, words], bias_task_stride apart, or None
    task_ids,  # int64 [groups], or None
    y,  # [groups, rows, size]
    statistics,  # float32 [groups, rows, 2]: mean and inverse standard deviation
    arrivals,  # int32 [groups]: this kernel writes 0, the gradient kernel counts programs in it
    rows,
    tiles,
    size,
    weight_task_stride,
    bias_task_stride,
    epsilon,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes y for one block of rows of one group."""
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_R
    task = task_of(task_ids, group)
    start = group.to(tl.int64) * rows + first
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rows, in_size = first + row < rows, column < size
    inside = in_rows[:, None] & in_size[None, :]
    offset = row[:, None] * size + column[None, :]
    values = tl.load(x + start * size + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / size
    centred = tl.where(in_size[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / size
    scale = tl.rsqrt(variance + tl.cast(epsilon, tl.float32))
    gain = tl.load(weight + column, mask=in_size, other=0.0).to(tl.float32)
    gain = masked_vector(gain, weight_bits, task * weight_task_stride, column, size)
    shift = tl.load(bias + column, mask=in_size, other=0.0).to(tl.float32)
    shift = masked_vector(shift, bias_bits, task * bias_task_stride, column, size)
    result = centred * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(y + start * size + offset, result.to(y.dtype.element_ty), mask=inside)
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
    arrivals,  # int32 [groups], initially 0: finished programs per group, or all in element 0
    weight,  # [size]
    weight_bits,  # int32 [tasks, words], weight_task_stride apart, or None
    bias_bits,  # int32 [tasks, words], bias_task_stride apart, or None
    task_ids,  # int64 [groups], or None
    dx,  # [groups, rows, size]
    sums,  # float32 [groups, tiles, 2, size]: each tile's masked gradients of gain and shift
    weight_out,  # [groups, size], weight_group_stride apart, or [1, size]
    bias_out,  # [groups, size], bias_group_stride apart, or [1, size]
    rows,
    tiles,
    size,
    weight_task_stride,
    bias_task_stride,
    weight_group_stride,
    bias_group_stride,
    PER_GROUP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes dx for one block of rows, and the gradients of gain and shift, per group or summed.

    Each program stores the sums over its rows. The last program to finish adds up the stored sums,
    in the order of the rows. So the result does not depend on which program is the last.
    """
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_R
    task = task_of(task_ids, group)
    start = group.to(tl.int64) * rows + first
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rows, in_size = first + row < rows, column < size
    inside = in_rows[:, None] & in_size[None, :]
    offset = row[:, None] * size + column[None, :]
    values = tl.load(x + start * size + offset, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + start * size + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(statistics + (start + row) * 2, mask=in_rows, other=0.0)
    scale = tl.load(statistics + (start + row) * 2 + 1, mask=in_rows, other=0.0)
    normalised = tl.where(inside, (values - mean[:, None]) * scale[:, None], 0.0)
    gain_before, shift_before = task * weight_task_stride, task * bias_task_stride
    d_gain = tl.sum(d * normalised, 0)
    d_gain = masked_vector(d_gain, weight_bits, gain_before, column, size)
    d_shift = masked_vector(tl.sum(d, 0), bias_bits, shift_before, column, size)
    row_sums = sums + tl.program_id(0).to(tl.int64) * 2 * size
    tl.store(row_sums + column, d_gain, mask=in_size)
    tl.store(row_sums + size + column, d_shift, mask=in_size)
    gain = tl.load(weight + column, mask=in_size, other=0.0).to(tl.float32)
    gain = masked_vector(gain, weight_bits, gain_before, column, size)
    d *= gain[None, :]
    along = tl.sum(d * normalised, 1) / size
    result = (d - (tl.sum(d, 1) / size)[:, None] - normalised * along[:, None]) * scale[:, None]
    if HAS_RESIDUAL:
        result += tl.load(d_residual + start * size + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start * size + offset, result.to(dx.dtype.element_ty), mask=inside)
    out, programs = tl.zeros([], tl.int64), tl.num_programs(0)
    if PER_GROUP:
        out, programs = group.to(tl.int64), tiles
    if is_last(arrivals + out, programs):
        chunks = sums + out * tiles * 2 * size
        d_gain, d_shift = sum_chunks(chunks, programs, column, size, CHUNKS, BLOCK_D)
        tl.store(weight_out + out * weight_group_stride + column, d_gain, mask=in_size)
        tl.store(bias_out + out * bias_group_stride + column, d_shift, mask=in_size)


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `harmodt::masked_layer_norm`, with the arguments of its schema."""
    x = x.contiguous()
    groups, rows, size = x.shape
    y = torch.empty_like(x, dtype=dtype)
    statistics = torch.empty(groups, rows, 2, dtype=torch.float32, device=x.device)
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
        weight_task_stride=stride_of(weight_bits, 0),
        bias_task_stride=stride_of(bias_bits, 0),
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
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor,
) -> Tensor:
    """Computes `harmodt::masked_layer_norm_gradient`, with the arguments of its schema."""
    dy, x = dy.contiguous(), x.contiguous()
    groups, rows, size = x.shape
    tiles, block_r, block_d = tiles_of(rows, size)
    dx = torch.empty_like(x)
    sums = torch.empty(groups, tiles, 2, size, dtype=torch.float32, device=x.device)
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
        weight_task_stride=stride_of(weight_bits, 0),
        bias_task_stride=stride_of(bias_bits, 0),
        weight_group_stride=weight_out.stride(0),
        bias_group_stride=bias_out.stride(0),
        PER_GROUP=len(weight_out) == groups,
        HAS_RESIDUAL=d_residual is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        CHUNKS=max(1, ELEMENTS // 2 // block_d),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return dx


def tiles_of(rows: int, size: int) -> tuple[int, int, int]:
    """Programs per group (at least 1), rows per program, and size rounded up to a power of 2."""
    columns = triton.next_power_of_2(size)
    program_rows = max(1, min(ROWS, ELEMENTS // columns))
    return max(1, triton.cdiv(rows, program_rows)), program_rows, columns
