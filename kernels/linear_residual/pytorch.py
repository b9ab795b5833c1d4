"""The fastest form in plain PyTorch of the masked linear layer at the end of a residual branch."""

from __future__ import annotations

from torch import Tensor

from ..dropout_add.pytorch import dropout_add
from ..masked_linear.gradients import WeightGradients
from ..masked_linear.pytorch import masked_linear


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
    """The same as `reference.linear_residual`, except for the elements that are dropped.

    PyTorch's generators draw them: the argument `seed` is ignored. The backward pass writes the
    gradients itself: `queue` is ignored too.
    """
    masks = weight_bits, bias_bits, task_ids
    branch = masked_linear(x, weight, bias, *masks, group_gradients=group_gradients)
    return dropout_add(residual, branch, drop)
