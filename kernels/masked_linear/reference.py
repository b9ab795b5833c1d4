"""The definition of the masked linear layer in plain PyTorch.

It materialises one masked weight copy for each group, which the fused backends never do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import all_ones


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
) -> Tensor:
    """Linear layer under the mask of each group's task: y[g] = x[g] (W ⊙ M)ᵀ + b ⊙ m.

    Differentiable in x, weight and bias; the gradient of an inactive weight is exactly zero
    (Eq. 4 of the HarmoDT paper). Weights that are inactive may hold any value, NaN included.

    Args:
        x: [G, R, K], one task per group.
        weight: [N, K].
        bias: [N] or None.
        weight_bits: int32 [T, N, ceil(K / 32)], the masks of all tasks.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias.
        task_ids: int64 [G], the task of each group; ids may repeat.

    Returns:
        [G, R, N], in the dtype of x (under autocast, in the autocast dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is None or bias_bits is None:
        return _MaskedLinear.apply(x, weight, None, weight_bits[task_ids], None)
    return _MaskedLinear.apply(x, weight, bias, weight_bits[task_ids], bias_bits[task_ids])


class _MaskedLinear(torch.autograd.Function):
    # Autograd through `torch.where` gives the same gradients in more passes over the copies.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, bias_bits: Tensor
    ) -> Tensor:
        ctx.dtype = weight.dtype
        masked_weight = _mask(weight, bits).to(x.dtype)  # [G, N, K]
        ctx.save_for_backward(x, masked_weight, bits, bias_bits)
        if bias is None:
            return x @ masked_weight.mT
        masked_bias = _mask(bias, bias_bits).to(x.dtype)  # [G, N]
        return torch.baddbmm(masked_bias[:, None], x, masked_weight.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, masked_weight, bits, bias_bits = ctx.saved_tensors
        dx = dy @ masked_weight if ctx.needs_input_grad[0] else None
        d_weight = _mask(dy.mT @ x, bits).sum(0, dtype=ctx.dtype)
        if bias_bits is None:
            return dx, d_weight, None, None, None
        d_bias = _mask(dy.sum(1, dtype=ctx.dtype), bias_bits).sum(0)
        return dx, d_weight, d_bias, None, None


def _mask(values: Tensor, bits: Tensor) -> Tensor:
    # not a product: 0 times NaN or infinity is NaN
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return (values.view(integer) & all_ones(bits, values.shape[-1], integer)).view(values.dtype)
