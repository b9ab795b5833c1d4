"""The masked linear layer that ends a residual branch, as quick as it gets in plain PyTorch."""

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
    """The same as `reference.linear_residual`, whose arguments are these, but for what is dropped.

    That follows from PyTorch's generators: `seed` is not read. Nor is `queue` used: no
    gradients wait here.
    """
    masks = weight_bits, bias_bits, task_ids
    branch = masked_linear(x, weight, bias, *masks, group_gradients=group_gradients)
    return dropout_add(residual, branch, drop)
