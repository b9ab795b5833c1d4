"""The fused masked linear layer: its public function, checks and registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import words_for
from ..masks import all_active, first_task
from ..registration import FLOATS, register
from .gradients import LayerGradients, WeightGradients, write


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    *,
    relu: bool = False,
    group_gradients: tuple[Tensor, Tensor | None] | None = None,
    queue: WeightGradients | None = None,
) -> Tensor:
    """Linear layer with the mask of each group's task: y[g] = x[g] (W ⊙ M)ᵀ + b ⊙ m.

    This is the fused form of `reference.masked_linear` and takes the same arguments. The layer is
    differentiable in x, weight and bias. The gradient of an inactive weight is exactly 0 (Eq. 4 of
    the HarmoDT paper). Inactive weights may have any value, also NaN. W ⊙ M is never stored in
    memory. The weight gradients of single groups are stored only if `group_gradients` asks for
    them. Results repeat bit for bit. The last dimension of weights and masks must have stride 1;
    their other strides are free.

    Args:
        x: [G, R, K], one task per group; float32, float16 or bfloat16.
        weight: [N, K], in float32 or the dtype of the output.
        bias: [N] in float32 or the dtype of the output, or None.
        weight_bits: int32 [T, N, ceil(K / 32)], the masks of all tasks; or None if every weight
            and bias is active.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias or without masks.
        task_ids: int64 [G], the task of each group, below T; or None without masks. Ids may repeat.
            A GPU does not check them.
        relu: apply max(0, y) to the output.
        group_gradients: buffers for the gradients of weight and bias, or None. The backward pass
            writes each group's gradients to tensors [G, N, K] and [G, N] (None without a bias), or
            their sum to tensors [1, N, K] and [1, N]. Weight and bias themselves then get no
            gradient.
        queue: collects layers and computes their weight gradients together, when enough layers wait
            or when `finish` is called. If it is None, this layer's backward pass computes them.

    Returns:
        [G, R, N], in the dtype of x (under autocast, in the autocast dtype). Sums are in float32.
        Products of float32 are in TF32 if PyTorch's own switch says so.

    Raises:
        TypeError: a floating-point dtype is not accepted.
        ValueError: shapes, strides, devices or integer dtypes do not fit together.
        IndexError: on a CPU, a task id is out of range.
        BackendUnavailable: the device has no fused kernels.
    """
    layer = operands_of((x, weight, bias, weight_bits, bias_bits, task_ids), group_gradients)
    y = differentiable((*layer, relu, None, 0.0, None), group_gradients, queue)
    return y if weight_bits is not None else y.view(*x.shape[:2], len(weight))


def operands_of(
    arguments: tuple[Any, ...], group_gradients: tuple[Tensor, Tensor | None] | None
) -> tuple[Any, ...]:
    """The first six operands of `harmodt::masked_linear`.

    Without masks, the function adds masks in which every weight is active. Under autocast, it
    converts x.

    Args:
        arguments: the first six arguments of `masked_linear`.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
    """
    x, weight, bias, weight_bits, bias_bits, task_ids = arguments
    if weight_bits is None:
        x, weight_bits, bias_bits, task_ids = _without_masks(
            x, weight, bias, bias_bits, group_gradients
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    layer = x, weight, bias, weight_bits, bias_bits, task_ids
    check_operands(*layer, group_gradients)
    return layer


def _without_masks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bias_bits: Tensor | None,
    group_gradients: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Operands for a layer without masks: a mask in which every weight is active.

    The batch becomes one group, unless each group's gradient is needed.

    Returns:
        x as [1, G R, K] or [G, R, K], weight_bits, bias_bits and task_ids.

    Raises:
        ValueError: there is a mask of the bias only, or x is not [G, R, K] with G > 0.
    """
    if bias_bits is not None:
        raise ValueError("bias_bits is given without weight_bits: give both or neither")
    _check_groups(x)
    per_group = group_gradients and len(group_gradients[0]) == len(x)
    rows = x if per_group else x.flatten(0, 1)[None]
    bias_mask = None if bias is None else all_active(bias.shape, x.device)
    return rows, all_active(weight.shape, x.device), bias_mask, first_task(len(rows), x.device)


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    group_gradients: tuple[Tensor, Tensor | None] | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError if the arguments of `masked_linear` do not fit together.

    Args:
        dtype: the dtype of the products, if it is not the dtype of x.
    """
    weight_out, bias_out = group_gradients or (None, None)
    _check_types(x, dtype or x.dtype, weight, bias, weight_bits, bias_bits, task_ids)
    _check_layout(x, weight, bias, weight_bits, bias_bits, task_ids, weight_out, bias_out)


def _check_types(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"x is {x.dtype}, but the fused masked linear takes float32, float16 or bfloat16; "
            "the reference backend takes any"
        )
    if weight.dtype not in (torch.float32, dtype):
        raise TypeError(
            f"weight is {weight.dtype}: it must be float32 or {dtype}, the dtype of the products"
        )
    if bias is not None and bias.dtype not in (torch.float32, dtype):
        raise TypeError(
            f"bias is {bias.dtype}: it must be float32 or {dtype}, the dtype of the products"
        )
    for name, bits in (("weight_bits", weight_bits), ("bias_bits", bias_bits)):
        if bits is not None and bits.dtype != torch.int32:
            raise ValueError(f"{name} is {bits.dtype}: masks are packed in int32 (pack_bits)")
    if task_ids is None:
        raise ValueError("task_ids is None: masks need the task of each group, int64")
    if task_ids.dtype != torch.int64:
        raise ValueError(f"task_ids is {task_ids.dtype}: it must be int64")
    if (bias is None) != (bias_bits is None):
        raise ValueError("bias and bias_bits belong together: give both or neither")


def _check_groups(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: it must be [groups, rows, inputs]")
    if len(x) == 0:
        raise ValueError("x has no groups: give at least one")


def _check_layout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
) -> None:
    _check_groups(x)
    groups, _, inputs = x.shape
    outputs, tasks = len(weight), len(weight_bits)
    sums = 1 if weight_out is not None and len(weight_out) == 1 else groups
    if weight_out is not None and (bias is None) != (bias_out is None):
        raise ValueError(
            "group_gradients must have a tensor for the bias if and only if bias is given"
        )
    device = x.device
    for name, tensor, shape in (
        ("weight", weight, (outputs, inputs)),
        ("bias", bias, (outputs,)),
        ("weight_bits", weight_bits, (tasks, outputs, words_for(inputs))),
        ("bias_bits", bias_bits, (tasks, words_for(outputs))),
        ("task_ids", task_ids, (groups,)),
        ("group_gradients[0]", weight_out, (sums, outputs, inputs)),
        ("group_gradients[1]", bias_out, (sums, outputs)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: with x {list(x.shape)} and weight "
                f"{list(weight.shape)} it must be {list(shape)}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}")


def differentiable(
    operands: tuple[Any, ...],
    group_gradients: tuple[Tensor, Tensor | None] | None,
    queue: WeightGradients | None,
) -> Tensor:
    """`harmodt::masked_linear` on all its operands, differentiable if gradients are enabled."""
    if not torch.is_grad_enabled():
        return torch.ops.harmodt.masked_linear(*operands)
    return _MaskedLinear.apply(*operands, *(group_gradients or (None, None)), queue)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_bits: Tensor,
        bias_bits: Tensor | None,
        task_ids: Tensor,
        relu: bool,
        residual: Tensor | None,
        drop: float,
        seed: Tensor | None,
        weight_out: Tensor | None,
        bias_out: Tensor | None,
        queue: WeightGradients | None,
    ) -> Tensor:
        """Autograd finds tensors among the arguments only, not inside tuples."""
        masks = weight_bits, bias_bits, task_ids
        y = torch.ops.harmodt.masked_linear(x, weight, bias, *masks, relu, residual, drop, seed)
        ctx.save_for_backward(x, weight, *masks, y if relu else None, seed)
        ctx.group_gradients, ctx.queue, ctx.drop = (weight_out, bias_out), queue, drop
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_bits, bias_bits, task_ids, y, seed = ctx.saved_tensors
        masks, (weight_out, bias_out) = (weight_bits, bias_bits, task_ids), ctx.group_gradients
        # dx comes last, so that it can use the memory that the weight gradient freed.
        layer = LayerGradients(dy, y, x, *masks, weight_out, bias_out, ctx.drop, seed)
        d_weight_and_bias = weight_gradients(ctx, weight, layer)
        dx = d_residual = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.harmodt.masked_linear_input_gradient(
                dy, y, weight, weight_bits, task_ids, x.dtype, ctx.drop, seed
            )
        if ctx.residual_dtype is not None:
            d_residual = dy.to(ctx.residual_dtype)
        return dx, *d_weight_and_bias, *[None] * 4, d_residual, *[None] * 5


def weight_gradients(
    ctx: Any, weight: Tensor, layer: LayerGradients
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias that a layer's backward pass returns to autograd.

    If the layer has output buffers (`weight_out`), the gradients go there, perhaps through the
    `queue`, and autograd gets None.

    Args:
        ctx: the context of a layer whose second and third arguments are weight and bias.
    """
    if layer.weight_out is not None:
        if ctx.queue is None:
            write([layer])
        else:
            ctx.queue.add(layer)
        return None, None
    if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        return None, None
    d_weight = weight.new_empty(1, *weight.shape, dtype=torch.float32)
    d_bias = None if layer.bias_bits is None else d_weight.new_empty(1, len(weight))
    write([layer._replace(weight_out=d_weight, bias_out=d_bias)])
    # Autograd converts the bias gradient: the bias may have another dtype than the weight.
    return d_weight[0].to(weight.dtype), None if d_bias is None else d_bias[0]


def _masked_linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    residual = rest[5] if len(rest) > 5 else None
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(*x.shape[:2], len(weight), dtype=dtype)


def _input_gradient_fake(dy: Tensor, y: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:2], weight.shape[1], dtype=rest[2])


def _weight_gradients_fake(*_: Any) -> None:
    return None


register(
    __package__,
    "masked_linear",
    # residual, drop and seed: the dropout and the residual sum at the end of a branch
    "(Tensor x, Tensor weight, Tensor? bias, Tensor weight_bits, Tensor? bias_bits, "
    "Tensor task_ids, bool relu, Tensor? residual=None, float drop=0.0, Tensor? seed=None) "
    "-> Tensor",
    _masked_linear_fake,
)
register(
    __package__,
    "masked_linear_input_gradient",
    "(Tensor dy, Tensor? y, Tensor weight, Tensor weight_bits, Tensor task_ids, "
    "ScalarType dtype, float drop=0.0, Tensor? seed=None) -> Tensor",
    _input_gradient_fake,
)
register(
    __package__,
    "masked_linear_weight_gradients",
    # Lists over layers, in the order of `LayerGradients`. bias_out has only layers with a bias.
    "(Tensor[] dy, Tensor?[] y, Tensor[] x, Tensor[] weight_bits, Tensor?[] bias_bits, "
    "Tensor[] task_ids, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out, float[] drop, "
    "Tensor?[] seed, Tensor?[] statistics, Tensor?[] affine) -> ()",
    _weight_gradients_fake,
)
