"""The fastest form of the masked linear layer in plain PyTorch.

It has its own backward pass. Autograd through `torch.where` would give the same gradients, but it
would read and write the masked copies of the weight more often.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bits import all_ones
from ..masks import with_gradients_in
from . import reference
from .gradients import WeightGradients


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    *,
    relu: bool = False,
    group_gradients: tuple[Tensor, Tensor | None] | None = None,
    queue: WeightGradients | None = None,
) -> Tensor:
    """The same as `reference.masked_linear`, with the same arguments and its own backward pass.

    The backward pass writes the gradients itself: `queue` is ignored.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if weight_bits is None and (group_gradients is None or len(group_gradients[0]) == 1):
        weight, bias = with_gradients_in(group_gradients, weight, bias)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return F.relu_(y) if relu else y
    bits = None if weight_bits is None else weight_bits[task_ids]
    rows_bits = None if bias_bits is None else bias_bits[task_ids]
    return _MaskedLinear.apply(x, weight, bias, bits, rows_bits, relu, group_gradients)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bits: Tensor | None,
        bias_bits: Tensor | None,
        relu: bool,
        group_gradients: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor:
        ctx.dtype, ctx.group_gradients = weight.dtype, group_gradients
        parameters = weight, bias
        if bits is None:
            weight = weight.expand(len(x), -1, -1)
            bias = None if bias is None else bias.expand(len(x), -1)
        masked_weight = _mask(weight, bits).to(x.dtype)  # [G, N, K]
        if bias is None:
            y = x @ masked_weight.mT
        else:
            masked_bias = _mask(bias, bias_bits).to(x.dtype)  # [G, N]
            y = torch.baddbmm(masked_bias[:, None], x, masked_weight.mT)
        y = y.relu_() if relu else y
        saved = masked_weight, bits, bias_bits, y if relu else None
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, masked_weight, bits, bias_bits, y = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.group_gradients is None:
            gradients = _with_graph(x, weight, bias, bits, bias_bits, y is not None, dy)
            return *gradients, *[None] * 4
        dy = dy if y is None else dy.masked_fill(y <= 0, 0.0)
        dx = dy @ masked_weight if ctx.needs_input_grad[0] else None
        d_weights = _mask(dy.mT @ x, bits)  # [G, N, K]
        d_biases = _mask(dy.sum(1, dtype=ctx.dtype), bias_bits) if bias is not None else None
        if ctx.group_gradients is not None:
            for out, gradient in zip(ctx.group_gradients, (d_weights, d_biases), strict=True):
                if gradient is not None:
                    out.copy_(gradient.to(out.dtype).sum_to_size(out.shape))
            return dx, *[None] * 6
        d_bias = None if d_biases is None else d_biases.sum(0)
        return dx, d_weights.sum(0, dtype=ctx.dtype), d_bias, *[None] * 4


def _with_graph(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor | None,
    bias_bits: Tensor | None,
    relu: bool,
    dy: Tensor,
) -> list[Tensor | None]:
    """The gradients of x, weight and bias, which have gradients themselves.

    Args:
        bits, bias_bits: the masks of each group.
    """
    groups = torch.arange(len(x), device=x.device)
    y = reference.masked_linear(x, weight, bias, bits, bias_bits, groups, relu=relu)
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)]


def _mask(values: Tensor, bits: Tensor | None) -> Tensor:
    """Values [..., K], set to 0 where the bit is 0; unchanged without bits."""
    if bits is None:
        return values
    # A bitwise AND, because 0 times NaN or infinity is NaN.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return (values.view(integer) & all_ones(bits, values.shape[-1], integer)).view(values.dtype)
