"""The attention as PyTorch sees it: the registered operations and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import register


def attention(qkv: Tensor, valid: Tensor, queries: slice, drop: float) -> Tensor:
    """Scaled dot-product attention of some tokens of each sequence to those before them.

    The fused form of `reference.attention` for a CPU, in float32: scores live in a core's cache and
    are computed again for the gradient. Which weights it drops is drawn from PyTorch's generator.

    Args:
        qkv: float32 [B, T, 3, H, D], query, key and value of every token and head.
        valid: bool [B, T]. A token that is not is seen by itself alone.
        queries: the tokens whose outputs are wanted, with a step above 0.
        drop: probability of dropping the weight of a key.

    Returns:
        [B, tokens wanted, H, D].

    Raises:
        TypeError: qkv is not float32.
        ValueError: shapes do not fit together.
        BackendUnavailable: there is no such kernel for the device.
    """
    if qkv.dtype != torch.float32:
        raise TypeError(f"qkv is {qkv.dtype}, and the fused attention takes float32")
    if qkv.dim() != 5 or qkv.shape[2] != 3 or valid.shape != qkv.shape[:2]:
        raise ValueError(
            f"qkv {list(qkv.shape)} must be [B, T, 3, heads, head size] and valid "
            f"{list(valid.shape)} [B, T]"
        )
    wanted = range(*queries.indices(qkv.shape[1]))
    seed = int(torch.randint(2**31, ())) if drop else 0
    return _Attention.apply(
        qkv.contiguous(), valid, len(wanted), wanted.start, wanted.step, drop, seed
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, valid: Tensor, *settings: Any) -> Tensor:
        out, log_sums = torch.ops.harmodt.attention(qkv, valid, *settings)
        ctx.save_for_backward(qkv, valid, out, log_sums)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, valid, out, log_sums = ctx.saved_tensors
        d_qkv = torch.ops.harmodt.attention_gradient(
            d_out, qkv, valid, out, log_sums, *ctx.settings
        )
        return d_qkv, *[None] * 6


def _attention_fake(
    qkv: Tensor, valid: Tensor, wanted: int, *settings: Any
) -> tuple[Tensor, Tensor]:
    sequences, _, _, heads, size = qkv.shape
    return qkv.new_empty(sequences, wanted, heads, size), qkv.new_empty(sequences, wanted, heads)


register(
    __package__,
    "attention",
    "(Tensor qkv, Tensor valid, int wanted, int first, int step, float drop, int seed) "
    "-> (Tensor out, Tensor log_sums)",
    _attention_fake,
)
register(
    __package__,
    "attention_gradient",
    "(Tensor d_out, Tensor qkv, Tensor valid, Tensor out, Tensor log_sums, int wanted, int first, "
    "int step, float drop, int seed) -> Tensor",
    lambda d_out, qkv, *_: torch.empty_like(qkv),
)
