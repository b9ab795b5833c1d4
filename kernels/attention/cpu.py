"""The attention on a CPU: passes tensors to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..native.library import Attention, library, pointer, threads


def attention(
    qkv: Tensor, valid: Tensor, wanted: int, first: int, step: int, drop: float, seed: int
) -> tuple[Tensor, Tensor]:
    sequences, _, _, heads, size = qkv.shape
    out = qkv.new_empty(sequences, wanted, heads, size)
    log_sums = qkv.new_empty(sequences, wanted, heads)
    valid = valid.contiguous()
    shape = shape_of(qkv, valid, wanted, first, step, drop, seed)
    library().harmodt_attention_forward(
        byref(shape), pointer(qkv), pointer(out), pointer(log_sums), threads()
    )
    return out, log_sums


def attention_gradient(
    d_out: Tensor,
    qkv: Tensor,
    valid: Tensor,
    out: Tensor,
    log_sums: Tensor,
    wanted: int,
    first: int,
    step: int,
    drop: float,
    seed: int,
) -> Tensor:
    d_qkv = torch.empty_like(qkv)
    d_out, valid = d_out.contiguous(), valid.contiguous()
    shape = shape_of(qkv, valid, wanted, first, step, drop, seed)
    library().harmodt_attention_gradient(
        byref(shape), *map(pointer, (d_out, qkv, out, log_sums, d_qkv)), threads()
    )
    return d_qkv


def shape_of(
    qkv: Tensor, valid: Tensor, wanted: int, first: int, step: int, drop: float, seed: int
) -> Attention:
    sequences, tokens, _, heads, size = qkv.shape
    return Attention(
        sequences, tokens, heads, size, wanted, first, step, pointer(valid), drop, seed
    )
