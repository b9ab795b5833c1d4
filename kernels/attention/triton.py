"""Triton kernels of the attention.

A sequence has `past` earlier tokens, then `tokens` present tokens. `wanted` of the present tokens
are queries: the tokens number first, first + step, … Scores stay in registers and shared memory.
When the maximum of the scores grows, the sums over earlier blocks of keys are rescaled (Milakov and
Gimelshein, arXiv 1805.02867). A GPU computes powers of 2, so the kernels scale the scores by log₂ e
and need no further product for each power. Logarithms in memory are natural.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import kept
from ..dropout import rate
from ..launch import input_precision, launch, precision_of

LN_2 = tl.constexpr(math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))

NOT_SPECIALISED = ["tokens", "past", "wanted", "first", "step", "seed", "threshold"]


@triton.jit
def load_rows(values, row, column, rows, columns, stride):
    """values[row, column] with rows `stride` apart, and 0 outside [rows, columns]."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(values + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_keys(present, past_rows, j, column, past, tokens, size, stride, HAS_PAST: tl.constexpr):
    """The keys, or the values, of tokens j: first the past ones, then the present ones.

    Rows of `present` are `stride` apart.
    """
    row = present + (j - past) * stride
    if HAS_PAST:
        # Addresses as integers, because Triton 3.7 cannot select pointers on AMD's GPUs.
        earlier = (past_rows + j * size).to(tl.int64)
        row = tl.where(j < past, earlier, row.to(tl.int64)).to(row.dtype)
    inside = (j < past + tokens)[:, None] & (column < size)[None, :]
    return tl.load(row[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def dropout_index(sequence, head, query, j, wanted, heads, keys):
    """The dropout index (uint32) of the attention weight of each query and key j."""
    row = (sequence * wanted + query).to(tl.uint32) * tl.cast(heads, tl.uint32)
    return (row + tl.cast(head, tl.uint32)) * tl.cast(keys, tl.uint32) + j.to(tl.uint32)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_kernel(
    qkv,  # [sequences, tokens, 3, heads, size]
    past_keys,  # [sequences, heads, past, size], or None
    past_values,  # as past_keys
    out,  # [sequences, wanted, heads, size]
    log_sums,  # float32 [sequences, wanted, heads]
    tokens,
    heads,
    size,
    past,
    wanted,
    first,
    step,
    scale,  # multiplies the scores
    seed,  # int64 [1], or None
    threshold,
    factor,  # multiplies the weights that dropout keeps
    HAS_PAST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes `out` for one block of queries of one head."""
    blocks = tl.cdiv(wanted, BLOCK_Q)
    item, q0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_Q
    sequence, head = item // heads, item % heads
    width = heads * size  # from query to key, and from key to value
    qkv += sequence.to(tl.int64) * tokens * 3 * width + head * size
    if HAS_PAST:
        past_keys += item.to(tl.int64) * past * size
        past_values += item.to(tl.int64) * past * size
    if DROPOUT:
        seed = tl.load(seed).to(tl.uint32)
    query, column = q0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    token = first + tl.minimum(query, wanted - 1) * step  # queries beyond the last are not stored
    q = load_rows(qkv, token, column, tokens, size, 3 * width)
    log2_scale = tl.cast(scale, tl.float32) * LOG2_E
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    seen = past + first + (tl.minimum(q0 + BLOCK_Q, wanted) - 1) * step + 1
    for k0 in range(0, seen, BLOCK_K):
        j = k0 + tl.arange(0, BLOCK_K)
        k = load_keys(qkv + width, past_keys, j, column, past, tokens, size, 3 * width, HAS_PAST)
        v = load_keys(
            qkv + 2 * width, past_values, j, column, past, tokens, size, 3 * width, HAS_PAST
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        scores = tl.where(j[None, :] <= past + token[:, None], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrunk = tl.exp2(largest - new)
        total = total * shrunk + tl.sum(weights, 1)
        if DROPOUT:
            index = dropout_index(
                sequence, head, query[:, None], j[None, :], wanted, heads, past + tokens
            )
            weights *= kept(index, seed, threshold, factor)
        result = tl.dot(weights.to(v.dtype), v, result * shrunk[:, None], input_precision=PRECISION)
        largest = new
    row = (sequence.to(tl.int64) * wanted + query) * heads + head
    inside = query < wanted
    tl.store(log_sums + row, (largest + tl.log2(total)) * LN_2, mask=inside)
    tl.store(
        out + row[:, None] * size + column[None, :],
        (result / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (column < size)[None, :],
    )


@triton.jit
def load_queries(qkv, d_out, out, log_sums, query, column, wanted, first, step, heads, size):
    """Load a tile of queries of one head with everything that their gradients need.

    Returns:
        The tiles of queries and of d_out; and for each query, the sum of d_out * out, and the
        binary logarithm of the sum of its powers.
    """
    q = load_rows(
        qkv + first * 3 * heads * size, query, column, wanted, size, step * 3 * heads * size
    )
    d_rows = load_rows(d_out, query, column, wanted, size, heads * size)
    rows = load_rows(out, query, column, wanted, size, heads * size)
    along = tl.sum(d_rows.to(tl.float32) * rows.to(tl.float32), 1)
    log_sum = tl.load(log_sums + query * heads, mask=query < wanted, other=0.0)
    return q, d_rows, along, log_sum * LOG2_E


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_gradient_kernel(
    d_out,  # [sequences, wanted, heads, size]
    qkv,  # [sequences, tokens, 3, heads, size]
    out,  # as d_out
    log_sums,  # float32 [sequences, wanted, heads]
    d_qkv,  # as qkv
    tokens,
    heads,
    size,
    wanted,
    first,
    step,
    scale,  # multiplies the scores
    seed,  # int64 [1], or None
    threshold,
    factor,  # multiplies the weights that dropout keeps
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the gradients of one block of queries, or of one block of keys and values.

    Each program computes again the scores that it needs. So no sum is divided among programs, and
    each sum has a fixed order.
    """
    query_blocks = tl.cdiv(wanted, BLOCK_Q)
    blocks = query_blocks + tl.cdiv(tokens, BLOCK_K)
    item, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = item // heads, item % heads
    width = heads * size
    stride = 3 * width
    before = sequence.to(tl.int64) * tokens * stride + head * size
    qkv += before
    d_qkv += before
    row = sequence.to(tl.int64) * wanted * heads + head
    d_out += row * size
    out += row * size
    log_sums += row
    column = tl.arange(0, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    log2_scale = scale * LOG2_E
    if DROPOUT:
        seed = tl.load(seed).to(tl.uint32)
    if block < query_blocks:
        query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        token = first + query * step
        q, d_rows, along, log_sum = load_queries(
            qkv, d_out, out, log_sums, query, column, wanted, first, step, heads, size
        )
        d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        seen = first + (tl.minimum(block * BLOCK_Q + BLOCK_Q, wanted) - 1) * step + 1
        for k0 in range(0, seen, BLOCK_K):
            j = k0 + tl.arange(0, BLOCK_K)
            k = load_rows(qkv + width, j, column, tokens, size, stride)
            v = load_rows(qkv + 2 * width, j, column, tokens, size, stride)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
            allowed = j[None, :] <= token[:, None]
            weights = tl.where(allowed, tl.exp2(scores - log_sum[:, None]), 0.0)
            d_weights = tl.dot(d_rows, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                index = dropout_index(
                    sequence, head, query[:, None], j[None, :], wanted, heads, tokens
                )
                d_weights *= kept(index, seed, threshold, factor)
            d_scores = weights * (d_weights - along[:, None]) * scale
            d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)
        tl.store(
            d_qkv + token[:, None] * stride + column[None, :],
            d_q.to(d_qkv.dtype.element_ty),
            mask=(query < wanted)[:, None] & (column < size)[None, :],
        )
    else:
        k0 = (block - query_blocks) * BLOCK_K
        j = k0 + tl.arange(0, BLOCK_K)
        k = load_rows(qkv + width, j, column, tokens, size, stride)
        v = load_rows(qkv + 2 * width, j, column, tokens, size, stride)
        d_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        after = tl.cdiv(tl.maximum(k0 - first, 0), step)  # earlier queries see none of these keys
        for q0 in range(after, wanted, BLOCK_Q):
            query = q0 + tl.arange(0, BLOCK_Q)
            q, d_rows, along, log_sum = load_queries(
                qkv, d_out, out, log_sums, query, column, wanted, first, step, heads, size
            )
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
            allowed = j[:, None] <= (first + query * step)[None, :]
            weights = tl.where(allowed, tl.exp2(scores - log_sum[None, :]), 0.0)
            d_weights = tl.dot(v, tl.trans(d_rows), input_precision=PRECISION)
            dropped = weights
            if DROPOUT:
                index = dropout_index(
                    sequence, head, query[None, :], j[:, None], wanted, heads, tokens
                )
                factors = kept(index, seed, threshold, factor)
                dropped = weights * factors
                d_weights *= factors
            d_v = tl.dot(dropped.to(d_rows.dtype), d_rows, d_v, input_precision=PRECISION)
            d_scores = weights * (d_weights - along[None, :]) * scale
            d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
        inside = (j < tokens)[:, None] & (column < size)[None, :]
        rows = d_qkv + width + j[:, None] * stride + column[None, :]
        tl.store(rows, d_k.to(d_qkv.dtype.element_ty), mask=inside)
        tl.store(rows + width, d_v.to(d_qkv.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """The queries and keys that a program processes at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


# Tiles by precision ("half": 16-bit operands), for heads of up to 32 elements, of up to 64, and for
# larger ones. The compiled code decided the numbers of warps; no GPU has measured them. In small
# heads, each warp multiplies 16 rows of a tile: with 4 warps, two warps would compute each product
# again. One warp needs up to twice the registers. With 2 warps TF32's forward kernel spills. In
# larger heads 4 warps share the products, and fewer warps spill.
FORWARD = {
    "ieee": (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)),
    "tf32x3": (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)),
    "tf32": (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    "half": (Tile(32, 32, 2, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
GRADIENT = {
    "ieee": (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    "tf32x3": (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 2)),
    "tf32": (Tile(16, 16, 2, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 2)),
    "half": (Tile(32, 32, 2, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}


def tile_of(table: dict[str, tuple[Tile, Tile, Tile]], qkv: Tensor) -> tuple[str, Tile, int]:
    """The precision, the tile, and the head size rounded up to a size that matrix units take."""
    precision = precision_of(qkv.dtype)
    block = max(16, triton.next_power_of_2(qkv.shape[4]))
    return precision, table[precision][(block > 32) + (block > 64)], block


def attention(
    qkv: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    wanted: int,
    first: int,
    step: int,
    drop: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `harmodt::attention`, with the arguments of its schema."""
    qkv = qkv.contiguous()
    sequences, tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(sequences, wanted, heads, size)
    log_sums = qkv.new_empty(sequences, wanted, heads, dtype=torch.float32)
    precision, tile, block = tile_of(FORWARD, qkv)
    threshold, factor = rate(drop)
    launch(
        attention_kernel,
        (sequences * heads * triton.cdiv(wanted, tile.queries),),
        qkv=qkv,
        past_keys=None if past_keys is None else past_keys.contiguous(),
        past_values=None if past_values is None else past_values.contiguous(),
        out=out,
        log_sums=log_sums,
        tokens=tokens,
        heads=heads,
        size=size,
        past=0 if past_keys is None else past_keys.shape[2],
        wanted=wanted,
        first=first,
        step=step,
        scale=size**-0.5,
        seed=seed,
        threshold=threshold,
        factor=factor,
        HAS_PAST=past_keys is not None,
        DROPOUT=drop > 0,
        PRECISION=input_precision(precision),
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        BLOCK_D=block,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out, log_sums


def attention_gradient(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    log_sums: Tensor,
    wanted: int,
    first: int,
    step: int,
    drop: float,
    seed: Tensor | None,
) -> Tensor:
    """Computes `harmodt::attention_gradient`, with the arguments of its schema."""
    d_out = d_out.contiguous()
    sequences, tokens, _, heads, size = qkv.shape
    # If a token is not a query, the gradient of its query is 0.
    d_qkv = torch.empty_like(qkv) if wanted == tokens else torch.zeros_like(qkv)
    precision, tile, block = tile_of(GRADIENT, qkv)
    threshold, factor = rate(drop)
    blocks = triton.cdiv(wanted, tile.queries) + triton.cdiv(tokens, tile.keys)
    launch(
        attention_gradient_kernel,
        (sequences * heads * blocks,),
        d_out=d_out,
        qkv=qkv,
        out=out,
        log_sums=log_sums,
        d_qkv=d_qkv,
        tokens=tokens,
        heads=heads,
        size=size,
        wanted=wanted,
        first=first,
        step=step,
        scale=size**-0.5,
        seed=seed,
        threshold=threshold,
        factor=factor,
        DROPOUT=drop > 0,
        PRECISION=input_precision(precision),
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        BLOCK_D=block,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return d_qkv
