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
    *,
    relu: bool = False,
    group_gradients: tuple[Tensor, Tensor | None] | None = None,
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
        relu: apply max(0, y) to the output.
        group_gradients: tensors [G, N, K] and [G, N] (None without a bias) to which the backward
            pass writes the gradient of each group by itself; weight and bias then get none.

    Returns:
        [G, R, N], in the dtype of x (under autocast, in the autocast dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bits = weight_bits[task_ids]
    rows_bits = None if bias_bits is None else bias_bits[task_ids]
    return _MaskedLinear.apply(x, weight, bias, bits, rows_bits, relu, group_gradients)


class _MaskedLinear(torch.autograd.Function):
    # Autograd through `torch.where` gives the same gradients in more passes over the copies.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bits: Tensor,
        bias_bits: Tensor | None,
        relu: bool,
        group_gradients: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor:
        ctx.dtype, ctx.group_gradients = weight.dtype, group_gradients
        masked_weight = _mask(weight, bits).to(x.dtype)  # [G, N, K]
        if bias is None:
            y = x @ masked_weight.mT
        else:
            masked_bias = _mask(bias, bias_bits).to(x.dtype)  # [G, N]
            y = torch.baddbmm(masked_bias[:, None], x, masked_weight.mT)
        y = y.relu_() if relu else y
        ctx.save_for_backward(x, masked_weight, bits, bias_bits, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, masked_weight, bits, bias_bits, y = ctx.saved_tensors
        dy = dy if y is None else dy.masked_fill(y <= 0, 0.0)
        dx = dy @ masked_weight if ctx.needs_input_grad[0] else None
        d_weight = _mask(dy.mT @ x, bits)  # [G, N, K]
        d_bias = None if bias_bits is None else _mask(dy.sum(1, dtype=ctx.dtype), bias_bits)
        if ctx.group_gradients is not None:
            for out, gradient in zip(ctx.group_gradients, (d_weight, d_bias), strict=True):
                if gradient is not None:
                    out.copy_(gradient)
            return dx, *[None] * 6
        d_bias = None if d_bias is None else d_bias.sum(0)
        return dx, d_weight.sum(0, dtype=ctx.dtype), d_bias, *[None] * 4


def _mask(values: Tensor, bits: Tensor | None) -> Tensor:
    assert bits is not None
    # not a product: 0 times NaN or infinity is NaN
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return (values.view(integer) & all_ones(bits, values.shape[-1], integer)).view(values.dtype)
