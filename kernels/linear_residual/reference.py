"""Defines the masked linear layer at the end of a residual branch in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..dropout_add.reference import dropout_add
from ..masked_linear.gradients import WeightGradients
from ..masked_linear.reference import masked_linear


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    residual: Tensor,
    drop: float,
    *,
    seed: Tensor | None = None,
    group_gradients: tuple[Tensor, Tensor | None] | None = None,
    queue: WeightGradients | None = None,
) -> Tensor:
    """residual + dropout(x[g] (W ⊙ M)ᵀ + b ⊙ m).

    Every implementation takes these arguments.

    Args:
        x, weight, bias, weight_bits, bias_bits, task_ids, group_gradients, queue: as in
            `masked_linear`.
        residual: [G, R, N].
        drop, seed: as in `dropout_add`.

    Returns:
        [G, R, N], in the dtype to which PyTorch promotes residual and the layer's output.
    """
    masks = weight_bits, bias_bits, task_ids
    branch = masked_linear(x, weight, bias, *masks, group_gradients=group_gradients)
    return dropout_add(residual, branch, drop, seed)
