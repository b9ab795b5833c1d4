"""The fastest form of the attention in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout_add.pytorch import dropout


def attention(
    qkv: Tensor,
    queries: slice,
    drop: float,
    past: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The same as `reference.attention`, with the operations that PyTorch computes fastest.

    PyTorch's generators draw the dropout: `seed` is ignored.
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if past is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
    tokens, keys = query.shape[2], key.shape[2]
    query = query[:, :, queries]
    if qkv.device.type != "cpu" and query.shape == key.shape:  # the fastest kernels take no mask
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        return out.transpose(1, 2)
    bias = query.new_full((tokens, keys), -math.inf).triu(keys - tokens + 1)[queries]
    if qkv.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, bias, drop).transpose(1, 2)
    # On a CPU, two products and a softmax are as fast as PyTorch's fused operator at these lengths,
    # or many times faster. This depends on the processor and on the precision of products.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (dropout(scores.add_(bias).softmax(-1), drop) @ value).transpose(1, 2)
