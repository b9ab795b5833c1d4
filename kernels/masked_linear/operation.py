"""The fused masked linear layer: its public function, checks and registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..bits import words_for
from ..operands import Dtypes, check
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
        Products of float32 are in TF32 if PyTorch's own switch says so. `Backend.precision` sets
        it.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes, strides or devices do not fit together.
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

    Without masks, the batch becomes one group, unless each group's gradient is needed. Under
    autocast, x is converted.

    Args:
        arguments: the first six arguments of `masked_linear`.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
    """
    x, weight, bias, weight_bits, bias_bits, task_ids = arguments
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    check_operands(x, weight, bias, weight_bits, bias_bits, task_ids, group_gradients)
    if weight_bits is None:
        task_ids = None
        if group_gradients is None or len(group_gradients[0]) == 1:
            x = x.flatten(0, 1)[None]
    return x, weight, bias, weight_bits, bias_bits, task_ids


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    group_gradients: tuple[Tensor, Tensor | None] | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError if the arguments of `masked_linear` do not fit together.

    Args:
        dtype: the dtype of the products, if it is not the dtype of x.
    """
    device = x.device
    check("x", x, FLOATS, (None, None, None), device)
    groups, _, inputs = x.shape
    if groups == 0:
        raise ValueError("x has no groups: give at least one")
    floats = tuple(dict.fromkeys((torch.float32, dtype or x.dtype)))
    check("weight", weight, floats, (None, inputs), device, layout="rows", beside=[("x", x)])
    outputs = len(weight)
    operands: list[tuple[str, Tensor | None, Dtypes, tuple[int, ...]]] = [
        ("bias", bias, floats, (outputs,))
    ]
    if weight_bits is not None:
        _check_complete(bias, bias_bits, task_ids)
        tasks = len(weight_bits)
        operands += [
            ("weight_bits", weight_bits, torch.int32, (tasks, outputs, words_for(inputs))),
            ("bias_bits", bias_bits, torch.int32, (tasks, words_for(outputs))),
            ("task_ids", task_ids, torch.int64, (groups,)),
        ]
    elif bias_bits is not None:
        raise ValueError("bias_bits is given without weight_bits: give both or neither")
    if group_gradients is not None:
        weight_out, bias_out = group_gradients
        if (bias is None) != (bias_out is None):
            raise ValueError(
                "group_gradients must have a tensor for the bias if and only if bias is given"
            )
        sums = 1 if len(weight_out) == 1 else groups
        operands += [
            ("group_gradients[0]", weight_out, FLOATS, (sums, outputs, inputs)),
            ("group_gradients[1]", bias_out, FLOATS, (sums, outputs)),
        ]
    beside = [("x", x), ("weight", weight)]
    for name, tensor, dtypes, shape in operands:
        if tensor is not None:
            check(name, tensor, dtypes, shape, device, layout="rows", beside=beside)


def _check_complete(bias: Tensor | None, bias_bits: Tensor | None, task_ids: Tensor | None) -> None:
    if task_ids is None:
        raise ValueError("task_ids is None: masks need the task of each group, int64")
    if (bias is None) != (bias_bits is None):
        raise ValueError("bias and bias_bits belong together: give both or neither")


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
        weight_bits: Tensor | None,
        bias_bits: Tensor | None,
        task_ids: Tensor | None,
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
        ctx.has_bias = bias is not None
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @differentiable_once
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
    d_bias = d_weight.new_empty(1, len(weight)) if ctx.has_bias else None
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
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_bits, Tensor? bias_bits, "
    "Tensor? task_ids, bool relu, Tensor? residual=None, float drop=0.0, Tensor? seed=None) "
    "-> Tensor",
    _masked_linear_fake,
)
register(
    __package__,
    "masked_linear_input_gradient",
    "(Tensor dy, Tensor? y, Tensor weight, Tensor? weight_bits, Tensor? task_ids, "
    "ScalarType dtype, float drop=0.0, Tensor? seed=None) -> Tensor",
    _input_gradient_fake,
)
register(
    __package__,
    "masked_linear_weight_gradients",
    # Lists over layers, in the order of `LayerGradients`. PyTorch has no list of tensors, some of
    # them None, that an operation changes: so `bias_out` lists the layers with a bias only, and
    # `has_bias` says which these are.
    "(Tensor[] dy, Tensor?[] y, Tensor[] x, Tensor?[] weight_bits, Tensor?[] bias_bits, "
    "Tensor?[] task_ids, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out, float[] drop, "
    "Tensor?[] seed, Tensor?[] statistics, Tensor?[] affine, bool[] has_bias) -> ()",
    _weight_gradients_fake,
)
