"""The layer that ends a residual branch as PyTorch sees it: the function and the operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import seed_for
from ..dropout_add.operation import dropout_add
from ..masked_linear.gradients import LayerGradients, WeightGradients
from ..masked_linear.operation import check_operands, masked_linear, weight_gradients
from ..registration import FLOATS, kernels_for, register


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

    The fused form of `reference.linear_residual`: on a GPU one pass, in which the layer's output is
    rounded by nothing but the sum, and backward passes that drop while they read. On a CPU, and
    without masks, it is `masked_linear` and `dropout_add` one after the other.

    Args:
        residual: [G, R, N], float32, on a GPU float16 or bfloat16 too.
        drop, seed: those of `dropout_add`, whose branch is the layer's output. The other arguments
            are those of `masked_linear`.

    Returns:
        [G, R, N], in the dtype of the sum.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as `masked_linear`; or residual has
            another type or shape than it must, or is on another device.
    """
    if weight_bits is None or kernels_for(x.device) == "cpu":
        masks = weight_bits, bias_bits, task_ids
        branch = masked_linear(
            x, weight, bias, *masks, group_gradients=group_gradients, queue=queue
        )
        return dropout_add(residual, branch, drop, seed)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check_operands(x, weight, bias, weight_bits, bias_bits, task_ids, group_gradients)
    _check_residual(residual, (*x.shape[:2], len(weight)), x.device)
    seed = seed_for(drop, seed, x.device)
    outs = group_gradients or (None, None)
    return _LinearResidual.apply(
        x, weight, bias, weight_bits, bias_bits, task_ids, residual, drop, seed, *outs, queue
    )


def _check_residual(residual: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if residual.dtype not in FLOATS:
        raise TypeError(
            f"residual is {residual.dtype}, and the fused layer takes float32, float16 or bfloat16"
        )
    if residual.shape != shape:
        raise ValueError(f"residual {list(residual.shape)} must be as the output, {list(shape)}")
    if residual.device != device:
        raise ValueError(f"residual is on {residual.device} and x on {device}")


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_bits: Tensor,
        bias_bits: Tensor | None,
        task_ids: Tensor,
        residual: Tensor,
        drop: float,
        seed: Tensor | None,
        weight_out: Tensor | None,
        bias_out: Tensor | None,
        queue: WeightGradients | None,
    ) -> Tensor:
        """Its arguments stand one by one, because autograd looks for tensors among them."""
        ctx.save_for_backward(x, weight, weight_bits, bias_bits, task_ids, seed)
        ctx.group_gradients, ctx.queue = (weight_out, bias_out), queue
        ctx.drop, ctx.of_residual = drop, residual.dtype
        return torch.ops.harmodt.linear_residual(
            x, weight, bias, weight_bits, bias_bits, task_ids, residual, drop, seed
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_bits, bias_bits, task_ids, seed = ctx.saved_tensors
        masks, draw = (weight_bits, bias_bits, task_ids), (ctx.drop, seed)
        weight_out, bias_out = ctx.group_gradients
        # The gradient of x comes last: it takes the memory that the weights' sums have left.
        of_weights = weight_gradients(
            ctx, weight, LayerGradients(dy, None, x, *masks, weight_out, bias_out, *draw)
        )
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.harmodt.linear_residual_input_gradient(
                dy, weight, weight_bits, task_ids, x.dtype, *draw
            )
        return dx, *of_weights, None, None, None, dy.to(ctx.of_residual), *[None] * 5


def _linear_residual_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    residual: Tensor,
    *_: Any,
) -> Tensor:
    return x.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _input_gradient_fake(
    dy: Tensor,
    weight: Tensor,
    weight_bits: Tensor,
    task_ids: Tensor,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return dy.new_empty(*dy.shape[:2], weight.shape[1], dtype=dtype)


register(
    __package__,
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor weight_bits, Tensor? bias_bits, "
    "Tensor task_ids, Tensor residual, float drop, Tensor? seed) -> Tensor",
    _linear_residual_fake,
    kernels=("triton",),
)
register(
    __package__,
    "linear_residual_input_gradient",
    "(Tensor dy, Tensor weight, Tensor weight_bits, Tensor task_ids, ScalarType dtype, "
    "float drop, Tensor? seed) -> Tensor",
    _input_gradient_fake,
    kernels=("triton",),
)
