"""The fused masked LayerNorm: its public function, its checks and its registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import words_for
from ..masks import all_active, first_task
from ..registration import FLOATS, kernels_for, register


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    *,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    group_gradients: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm with the mask of each group's task: y[g] = normalised x[g] (w ⊙ M) + b ⊙ m.

    This is the fused form of `reference.masked_layer_norm` and takes the same arguments. It makes
    one pass over x, in float32. Results repeat bit for bit.

    Args:
        x: [G, R, d], one task per group; each row is normalised. float32; on a GPU also float16 or
            bfloat16.
        weight, bias: float32 [d].
        weight_bits, bias_bits: int32 [T, ceil(d / 32)], the masks of all tasks; or None if every
            weight and bias is active.
        task_ids: int64 [G], the task of each group, below T; or None without masks. Ids may repeat.
            A GPU does not check them.
        epsilon: added to the variance.
        dtype: the dtype of y; by default the dtype of x.
        group_gradients: buffers for the gradients of weight and bias, or None. The backward pass
            writes each group's gradients to two tensors [G, d], or their sums to two tensors
            [1, d]. Weight and bias themselves then get no gradient.

    Returns:
        y, [G, R, d]; and x itself, for the residual sum of the branch that begins with y. The pass
        that computes the gradient of x also adds the gradient that comes from this sum.

    Raises:
        TypeError: x has a dtype that is not accepted, weight or bias is not float32, bits are not
            int32, or task_ids is not int64.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on a CPU, a task id is out of range.
        BackendUnavailable: the device has no fused kernels.
    """
    if weight_bits is None:
        if bias_bits is not None:
            raise ValueError("bias_bits is given without weight_bits: give both or neither")
        return _without_masks(x, weight, bias, epsilon, dtype, group_gradients)
    if bias_bits is None or task_ids is None:
        raise ValueError("weight_bits needs bias_bits and task_ids: give all of them or none")
    check_operands(x, weight, bias, weight_bits, bias_bits, task_ids)
    weight_out, bias_out = group_gradients or (None, None)
    check_outputs(len(x), weight, weight_out, bias_out)
    masks = weight_bits, bias_bits, task_ids
    return _MaskedLayerNorm.apply(
        x, weight, bias, *masks, epsilon, dtype or x.dtype, weight_out, bias_out
    )


def _without_masks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype | None,
    group_gradients: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The layer with a mask in which every weight is active."""
    everything = all_active(weight.shape, x.device)
    return masked_layer_norm(
        x,
        weight,
        bias,
        everything,
        everything,
        first_task(len(x), x.device),
        epsilon=epsilon,
        dtype=dtype,
        group_gradients=group_gradients,
    )


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise TypeError or ValueError if operands of `masked_layer_norm` do not fit together.

    Args:
        names: the caller's names for weight and bias, for the messages.
    """
    if len(x) == 0:
        raise ValueError("x has no groups: give at least one")
    size, words = x.shape[-1], words_for(x.shape[-1])
    tasks = len(weight_bits)
    taken = FLOATS if kernels_for(x.device) == "triton" else (torch.float32,)
    expected: list[tuple[str, Tensor, torch.dtype, tuple[int, ...] | None]] = [
        ("x", x, x.dtype if x.dtype in taken else torch.float32, None),
        (names[0], weight, torch.float32, (size,)),
        (names[1], bias, torch.float32, (size,)),
        (f"{names[0]}_bits", weight_bits, torch.int32, (tasks, words)),
        (f"{names[1]}_bits", bias_bits, torch.int32, (tasks, words)),
        ("task_ids", task_ids, torch.int64, (len(x),)),
    ]
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but the fused LayerNorm takes {dtype}")
        if shape is None:
            continue
        if x.dim() != 3 or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: with x {list(x.shape)} it must be "
                f"{list(shape)}; x must be [groups, rows, size]"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}")


def check_outputs(
    groups: int, weight: Tensor, weight_out: Tensor | None, bias_out: Tensor | None
) -> None:
    """Raise ValueError if the layer's gradients cannot be written to these tensors."""
    for tensor in (weight_out, bias_out):
        if tensor is None:
            continue
        fits = tensor.shape in ((groups, len(weight)), (1, len(weight)))
        if not fits or tensor.dtype != torch.float32 or tensor.stride(-1) != 1:
            raise ValueError(
                f"group_gradients has a tensor {tensor.dtype} {list(tensor.shape)}: it must be "
                f"float32, {[groups, len(weight)]} or {[1, len(weight)]}, and its last stride 1"
            )


class _MaskedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_bits: Tensor,
        bias_bits: Tensor,
        task_ids: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        weight_out: Tensor | None,
        bias_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Autograd finds tensors among the arguments only, not inside tuples."""
        y, *kept = torch.ops.harmodt.masked_layer_norm(
            x, weight, bias, weight_bits, bias_bits, task_ids, epsilon, dtype
        )
        ctx.save_for_backward(x, *kept, weight, weight_bits, bias_bits, task_ids)
        ctx.group_gradients = weight_out, bias_out
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, d_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return d_residual, *[None] * 9
        gradient = torch.ops.harmodt.masked_layer_norm_gradient
        weight_out, bias_out = ctx.group_gradients
        if weight_out is not None:
            return gradient(dy, d_residual, *ctx.saved_tensors, weight_out, bias_out), *[None] * 9
        weight = ctx.saved_tensors[3]
        d_weight, d_bias = (weight.new_empty(1, len(weight)) for _ in range(2))
        dx = gradient(dy, d_residual, *ctx.saved_tensors, d_weight, d_bias)
        return dx, d_weight[0], d_bias[0], *[None] * 7


def _masked_layer_norm_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=rest[-1]),
        x.new_empty(*x.shape[:2], 2, dtype=torch.float32),
        x.new_empty(len(x), dtype=torch.int32),
    )


def _gradient_fake(dy: Tensor, d_residual: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


register(
    __package__,
    "masked_layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor weight_bits, Tensor bias_bits, "
    "Tensor task_ids, float epsilon, ScalarType dtype) "
    "-> (Tensor y, Tensor statistics, Tensor arrivals)",
    _masked_layer_norm_fake,
)
register(
    __package__,
    "masked_layer_norm_gradient",
    # The GPU kernel counts its programs in `arrivals`, then sets it back to 0.
    "(Tensor dy, Tensor? d_residual, Tensor x, Tensor statistics, Tensor arrivals, Tensor weight, "
    "Tensor weight_bits, Tensor bias_bits, Tensor task_ids, Tensor(a!) weight_out, "
    "Tensor(b!) bias_out) -> Tensor",
    _gradient_fake,
)
