"""Triton kernels of the token embedding: each of S steps has three tokens of d elements.

Products are in float32 without TF32: they are few, and all layers read the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

# Steps, token elements and inputs that a program processes at a time, forward and backward.
TILE = (32, 64, 32)
GRADIENT_TILE = (64, 32, 32)
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


@triton.jit(do_not_specialize=["steps", "rows", "inputs0", "inputs1", "inputs2"])
def token_embedding_gradient_kernel(
    d_tokens,  # [steps, 3, size]
    x0,  # [steps, inputs0], and so on
    x1,
    x2,
    timesteps,  # int64 [steps]
    d_weight0,  # [size, inputs0], and so on
    d_bias0,  # [size]
    d_weight1,
    d_bias1,
    d_weight2,
    d_bias2,
    d_table,  # [rows, size]
    steps,
    size,
    rows,
    inputs0,
    inputs1,
    inputs2,
    tiles_of_kind,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a tile of one layer's gradient, or of the table's.

    The table is a layer whose inputs are one-hot vectors of the timesteps.
    """
    kind = tl.minimum(tl.program_id(1) // tiles_of_kind, 3)
    tile = tl.program_id(1) - kind * tiles_of_kind
    x, d_weight, d_bias, inputs, n_stride, k_stride = x0, d_weight0, d_bias0, inputs0, inputs0, 1
    if kind == 1:
        x, d_weight, d_bias, inputs, n_stride = x1, d_weight1, d_bias1, inputs1, inputs1
    if kind == 2:
        x, d_weight, d_bias, inputs, n_stride = x2, d_weight2, d_bias2, inputs2, inputs2
    if kind == 3:
        d_weight, inputs, n_stride, k_stride = d_table, rows, 1, size
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_size, in_inputs = n < size, k < inputs
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for s0 in range(0, steps, BLOCK_S):
        step = (s0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        in_steps = step < steps
        d_mask = in_size[:, None] & in_steps[None, :]
        d_offset = step[None, :] * 3 * size + n[:, None]
        if kind < 3:
            d = tl.load(d_tokens + d_offset + kind * size, mask=d_mask, other=0.0)
            x_mask = in_steps[:, None] & in_inputs[None, :]
            x_tile = tl.load(x + step[:, None] * inputs + k[None, :], mask=x_mask, other=0.0)
        else:
            d = tl.load(d_tokens + d_offset, mask=d_mask, other=0.0)
            d += tl.load(d_tokens + d_offset + size, mask=d_mask, other=0.0)
            d += tl.load(d_tokens + d_offset + 2 * size, mask=d_mask, other=0.0)
            time = tl.load(timesteps + step, mask=in_steps, other=0)
            x_tile = (time[:, None] == k[None, :]).to(tl.float32)
        sums += d
        total = tl.dot(d, x_tile, total, input_precision="ieee")
    offset = n[:, None] * n_stride + k[None, :] * k_stride
    tl.store(d_weight + offset, total, mask=in_size[:, None] & in_inputs[None, :])
    if (kind < 3) & (tile == 0):
        tl.store(d_bias + n, tl.sum(sums, 1), mask=in_size)


def token_embedding(
    inputs: Sequence[Tensor], timesteps: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    table, steps = parameters[-1], timesteps.numel()
    size = table.shape[1]
    tokens = table.new_empty(*timesteps.shape, len(inputs), size)
    block_s, block_d, block_k = TILE
    launch(
        token_embedding_kernel,
        (triton.cdiv(steps, block_s), triton.cdiv(size, block_d), len(inputs)),
        **_numbered("x", [x.contiguous() for x in inputs]),
        **dict(zip(PARAMETERS, parameters, strict=True)),
        timesteps=timesteps.contiguous(),
        tokens=tokens,
        steps=steps,
        size=size,
        **_numbered("inputs", [x.shape[-1] for x in inputs]),
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return tokens


def token_embedding_gradient(
    d_tokens: Tensor, inputs: Sequence[Tensor], timesteps: Tensor, outs: Sequence[Tensor]
) -> None:
    rows, size = outs[-1].shape[1:]
    widths = [x.shape[-1] for x in inputs]
    block_s, block_n, block_k = GRADIENT_TILE
    tiles = triton.cdiv(max(widths), block_k)
    launch(
        token_embedding_gradient_kernel,
        (triton.cdiv(size, block_n), len(inputs) * tiles + triton.cdiv(rows, block_k)),
        d_tokens=d_tokens.contiguous(),
        **_numbered("x", [x.contiguous() for x in inputs]),
        timesteps=timesteps.contiguous(),
        **{f"d_{name}": out for name, out in zip(PARAMETERS, outs, strict=True)},
        steps=timesteps.numel(),
        size=size,
        rows=rows,
        **_numbered("inputs", widths),
        tiles_of_kind=tiles,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def _numbered(name: str, values: Sequence[Tensor | int]) -> dict[str, Tensor | int]:
    """A kernel's arguments name0, name1, … with these values."""
    return {f"{name}{i}": value for i, value in enumerate(values)}
