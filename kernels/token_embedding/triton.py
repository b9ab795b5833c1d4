"""Triton kernels of the token embedding: each of S steps has three tokens of d elements.

Products are in float32 without TF32: they are few, and all layers read the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

# Steps, token elements and inputs that a program processes at a time, forward.
TILE = (32, 64, 32)
# Backward: the third number is also the number of the table's rows.
GRADIENT_TILE = (64, 32, 16)
# The most blocks of steps that a part of a layer's gradient sums, unless there are MOST_PARTS.
BLOCKS_OF_PART = 8
MOST_PARTS = 64
PARTS = 8  # parts that a program loads at a time
TIMESTEPS = 2048  # timesteps that a program looks through at a time
NUM_WARPS = 4

PARAMETERS = ("weight0", "bias0", "weight1", "bias1", "weight2", "bias2", "table")


@triton.jit(do_not_specialize=["steps", "inputs0", "inputs1", "inputs2"])
def token_embedding_kernel(
    x0,  # [steps, inputs0], and so on
    x1,
    x2,
    weight0,  # [size, inputs0], and so on
    bias0,  # [size]
    weight1,
    bias1,
    weight2,
    bias2,
    table,  # [rows, size]
    timesteps,  # int64 [steps]
    tokens,  # [steps, 3, size]
    arrivals,  # int32 [3, size]: counters for the gradient's kernel
    steps,
    size,
    inputs0,
    inputs1,
    inputs2,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a tile of the tokens of one kind."""
    kind = tl.program_id(2)
    x, weight, bias, inputs = x0, weight0, bias0, inputs0
    if kind == 1:
        x, weight, bias, inputs = x1, weight1, bias1, inputs1
    if kind == 2:
        x, weight, bias, inputs = x2, weight2, bias2, inputs2
    step = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_steps, in_size = step < steps, n < size
    inside = in_steps[:, None] & in_size[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_mask = in_steps[:, None] & (k < inputs)[None, :]
        w_mask = (k < inputs)[:, None] & in_size[None, :]
        x_tile = tl.load(x + step[:, None] * inputs + k[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(weight + k[:, None] + n[None, :] * inputs, mask=w_mask, other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
    time = tl.load(timesteps + step, mask=in_steps, other=0)
    total += tl.load(bias + n, mask=in_size, other=0.0)[None, :]
    total += tl.load(table + time[:, None] * size + n[None, :], mask=inside, other=0.0)
    tl.store(tokens + (step * 3 + kind)[:, None] * size + n[None, :], total, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(arrivals + kind * size + n, 0, mask=in_size)


@triton.jit
def is_last(arrivals, programs, stored):
    """Count this program's arrival, and return whether it is the last of `programs` to arrive.

    Args:
        arrivals: a counter, initially 0. The last program sets it back to 0.
        stored: 1, computed from values that all threads have loaded after their stores. So their
            stores are complete, also on AMD's GPUs, where a barrier does not wait for stores.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, stored, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def table_gradient(
    d_tokens,
    timesteps,
    d_table,
    order,  # int32 [steps], scratch
    block,
    n,
    steps,
    size,
    rows,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TIMESTEPS: tl.constexpr,
):
    """Computes the gradient of BLOCK_K rows of the table, for the token elements n.

    It first lists the steps whose timesteps are among these rows. The list begins in `order` after
    the steps of earlier rows, so the lists of all programs fit.
    """
    first = block * BLOCK_K
    end = tl.minimum(first + BLOCK_K, rows)
    before = tl.zeros([], tl.int32)
    for s0 in range(0, steps, TIMESTEPS):
        step = s0 + tl.arange(0, TIMESTEPS)
        time = tl.load(timesteps + step, mask=step < steps, other=rows)
        before += tl.sum((time < first).to(tl.int32), 0)
    order += before
    count = tl.zeros([], tl.int32)
    for s0 in range(0, steps, TIMESTEPS):
        step = s0 + tl.arange(0, TIMESTEPS)
        time = tl.load(timesteps + step, mask=step < steps, other=rows)
        here = ((time >= first) & (time < end)).to(tl.int32)
        tl.store(order + count + tl.cumsum(here, 0) - 1, step, mask=here != 0)
        count += tl.sum(here, 0)
    tl.debug_barrier()  # every thread now sees the whole list
    row = first + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for i0 in range(0, count, BLOCK_S):
        i = i0 + tl.arange(0, BLOCK_S)
        step = tl.load(order + i, mask=i < count, other=0).to(tl.int64)
        time = tl.load(timesteps + step, mask=i < count, other=0)
        mask = (i < count)[:, None] & (n < size)[None, :]
        rows_of_d = d_tokens + step[:, None] * 3 * size + n[None, :]
        d = tl.load(rows_of_d, mask=mask, other=0.0)
        d += tl.load(rows_of_d + size, mask=mask, other=0.0)
        d += tl.load(rows_of_d + 2 * size, mask=mask, other=0.0)
        one_hot = (time[None, :] == row[:, None]).to(tl.float32)
        total = tl.dot(one_hot, d, total, input_precision="ieee")
    inside = (row < end)[:, None] & (n < size)[None, :]
    tl.store(d_table + row.to(tl.int64)[:, None] * size + n[None, :], total, mask=inside)


@triton.jit
def store_part(
    d_tokens,  # at the tokens of the layer's kind
    x,  # [steps, inputs]
    part_sums,  # [inputs + 1, size], this part's sums
    k,
    n,
    start,
    end,
    size,
    inputs,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Stores the sums of x * d_tokens over the steps from `start` to `end`, for inputs k.

    The bias is the weight of one more input, which is 1.

    Returns:
        1, once all threads have read what they stored.
    """
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for s0 in range(start, end, BLOCK_S):
        step = (s0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        x_mask = (k < inputs)[:, None] & (step < end)[None, :]
        x_tile = tl.load(x + step[None, :] * inputs + k[:, None], mask=x_mask, other=0.0)
        x_tile = tl.where((k == inputs)[:, None], 1.0, x_tile)
        d_mask = (step < end)[:, None] & (n < size)[None, :]
        d = tl.load(d_tokens + step[:, None] * 3 * size + n[None, :], mask=d_mask, other=0.0)
        total = tl.dot(x_tile, d, total, input_precision="ieee")
    inside = (k <= inputs)[:, None] & (n < size)[None, :]
    sums = part_sums + k[:, None] * size + n[None, :]
    tl.store(sums, total, mask=inside)
    found = tl.load(sums, mask=inside, other=0.0, volatile=True)
    same = found.to(tl.int32, bitcast=True) == total.to(tl.int32, bitcast=True)
    return tl.min(tl.min((same | ~inside).to(tl.int32), 1), 0)


@triton.jit
def sum_parts(
    part_sums,  # [parts, inputs + 1, size], part_stride apart
    d_weight,
    d_bias,
    n,
    parts,
    part_stride,
    size,
    inputs,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds up the parts in their order, and stores the gradients of a layer's weight and bias."""
    for k0 in range(0, inputs + 1, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (k <= inputs)[:, None] & (n < size)[None, :]
        total = tl.zeros([PARTS, BLOCK_K, BLOCK_N], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            offset = (
                part.to(tl.int64)[:, None, None] * part_stride
                + k[None, :, None] * size
                + n[None, None, :]
            )
            mask = (part < parts)[:, None, None] & inside[None, :, :]
            total += tl.load(part_sums + offset, mask=mask, other=0.0)
        gradient = tl.sum(total, 0)
        weights = d_weight + n[None, :] * inputs + k[:, None]
        tl.store(weights, gradient, mask=inside & (k < inputs)[:, None])
        biases = d_bias + n[None, :] + (k - inputs)[:, None]
        tl.store(biases, gradient, mask=inside & (k == inputs)[:, None])


@triton.jit(do_not_specialize=["steps", "rows", "inputs0", "inputs1", "inputs2", "parts"])
def token_embedding_gradient_kernel(
    d_tokens,  # [steps, 3, size]
    x0,  # [steps, inputs0], and so on
    x1,
    x2,
    timesteps,  # int64 [steps]
    arrivals,  # int32 [3, size], initially 0: finished programs per kind and tile of elements
    d_weight0,  # [size, inputs0], and so on
    d_bias0,  # [size]
    d_weight1,
    d_bias1,
    d_weight2,
    d_bias2,
    d_table,  # [rows, size]
    part_sums,  # [parts, inputs0 + inputs1 + inputs2 + 3, size], scratch
    order,  # int32 [programs along axis 0, steps], scratch
    steps,
    size,
    rows,
    inputs0,
    inputs1,
    inputs2,
    parts,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    TIMESTEPS: tl.constexpr,
):
    """Computes one part of a tile of a layer's gradient, or some rows of the table's gradient.

    Each program of a layer stores its part. The last one to finish adds up the parts in a fixed
    order. So the result does not depend on which program is the last.
    """
    tiles0 = tl.cdiv(inputs0 + 1, BLOCK_K)
    tiles1 = tl.cdiv(inputs1 + 1, BLOCK_K)
    tiles2 = tl.cdiv(inputs2 + 1, BLOCK_K)
    tiles = tiles0 + tiles1 + tiles2
    program = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if program >= tiles * parts:
        order += tl.program_id(0).to(tl.int64) * steps
        table_gradient(
            d_tokens,
            timesteps,
            d_table,
            order,
            program - tiles * parts,
            n,
            steps,
            size,
            rows,
            BLOCK_S,
            BLOCK_N,
            BLOCK_K,
            TIMESTEPS,
        )
    else:
        part, tile = program // tiles, program % tiles
        kind, tiles_of_kind, before = 0, tiles0, 0
        x, d_weight, d_bias, inputs = x0, d_weight0, d_bias0, inputs0
        if tile >= tiles0:
            kind, tiles_of_kind, before = 1, tiles1, inputs0 + 1
            x, d_weight, d_bias, inputs = x1, d_weight1, d_bias1, inputs1
            tile -= tiles0
            if tile >= tiles1:
                kind, tiles_of_kind, before = 2, tiles2, inputs0 + inputs1 + 2
                x, d_weight, d_bias, inputs = x2, d_weight2, d_bias2, inputs2
                tile -= tiles1
        part_stride = (inputs0 + inputs1 + inputs2 + 3) * size
        part_sums += before * size
        steps_of_part = tl.cdiv(tl.cdiv(steps, BLOCK_S), parts) * BLOCK_S
        start = part * steps_of_part
        stored = store_part(
            d_tokens + kind * size,
            x,
            part_sums + part.to(tl.int64) * part_stride,
            tile * BLOCK_K + tl.arange(0, BLOCK_K),
            n,
            start,
            tl.minimum(start + steps_of_part, steps),
            size,
            inputs,
            BLOCK_S,
            BLOCK_N,
            BLOCK_K,
        )
        if is_last(arrivals + kind * size + tl.program_id(0), tiles_of_kind * parts, stored):
            sum_parts(
                part_sums,
                d_weight,
                d_bias,
                n,
                parts,
                part_stride,
                size,
                inputs,
                BLOCK_N,
                BLOCK_K,
                PARTS,
            )


class GradientPlan(NamedTuple):
    """How the gradient's programs divide the work, for each tile of token elements.

    Attributes:
        tiles: tiles of the three layers' inputs, with the bias as one more input.
        parts: parts of the steps, summed by different programs.
        row_blocks: blocks of the table's rows.
    """

    tiles: int
    parts: int
    row_blocks: int


def gradient_plan(steps: int, widths: Sequence[int], rows: int) -> GradientPlan:
    block_s, _, block_k = GRADIENT_TILE
    blocks = triton.cdiv(steps, block_s)
    return GradientPlan(
        sum(triton.cdiv(width + 1, block_k) for width in widths),
        min(max(1, triton.cdiv(blocks, BLOCKS_OF_PART)), MOST_PARTS),
        triton.cdiv(rows, block_k),
    )


def token_embedding(
    inputs: Sequence[Tensor], timesteps: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes `harmodt::token_embedding`, with the arguments of its schema."""
    table, steps = parameters[-1], timesteps.numel()
    size = table.shape[1]
    tokens = table.new_empty(*timesteps.shape, len(inputs), size)
    # The kernel sets the counters to 0. Without steps it does not run, so they start at 0.
    make = torch.empty if steps else torch.zeros
    arrivals = make(len(inputs), size, dtype=torch.int32, device=table.device)
    block_s, block_d, block_k = TILE
    launch(
        token_embedding_kernel,
        (triton.cdiv(steps, block_s), triton.cdiv(size, block_d), len(inputs)),
        **_numbered("x", [x.contiguous() for x in inputs]),
        **dict(zip(PARAMETERS, parameters, strict=True)),
        timesteps=timesteps.contiguous(),
        tokens=tokens,
        arrivals=arrivals,
        steps=steps,
        size=size,
        **_numbered("inputs", [x.shape[-1] for x in inputs]),
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return tokens, arrivals


def token_embedding_gradient(
    d_tokens: Tensor,
    inputs: Sequence[Tensor],
    timesteps: Tensor,
    arrivals: Tensor,
    outs: Sequence[Tensor],
) -> None:
    """Computes `harmodt::token_embedding_gradient`, with the arguments of its schema."""
    rows, size = outs[-1].shape[1:]
    widths, steps = [x.shape[-1] for x in inputs], timesteps.numel()
    block_s, block_n, block_k = GRADIENT_TILE
    plan = gradient_plan(steps, widths, rows)
    size_tiles = triton.cdiv(size, block_n)
    columns = sum(widths) + len(widths)
    launch(
        token_embedding_gradient_kernel,
        (size_tiles, plan.tiles * plan.parts + plan.row_blocks),
        d_tokens=d_tokens.contiguous(),
        **_numbered("x", [x.contiguous() for x in inputs]),
        timesteps=timesteps.contiguous(),
        arrivals=arrivals,
        **{f"d_{name}": out for name, out in zip(PARAMETERS, outs, strict=True)},
        part_sums=d_tokens.new_empty(plan.parts, columns, size),
        order=d_tokens.new_empty(size_tiles, steps, dtype=torch.int32),
        steps=steps,
        size=size,
        rows=rows,
        **_numbered("inputs", widths),
        parts=plan.parts,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PARTS=PARTS,
        TIMESTEPS=TIMESTEPS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def _numbered(name: str, values: Sequence[Tensor | int]) -> dict[str, Tensor | int]:
    """A kernel's arguments name0, name1, … with these values."""
    return {f"{name}{i}": value for i, value in enumerate(values)}
