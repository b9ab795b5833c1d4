"""The fused attention: its public function, its checks and its registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import seed_for
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
        drop: probability of dropping the weight of a key.
        past: keys and values [B, H, P, D] of P earlier tokens, in the dtype of qkv; or None. A
            policy passes its cache here. Calls with `past` have no gradient.
        seed: the seed of dropout, int64 [] or [1], or None: see `dropout.seed_for`.

    Returns:
        [B, query tokens, H, D], in the dtype of qkv. Sums are in float32. Products of float32 are
        in TF32 if PyTorch's own switch says so.

    Raises:
        TypeError: qkv or seed has a dtype that is not accepted, or past has another dtype than qkv.
        ValueError: shapes or devices do not fit together, or a gradient is needed with `past`.
        BackendUnavailable: the device has no fused kernels.
    """
    keys, values = past or (None, None)
    _check_types(qkv, keys, values)
    _check_shapes(qkv, keys, values)
    wanted = range(*queries.indices(qkv.shape[1]))
    settings = len(wanted), wanted.start, wanted.step, drop, seed_for(drop, seed, qkv.device)
    if past is not None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, *past)):
            raise ValueError("attention with `past` has no gradient: call it in torch.no_grad()")
        return torch.ops.harmodt.attention(qkv, keys, values, *settings)[0]
    return _Attention.apply(qkv.contiguous(), *settings)


def _check_types(qkv: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    taken = FLOATS if kernels_for(qkv.device) == "triton" else (torch.float32,)
    if qkv.dtype not in taken:
        raise TypeError(
            f"qkv is {qkv.dtype}, but the fused attention takes {' or '.join(map(str, taken))}"
        )
    for tensor in (keys, values):
        if tensor is not None and tensor.dtype != qkv.dtype:
            raise TypeError(f"past is {tensor.dtype} and qkv is {qkv.dtype}: use one dtype")
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(f"past is on {tensor.device} and qkv is on {qkv.device}")


def _check_shapes(qkv: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}: it must be [B, T, 3, heads, head size]")
    if keys is None or values is None:
        return
    sequences, _, _, heads, size = qkv.shape
    before = keys.shape[2] if keys.dim() == 4 else -1
    if not keys.shape == values.shape == (sequences, heads, before, size):
        raise ValueError(
            f"past has shapes {list(keys.shape)} and {list(values.shape)}: with qkv "
            f"{list(qkv.shape)}, [B, T, 3, heads, head size], both must be [B, heads, P, head size]"
        )


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
