"""Defines the masked LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import copies_of_groups


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    *,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    group_gradients: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm with the mask of each group's task: y[g] = normalised x[g] (w ⊙ M) + b ⊙ m.

    The layer is differentiable in x, weight and bias. The gradient of an inactive weight is exactly
    0. Inactive weights may have any value, also NaN.

    Every implementation takes these arguments.

    Args:
        x: [G, R, d], one task per group; each row is normalised.
        weight, bias: [d].
        weight_bits, bias_bits: int32 [T, ceil(d / 32)], the masks of all tasks; or None if every
            weight and bias is active.
        task_ids: int64 [G], the task of each group; or None without masks. Ids may repeat.
        epsilon: added to the variance.
        dtype: the dtype of y. None keeps the dtype that PyTorch's promotion gives.
        group_gradients: buffers for the gradients of weight and bias, or None. The backward pass
            writes each group's gradients to two tensors [G, d], or their sums to two tensors
            [1, d]. Weight and bias themselves then get no gradient.

    Returns:
        y, [G, R, d]; and x itself, for the residual sum of the branch that begins with y.
    """
    normalised = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    weight_out, bias_out = group_gradients or (None, None)
    gain = copies_of_groups(weight, weight_bits, task_ids, len(x), weight_out)
    shift = copies_of_groups(bias, bias_bits, task_ids, len(x), bias_out)
    y = torch.addcmul(shift[:, None], normalised, gain[:, None])
    return y if dtype is None else y.to(dtype), x
