"""The masked linear layer as PyTorch sees it: the public function and the registered operations."""

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
    """Linear layer under the mask of each group's task: y[g] = x[g] (W ⊙ M)ᵀ + b ⊙ m.

    Differentiable in x, weight and bias; the gradient of an inactive weight is exactly zero
    (Eq. 4 of the HarmoDT paper). Weights that are inactive may hold any value, NaN included.
    Neither W ⊙ M nor the products of single groups are materialised, and results repeat bit for
    bit. The last dimension of weights and masks must have stride 1; the others are free. The
    arguments are those of `reference.masked_linear`.

    Args:
        x: [G, R, K], one task per group; float32, float16 or bfloat16.
        weight: [N, K], in float32 or the dtype of x.
        bias: [N] or None, likewise.
        weight_bits: int32 [T, N, ceil(K / 32)], the masks of all tasks; or None where every weight
            and bias is active.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias or without masks.
        task_ids: int64 [G], the task of each group, below T; ids may repeat. A GPU does not check
            them. Not read without masks.
        relu: apply max(0, y) to the output.
        group_gradients: tensors [G, N, K] and [G, N] (None without a bias) to which the backward
            pass writes the gradient of each group by itself, or [1, N, K] and [1, N], to which it
            writes their sum; weight and bias then get none.
        queue: where the gradients of groups or their sums wait for those of other layers, until its
            `finish` is called; None if none are to wait.

    Returns:
        [G, R, N], in the dtype of x (under autocast, in the autocast dtype). Sums are in float32;
        products of float32 are in TF32 where PyTorch's own switch says so.

    Raises:
        TypeError: the floating-point types are others.
        ValueError: shapes, strides, devices or integer types do not fit together.
        IndexError: on a CPU, there is no such task.
        BackendUnavailable: there are no fused kernels for the device.
    """
    given = x, weight, bias, weight_bits, bias_bits, task_ids
    layer = operands_of(given, group_gradients)
    y = differentiable((*layer, relu, None, 0.0, None), group_gradients, queue)
    return y if weight_bits is not None else y.view(*x.shape[:2], len(weight))


def operands_of(
    given: tuple[Any, ...], group_gradients: tuple[Tensor, Tensor | None] | None
) -> tuple[Any, ...]:
    """A layer as `harmodt::masked_linear` takes it: with masks, and x in the dtype of autocast.

    Args:
        given: the first six arguments of `masked_linear`.

    Raises:
        TypeError, ValueError: they do not fit together.
    """
    x, weight, bias, weight_bits, bias_bits, task_ids = given
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
    """The batch as one group, or each group if its gradients are wanted, and a mask of all weights.

    Returns:
        [1, G R, K] or [G, R, K], weight_bits, bias_bits and task_ids.

    Raises:
        ValueError: there are masks of the bias alone, or x is no batch of groups.
    """
    if bias_bits is not None:
        raise ValueError("bias_bits is given without weight_bits: give both or neither")
    _check_groups(x)
    by_group = group_gradients and len(group_gradients[0]) == len(x)
    rows = x if by_group else x.flatten(0, 1)[None]
    of_bias = None if bias is None else all_active(bias.shape, x.device)
    return rows, all_active(weight.shape, x.device), of_bias, first_task(len(rows), x.device)


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
        dtype: of the products, if x is made another one.
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
            f"x is {x.dtype}, and the fused masked linear takes float32, float16 or bfloat16; "
            "the reference takes any"
        )
    if weight.dtype not in (torch.float32, dtype):
        raise TypeError(f"weight is {weight.dtype}: it must be float32 or x's {dtype}")
    if bias is not None and bias.dtype not in (torch.float32, dtype):
        raise TypeError(f"bias is {bias.dtype}: it must be float32 or x's {dtype}")
    for name, bits in (("weight_bits", weight_bits), ("bias_bits", bias_bits)):
        if bits is not None and bits.dtype != torch.int32:
            raise ValueError(f"{name} is {bits.dtype}: masks are packed in int32 (pack_bits)")
    if task_ids is None:
        raise ValueError("task_ids is None: masks need the task of each group, int64")
    if task_ids.dtype != torch.int64:
        raise ValueError(f"task_ids is {task_ids.dtype}: it must be int64")
    if (bias is None) != (bias_bits is None):
        raise ValueError("bias and bias_bits go together: give both or neither")


def _check_groups(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [groups, rows, inputs] and has shape {list(x.shape)}")
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
        raise ValueError("group_gradients must hold a bias gradient exactly if there is a bias")
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
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}")


def differentiable(
    operands: tuple[Any, ...],
    group_gradients: tuple[Tensor, Tensor | None] | None,
    queue: WeightGradients | None,
) -> Tensor:
    """`harmodt::masked_linear` of all its operands, with gradients where they are recorded."""
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
        """Its arguments stand one by one, because autograd looks for tensors among them."""
        masks = weight_bits, bias_bits, task_ids
        y = torch.ops.harmodt.masked_linear(x, weight, bias, *masks, relu, residual, drop, seed)
        ctx.save_for_backward(x, weight, *masks, y if relu else None, seed)
        ctx.group_gradients, ctx.queue, ctx.drop = (weight_out, bias_out), queue, drop
        ctx.of_residual = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_bits, bias_bits, task_ids, y, seed = ctx.saved_tensors
        masks, (weight_out, bias_out) = (weight_bits, bias_bits, task_ids), ctx.group_gradients
        # The gradient of x comes last: it takes the memory that the weights' sums have left.
        layer = LayerGradients(dy, y, x, *masks, weight_out, bias_out, ctx.drop, seed)
        of_weights = weight_gradients(ctx, weight, layer)
        dx = d_residual = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.harmodt.masked_linear_input_gradient(
                dy, y, weight, weight_bits, task_ids, x.dtype, ctx.drop, seed
            )
        if ctx.of_residual is not None:
            d_residual = dy.to(ctx.of_residual)
        return dx, *of_weights, *[None] * 4, d_residual, *[None] * 5


def weight_gradients(
    ctx: Any, weight: Tensor, layer: LayerGradients
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias that a layer's backward pass gives to autograd.

    If the layer was told where to write them, autograd gets none, and they may wait in its `queue`.

    Args:
        ctx: of a layer whose second and third arguments are weight and bias.
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
    # Autograd rounds the bias's: it may be of another type than the weight.
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
    # with the dropout and the residual sum that end a branch
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
    # of several layers, in the order of `LayerGradients`; bias_out of those that have a bias
    "(Tensor[] dy, Tensor?[] y, Tensor[] x, Tensor[] weight_bits, Tensor?[] bias_bits, "
    "Tensor[] task_ids, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out, float[] drop, "
    "Tensor?[] seed, Tensor?[] statistics, Tensor?[] affine) -> ()",
    _weight_gradients_fake,
)
