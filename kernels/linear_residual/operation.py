"""The fused layer at the end of a residual branch. It uses the masked linear layer's operation."""

from __future__ import annotations

from torch import Tensor

from ..dropout import seed_for
from ..masked_linear.gradients import WeightGradients
from ..masked_linear.operation import differentiable, operands_of
from ..operands import check
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

    This is the fused form of `reference.linear_residual` and takes the same arguments. One pass
    computes the layer, dropout and the sum, so the layer's output is not rounded before the sum.
    The backward passes apply dropout to the gradient of the output while they read it.

    Args:
        x, weight, bias, weight_bits, bias_bits, task_ids, group_gradients, queue: as in
            `masked_linear`.
        residual: [G, R, N], float32, float16 or bfloat16. Its dtype may differ from the dtype of x.
        drop, seed: as in `dropout_add`.

    Returns:
        [G, R, N], in the dtype to which PyTorch promotes residual and the layer's output.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as in `masked_linear`; also if the
            dtype, the shape or the device of residual is wrong.
    """
    layer = operands_of((x, weight, bias, weight_bits, bias_bits, task_ids), group_gradients)
    shape = *x.shape[:2], len(weight)
    beside = [("x", x), ("weight", weight)]
    check("residual", residual, FLOATS, shape, x.device, beside=beside)
    residual_rows = residual.reshape(*layer[0].shape[:2], len(weight))
    end = False, residual_rows, drop, seed_for(drop, seed, x.device)
    sums = differentiable((*layer, *end), group_gradients, queue)
    return sums if weight_bits is not None else sums.view(residual.shape)
