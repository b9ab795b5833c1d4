"""The definition of the attention in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    qkv: Tensor,
    valid: Tensor,
    queries: slice,
    drop: float,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention of some tokens of each sequence to those before them.

    Args:
        qkv: [B, T, 3, H, D], query, key and value of every token and head.
        valid: bool [B, P + T]. A token that is not is seen by itself alone.
        queries: those of the T tokens whose outputs are wanted, with a step above 0.
        drop: probability of dropping the weight of a key.
        past: keys and values [B, H, P, D] of the tokens before these; P = 0 without.

    Returns:
        [B, tokens wanted, H, D].
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    allowed = causal_mask(valid)[:, :, -qkv.shape[1] :][:, :, queries]
    if past is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
    scores = query[:, :, queries] @ key.mT / qkv.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (F.dropout(weights, drop) @ value).transpose(1, 2)


def causal_mask(valid: Tensor) -> Tensor:
    """Which key each query may see: valid ones before it, and itself.

    Args:
        valid: bool [B, T].

    Returns:
        bool [B, 1, T, T].
    """
    tokens = valid.shape[-1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=valid.device)
    return causal & (valid[:, None, None, :] | itself)
