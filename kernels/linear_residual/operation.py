"""The layer that ends a residual branch as PyTorch sees it: the masked linear layer's operation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import seed_for
from ..masked_linear.gradients import WeightGradients
from ..masked_linear.operation import differentiable, operands_of
from ..registration import FLOATS


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

    The fused form of `reference.linear_residual`: one pass, in which the layer's output is rounded
    by nothing but the sum, and backward passes that drop while they read.

    Args:
        residual: [G, R, N], float32, float16 or bfloat16, whatever the type of x.
        drop, seed: those of `dropout_add`, whose branch is the layer's output. The other arguments
            are those of `masked_linear`.

    Returns:
        [G, R, N], in the dtype of the sum.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as `masked_linear`; or residual has
            another type or shape than it must, or is on another device.
    """
    given = x, weight, bias, weight_bits, bias_bits, task_ids
    layer = operands_of(given, group_gradients)
    _check_residual(residual, (*x.shape[:2], len(weight)), x.device)
    added = residual.reshape(*layer[0].shape[:2], len(weight))
    end = False, added, drop, seed_for(drop, seed, x.device)
    sums = differentiable((*layer, *end), group_gradients, queue)
    return sums if weight_bits is not None else sums.view(residual.shape)


def _check_residual(residual: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if residual.dtype not in FLOATS:
        raise TypeError(
            f"residual is {residual.dtype}, and the fused layer takes float32, float16 or bfloat16"
        )
    if residual.shape != shape:
        raise ValueError(f"residual {list(residual.shape)} must be as the output, {list(shape)}")
    if residual.device != device:
        raise ValueError(f"residual is on {residual.device} and x on {device}")
