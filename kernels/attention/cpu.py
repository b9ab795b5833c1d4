"""Passes the attention's tensors to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..native.library import AttentionShape, library, pointer, threads


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
    sequences, _, _, heads, size = qkv.shape
    out = qkv.new_empty(sequences, wanted, heads, size)
    log_sums = qkv.new_empty(sequences, wanted, heads)
    qkv = qkv.contiguous()
    shape = shape_of(qkv, wanted, first, step, drop, seed)
    if past_keys is not None and past_values is not None:
        past_keys, past_values = past_keys.contiguous(), past_values.contiguous()
        shape.past = past_keys.shape[2]
        shape.past_keys, shape.past_values = pointer(past_keys), pointer(past_values)
    library().harmodt_attention(
        byref(shape), pointer(qkv), pointer(out), pointer(log_sums), threads()
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
    d_qkv = torch.empty_like(qkv)
    d_out = d_out.contiguous()
    shape = shape_of(qkv, wanted, first, step, drop, seed)
    library().harmodt_attention_gradient(
        byref(shape), *map(pointer, (d_out, qkv, out, log_sums, d_qkv)), threads()
    )
    return d_qkv


def shape_of(
    qkv: Tensor, wanted: int, first: int, step: int, drop: float, seed: Tensor | None
) -> AttentionShape:
    sequences, tokens, _, heads, size = qkv.shape
    return AttentionShape(
        sequences=sequences,
        tokens=tokens,
        heads=heads,
        head_size=size,
        queries=wanted,
        first_query=first,
        query_step=step,
        dropout=drop,
        seed=pointer(seed),
    )
