"""The definition of the masked LayerNorm in plain PyTorch."""

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
    """LayerNorm under the mask of each group's task: y[g] = normalised x[g] (w ⊙ M) + b ⊙ m.

    Differentiable in x, weight and bias; the gradient of an inactive weight is exactly zero.
    Weights that are inactive may hold any value, NaN included. Masks are an argument each, as of
    all layers.

    Args:
        x: [G, R, d], one task per group; each row is normalised.
        weight, bias: [d].
        weight_bits, bias_bits: int32 [T, ceil(d / 32)], the masks of all tasks; or None where
            every weight and bias is active.
        task_ids: int64 [G], the task of each group; ids may repeat. Not read without masks.
        epsilon: added to the variance.
        dtype: of y, if it is another one than what comes out.
        group_gradients: two tensors [G, d] to which the backward pass writes the gradients of
            weight and bias of each group by itself; weight and bias then get none.

    Returns:
        y, [G, R, d], and x itself, for the residual sum of the branch that begins with y.
    """
    normalised = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    weight_out, bias_out = group_gradients or (None, None)
    gain = copies_of_groups(weight, weight_bits, task_ids, len(x), weight_out)
    shift = copies_of_groups(bias, bias_bits, task_ids, len(x), bias_out)
    y = torch.addcmul(shift[:, None], normalised, gain[:, None])
    return y if dtype is None else y.to(dtype), x
