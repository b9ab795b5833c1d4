"""The fused attention: its public function, its checks and its registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..dropout import seed_for
from ..operands import check
from ..registration import FLOATS, kernels_for, register


def attention(
    qkv: Tensor,
    queries: slice,
    drop: float,
    past: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Causal scaled dot-product attention: a query token attends to itself and to earlier tokens.

    This is the fused form of `reference.attention` and drops the same weights. The scores are never
    stored in memory; the backward pass computes them again. Results repeat bit for bit.

    Args:
        qkv: [B, T, 3, H, D], query, key and value of every token and head. float32; on a GPU also
            float16 or bfloat16.
        queries: selects the query tokens among the T tokens, with a step above 0.
        drop: probability of dropping the weight of a key, in [0, 1).
        past: keys and values [B, H, P, D] of P earlier tokens, in the dtype of qkv; or None. A
            policy passes its cache here. Calls with `past` have no gradient.
        seed: the seed of dropout, int64 [] or [1], or None: see `dropout.seed_for`.

    Returns:
        [B, query tokens, H, D], in the dtype of qkv. Sums are in float32. Products of float32 are
        in TF32 if PyTorch's own switch says so.

    Raises:
        TypeError: qkv or seed has a dtype that is not accepted, or past has another dtype than qkv.
        ValueError: shapes or devices do not fit together, the step of queries or `drop` is out of
            range, or a gradient is needed with `past`.
        BackendUnavailable: the device has no fused kernels.
    """
    taken = FLOATS if kernels_for(qkv.device) == "triton" else (torch.float32,)
    check("qkv", qkv, taken, (None, None, 3, None, None), qkv.device)
    wanted = range(*queries.indices(qkv.shape[1]))
    if wanted.step < 1:
        raise ValueError(f"queries has the step {wanted.step}: it must be at least 1")
    settings = len(wanted), wanted.start, wanted.step, drop, seed_for(drop, seed, qkv.device)
    if past is not None:
        _check_past(qkv, *past)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, *past)):
            raise ValueError("attention with `past` has no gradient: call it in torch.no_grad()")
        return torch.ops.harmodt.attention(qkv, *past, *settings)[0]
    return _Attention.apply(qkv.contiguous(), *settings)


def _check_past(qkv: Tensor, keys: Tensor, values: Tensor) -> None:
    sequences, _, _, heads, size = qkv.shape
    shape, beside = (sequences, heads, None, size), [("qkv", qkv)]
    check("past[0]", keys, qkv.dtype, shape, qkv.device, beside=beside)
    check("past[1]", values, qkv.dtype, keys.shape, qkv.device, beside=[("past[0]", keys)])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, wanted: int, first: int, step: int, drop: float, seed: Tensor | None
    ) -> Tensor:
        settings = wanted, first, step, drop
        out, log_sums = torch.ops.harmodt.attention(qkv, None, None, *settings, seed)
        ctx.save_for_backward(qkv, out, log_sums, seed)
        ctx.settings = settings
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *operands, seed = ctx.saved_tensors
        d_qkv = torch.ops.harmodt.attention_gradient(d_out, *operands, *ctx.settings, seed)
        return d_qkv, *[None] * 5


def _attention_fake(
    qkv: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    wanted: int,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    sequences, _, _, heads, size = qkv.shape
    return (
        qkv.new_empty(sequences, wanted, heads, size),
        qkv.new_empty(sequences, wanted, heads, dtype=torch.float32),
    )


def _attention_gradient_fake(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


register(
    __package__,
    "attention",
    "(Tensor qkv, Tensor? past_keys, Tensor? past_values, int wanted, int first, "
    "int step, float drop, Tensor? seed) -> (Tensor out, Tensor log_sums)",
    _attention_fake,
)
register(
    __package__,
    "attention_gradient",
    "(Tensor d_out, Tensor qkv, Tensor out, Tensor log_sums, int wanted, int first, "
    "int step, float drop, Tensor? seed) -> Tensor",
    _attention_gradient_fake,
)
