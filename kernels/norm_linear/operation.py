"""The masked linear layer behind a masked LayerNorm as PyTorch sees it: function and operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masked_layer_norm import operation as layer_norm
from ..masked_linear import operation as linear
from ..masked_linear.gradients import LayerGradients, WeightGradients
from ..masks import LayerMasks
from ..registration import register
from .reference import in_parts


def norm_linear(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_masks: LayerMasks,
    masks: LayerMasks,
    *,
    epsilon: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """masked_linear(masked_layer_norm(x)), with which a residual branch begins.

    What is normalised is never in memory: the layer normalises x where it reads it, forward and
    for its weight's gradient. Without masks it is its two parts. The arguments are those of
    `reference.in_parts`.

    Args:
        x: [G, R, K], one task per group; float32, on a GPU float16 or bfloat16 too.
        gain, shift: float32 [K], weight and bias of the LayerNorm.
        weight, bias, relu: those of `masked_linear`.
        norm_masks, masks: of the LayerNorm and of the linear layer, with the same `task_ids`.
        epsilon: added to the variance.

    Returns:
        y, [G, R, N], in the dtype of x, under autocast in the autocast dtype; and x itself, for the
        residual sum of the branch: its gradient there is added in the pass that computes the rest.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as `masked_layer_norm` and
            `masked_linear`; or the task ids are not one tensor.
    """
    if masks.weight_bits is None or norm_masks.weight_bits is None:
        return in_parts(
            layer_norm.masked_layer_norm,
            linear.masked_linear,
            *(x, gain, shift, weight, bias, norm_masks, masks),
            epsilon=epsilon,
            relu=relu,
        )
    gain_bits, shift_bits = norm_masks.weight_bits, norm_masks.bias_bits
    weight_bits, bias_bits, task_ids = masks.weight_bits, masks.bias_bits, masks.task_ids
    if shift_bits is None or task_ids is None:
        raise ValueError("the LayerNorm's weight_bits need bias_bits and task_ids: give all")
    if norm_masks.task_ids is not task_ids:  # comparing them would wait for the device
        raise ValueError("norm_masks and masks have two tensors of task_ids: give both the same")
    layer_norm.check_operands(x, gain, shift, gain_bits, shift_bits, task_ids, ("gain", "shift"))
    of_norm = norm_masks.group_gradients or (None, None)
    layer_norm.check_outputs(len(x), gain, *of_norm)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    out = masks.group_gradients
    linear.check_operands(x, weight, bias, weight_bits, bias_bits, task_ids, out, dtype)
    bits = gain_bits, shift_bits, weight_bits, bias_bits, task_ids
    outs, rest = (*of_norm, *(out or (None, None))), (epsilon, relu, dtype, masks.queue)
    return _NormLinear.apply(x, weight, bias, gain, shift, *outs, *bits, *rest)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor,
        shift: Tensor,
        gain_out: Tensor | None,
        shift_out: Tensor | None,
        weight_out: Tensor | None,
        bias_out: Tensor | None,
        gain_bits: Tensor,
        shift_bits: Tensor,
        weight_bits: Tensor,
        bias_bits: Tensor | None,
        task_ids: Tensor,
        epsilon: float,
        relu: bool,
        dtype: torch.dtype,
        queue: WeightGradients | None,
    ) -> tuple[Tensor, Tensor]:
        """Its arguments stand one by one, because autograd looks for tensors among them."""
        bits_of_norm, masks = (gain_bits, shift_bits), (weight_bits, bias_bits, task_ids)
        y, statistics, affine, arrivals = torch.ops.harmodt.norm_linear(
            x, gain, shift, *bits_of_norm, weight, bias, *masks, epsilon, relu, dtype
        )
        ctx.save_for_backward(
            *(x, statistics, arrivals, gain, *bits_of_norm, affine),
            *(weight, *masks, y if relu else None),
        )
        ctx.of_norm, ctx.of_layer, ctx.queue = (gain_out, shift_out), (weight_out, bias_out), queue
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, d_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return d_residual, *[None] * 17
        *of_norm, affine, weight, weight_bits, bias_bits, task_ids, y = ctx.saved_tensors
        x, statistics, _, gain, *_ = of_norm
        masks = weight_bits, bias_bits, task_ids
        layer = LayerGradients(dy, y, x, *masks, *ctx.of_layer)
        of_weights = linear.weight_gradients(
            ctx, weight, layer._replace(statistics=statistics, affine=affine)
        )
        d_normalised = torch.ops.harmodt.masked_linear_input_gradient(
            dy, y, weight, weight_bits, task_ids, dy.dtype
        )
        gradient = torch.ops.harmodt.masked_layer_norm_gradient
        operands = d_normalised, d_residual, *of_norm, task_ids
        if ctx.of_norm[0] is not None:
            return gradient(*operands, *ctx.of_norm), *of_weights, *[None] * 15
        d_gain, d_shift = (gain.new_empty(1, len(gain)) for _ in range(2))
        dx = gradient(*operands, d_gain, d_shift)
        return dx, *of_weights, d_gain[0], d_shift[0], *[None] * 13


def _norm_linear_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, rows, inputs = x.shape
    return (
        x.new_empty(groups, rows, len(rest[4]), dtype=rest[-1]),
        x.new_empty(groups, rows, 2, dtype=torch.float32),
        x.new_empty(groups, 2, inputs, dtype=torch.float32),
        x.new_empty(groups, dtype=torch.int32),
    )


register(
    __package__,
    "norm_linear",
    # What comes after y is for the gradient: as `LayerGradients` has it, and its counters.
    "(Tensor x, Tensor gain, Tensor shift, Tensor gain_bits, Tensor shift_bits, Tensor weight, "
    "Tensor? bias, Tensor weight_bits, Tensor? bias_bits, Tensor task_ids, float epsilon, "
    "bool relu, ScalarType dtype) "
    "-> (Tensor y, Tensor statistics, Tensor affine, Tensor arrivals)",
    _norm_linear_fake,
)
