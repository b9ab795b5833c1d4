"""The definition of the masked linear layer in plain PyTorch.

It materialises one masked weight copy for each group, which the fused backends never do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bits import unpack_bits


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
    masked_weight = _mask(weight, weight_bits[task_ids])  # [G, N, K]
    if bias is None or bias_bits is None:
        return torch.matmul(x, masked_weight.transpose(1, 2))
    masked_bias = _mask(bias, bias_bits[task_ids])  # [G, N]
    return torch.baddbmm(masked_bias[:, None], x, masked_weight.transpose(1, 2))


def _mask(values: Tensor, bits: Tensor) -> Tensor:
    # where, not a product: 0 times NaN or infinity is NaN
    return torch.where(unpack_bits(bits, values.shape[-1]), values, 0.0)
