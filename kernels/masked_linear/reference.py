"""Defines the masked linear layer in plain PyTorch.

It stores one masked copy of the weight per group. The fused backends store none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import copies_of_groups
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
    """Linear layer with the mask of each group's task: y[g] = x[g] (W ⊙ M)ᵀ + b ⊙ m.

    The layer is differentiable in x, weight and bias. The gradient of an inactive weight is exactly
    0 (Eq. 4 of the HarmoDT paper). Inactive weights may have any value, also NaN. Every
    implementation takes these arguments.

    Args:
        x: [G, R, K], one task per group.
        weight: [N, K].
        bias: [N] or None.
        weight_bits: int32 [T, N, ceil(K / 32)], the masks of all tasks; or None if every weight
            and bias is active.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias or without masks.
        task_ids: int64 [G], the task of each group; or None without masks. Ids may repeat.
        relu: apply max(0, y) to the output.
        group_gradients: buffers for the gradients of weight and bias, or None. The backward pass
            writes each group's gradients to tensors [G, N, K] and [G, N] (None without a bias), or
            their sum to tensors [1, N, K] and [1, N]. Weight and bias themselves then get no
            gradient.
        queue: the definition ignores it: its backward pass writes the gradients itself.

    Returns:
        [G, R, N], in the dtype of x (under autocast, in the autocast dtype).
    """
    weight_out, bias_out = group_gradients or (None, None)
    weights = copies_of_groups(weight, weight_bits, task_ids, len(x), weight_out).to(x.dtype)
    if bias is None:
        y = x @ weights.mT
    else:
        biases = copies_of_groups(bias, bias_bits, task_ids, len(x), bias_out).to(x.dtype)
        y = torch.baddbmm(biases[:, None], x, weights.mT)
    return y.relu() if relu else y
