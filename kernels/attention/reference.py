"""Defines the attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import kept, seed_for


def attention(
    qkv: Tensor,
    queries: slice,
    drop: float,
    past: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Causal scaled dot-product attention: a query token attends to itself and to earlier tokens.

    Args:
        qkv: [B, T, 3, H, D], query, key and value of every token and head.
        queries: selects the query tokens among the T tokens, with a step above 0.
        drop: probability of dropping the weight of a key.
        past: keys and values [B, H, P, D] of P earlier tokens, or None.
        seed: the seed of dropout, int64 [] or [1], or None: see `dropout.seed_for`.

    Returns:
        [B, query tokens, H, D].
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if past is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
    tokens, keys = query.shape[2], key.shape[2]
    later = torch.ones(tokens, keys, dtype=torch.bool, device=qkv.device).triu(keys - tokens + 1)
    scores = query[:, :, queries] @ key.mT / qkv.shape[-1] ** 0.5
    weights = scores.masked_fill(later[queries], -torch.inf).softmax(-1)
    seed = seed_for(drop, seed, qkv.device)
    if seed is not None:
        sequences, heads, wanted, _ = weights.shape
        factors = kept((sequences, wanted, heads, keys), drop, seed).transpose(1, 2)
        weights = (weights * factors).to(weights.dtype)
    return (weights @ value).transpose(1, 2)
