"""The definition of the masked LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bits import unpack_bits


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    *,
    epsilon: float = 1e-5,
    group_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LayerNorm under the mask of each group's task: y[g] = normalised x[g] (w ⊙ M) + b ⊙ m.

    Differentiable in x, weight and bias; the gradient of an inactive weight is exactly zero.
    Weights that are inactive may hold any value, NaN included.

    Args:
        x: [G, R, d], one task per group; each row is normalised.
        weight, bias: [d].
        weight_bits, bias_bits: int32 [T, ceil(d / 32)], the masks of all tasks.
        task_ids: int64 [G], the task of each group; ids may repeat.
        epsilon: added to the variance.
        group_gradients: two tensors [G, d] to which the backward pass writes the gradients of
            weight and bias of each group by itself; those of weight and bias are then undefined.

    Returns:
        [G, R, d].
    """
    normalised = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    d_weight, d_bias = group_gradients or (None, None)
    gain = _masked(weight, weight_bits[task_ids], d_weight)
    shift = _masked(bias, bias_bits[task_ids], d_bias)
    return torch.addcmul(shift[:, None], normalised, gain[:, None])


def _masked(values: Tensor, bits: Tensor, gradient_out: Tensor | None) -> Tensor:
    mask = unpack_bits(bits, len(values))
    masked = torch.where(mask, values, 0.0)  # [G, d]
    if gradient_out is not None and masked.requires_grad:

        def keep(gradient: Tensor) -> None:
            gradient_out.copy_(torch.where(mask, gradient, 0.0))

        masked.register_hook(keep)
    return masked
