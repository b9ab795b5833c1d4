"""The fused LayerNorm and linear layer: the public function, its checks and its operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..masked_layer_norm import operation as layer_norm
from ..masked_linear import operation as linear
from ..masked_linear.gradients import LayerGradients, WeightGradients
from ..masks import LayerMasks
from ..registration import register
from .reference import norm_then_linear


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
    """masked_linear(masked_layer_norm(x)), the start of a residual branch.

    This is the fused form of `reference.norm_linear` and takes the same arguments. The normalised
    rows are never stored in memory: the forward pass, and the pass that computes the weight
    gradient, normalise x while they read it. Without masks, the two operations run one after the
    other.

    Args:
        x: [G, R, K], one task per group. float32; on a GPU also float16 or bfloat16.
        gain, shift: float32 [K], weight and bias of the LayerNorm.
        weight, bias, relu: as in `masked_linear`.
        norm_masks, masks: the masks of the LayerNorm and of the linear layer. Both hold the same
            tensor `task_ids`.
        epsilon: added to the variance.

    Returns:
        y, [G, R, N], in the dtype of x (under autocast, in the autocast dtype); and x itself, for
        the residual sum of the branch. The pass that computes the gradient of x also adds the
        gradient that comes from this sum.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as in `masked_layer_norm` and
            `masked_linear`; also ValueError if the two `task_ids` are different tensors.
    """
    if masks.weight_bits is None or norm_masks.weight_bits is None:
        return norm_then_linear(
            layer_norm.masked_layer_norm,
            linear.masked_linear,
            *(x, gain, shift, weight, bias, norm_masks, masks),
            epsilon=epsilon,
            relu=relu,
        )
    gain_bits, shift_bits, task_ids = norm_masks.bits
    weight_bits, bias_bits, _ = masks.bits
    if masks.task_ids is not task_ids:  # comparing their values would wait for the device
        raise ValueError("norm_masks and masks have different task_ids: give both the same tensor")
    norm_out, out = norm_masks.group_gradients, masks.group_gradients
    norm_bits = gain_bits, shift_bits, task_ids
    layer_norm.check_operands(x, gain, shift, *norm_bits, norm_out, ("gain", "shift"))
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    linear.check_operands(x, weight, bias, weight_bits, bias_bits, task_ids, out, dtype)
    bits = gain_bits, shift_bits, weight_bits, bias_bits, task_ids
    outs = *(norm_out or (None, None)), *(out or (None, None))
    rest = epsilon, relu, dtype, masks.queue
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
        """Autograd finds tensors among the arguments only, not inside tuples."""
        norm_bits, masks = (gain_bits, shift_bits), (weight_bits, bias_bits, task_ids)
        y, statistics, affine, arrivals = torch.ops.harmodt.norm_linear(
            x, gain, shift, *norm_bits, weight, bias, *masks, epsilon, relu, dtype
        )
        ctx.save_for_backward(
            *(x, statistics, arrivals, gain, *norm_bits, affine),
            *(weight, *masks, y if relu else None),
        )
        ctx.norm_out, ctx.layer_out, ctx.queue = (
            (gain_out, shift_out),
            (weight_out, bias_out),
            queue,
        )
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, dy: Tensor | None, d_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:  # y is not used
            layer_norm.fill_with_zeros(*ctx.norm_out, *ctx.layer_out)
            return d_residual, *[None] * 17
        *norm_tensors, affine, weight, weight_bits, bias_bits, task_ids, y = ctx.saved_tensors
        x, statistics, _, gain, *_ = norm_tensors
        masks = weight_bits, bias_bits, task_ids
        layer = LayerGradients(dy, y, x, *masks, *ctx.layer_out)
        d_weight_and_bias = linear.weight_gradients(
            ctx, weight, layer._replace(statistics=statistics, affine=affine)
        )
        d_normalised = torch.ops.harmodt.masked_linear_input_gradient(
            dy, y, weight, weight_bits, task_ids, dy.dtype
        )
        gradient = torch.ops.harmodt.masked_layer_norm_gradient
        operands = d_normalised, d_residual, *norm_tensors, task_ids
        if ctx.norm_out[0] is not None:
            return gradient(*operands, *ctx.norm_out), *d_weight_and_bias, *[None] * 15
        d_gain, d_shift = (gain.new_empty(1, len(gain)) for _ in range(2))
        dx = gradient(*operands, d_gain, d_shift)
        return dx, *d_weight_and_bias, d_gain[0], d_shift[0], *[None] * 13


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
    # statistics, affine and arrivals are inputs of the backward pass: see `LayerGradients` and
    # `harmodt::masked_layer_norm_gradient`.
    "(Tensor x, Tensor gain, Tensor shift, Tensor gain_bits, Tensor shift_bits, Tensor weight, "
    "Tensor? bias, Tensor weight_bits, Tensor? bias_bits, Tensor task_ids, float epsilon, "
    "bool relu, ScalarType dtype) "
    "-> (Tensor y, Tensor statistics, Tensor affine, Tensor arrivals)",
    _norm_linear_fake,
)
