"""The fused masked LayerNorm: its public function, its checks and its registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..bits import words_for
from ..operands import check
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
    check_operands(x, weight, bias, weight_bits, bias_bits, task_ids, group_gradients)
    masks = weight_bits, bias_bits, None if weight_bits is None else task_ids
    out = group_gradients or (None, None)
    return _MaskedLayerNorm.apply(x, weight, bias, *masks, epsilon, dtype or x.dtype, *out)


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    group_gradients: tuple[Tensor, Tensor | None] | None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise TypeError or ValueError if operands of `masked_layer_norm` do not fit together.

    Args:
        names: the caller's names for weight and bias, for the messages.
    """
    device = x.device
    taken = FLOATS if kernels_for(device) == "triton" else (torch.float32,)
    check("x", x, taken, (None, None, None), device)
    groups, _, size = x.shape
    if groups == 0:
        raise ValueError("x has no groups: give at least one")
    operands: list[tuple[str, Any, torch.dtype, tuple[int, ...]]] = [
        (names[0], weight, torch.float32, (size,)),
        (names[1], bias, torch.float32, (size,)),
    ]
    if weight_bits is not None:
        if bias_bits is None or task_ids is None:
            raise ValueError(
                f"{names[0]}_bits needs {names[1]}_bits and task_ids: give all of them or none"
            )
        tasks, words = len(weight_bits), words_for(size)
        operands += [
            (f"{names[0]}_bits", weight_bits, torch.int32, (tasks, words)),
            (f"{names[1]}_bits", bias_bits, torch.int32, (tasks, words)),
            ("task_ids", task_ids, torch.int64, (groups,)),
        ]
    elif bias_bits is not None:
        raise ValueError("bias_bits is given without weight_bits: give both or neither")
    if group_gradients is not None:
        sums = 1 if len(group_gradients[0]) == 1 else groups
        for i, out in enumerate(group_gradients):
            operands.append((f"group_gradients[{i}]", out, torch.float32, (sums, size)))
    for name, tensor, dtype, shape in operands:
        check(name, tensor, dtype, shape, device, layout="rows", beside=[("x", x)])


class _MaskedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_bits: Tensor | None,
        bias_bits: Tensor | None,
        task_ids: Tensor | None,
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
    @differentiable_once
    def backward(
        ctx: Any, dy: Tensor | None, d_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight_out, bias_out = ctx.group_gradients
        if dy is None:  # y is not used
            fill_with_zeros(weight_out, bias_out)
            return d_residual, *[None] * 9
        gradient = torch.ops.harmodt.masked_layer_norm_gradient
        if weight_out is not None:
            return gradient(dy, d_residual, *ctx.saved_tensors, weight_out, bias_out), *[None] * 9
        weight = ctx.saved_tensors[3]
        d_weight, d_bias = (weight.new_empty(1, len(weight)) for _ in range(2))
        dx = gradient(dy, d_residual, *ctx.saved_tensors, d_weight, d_bias)
        return dx, d_weight[0], d_bias[0], *[None] * 7


def fill_with_zeros(*gradients: Tensor | None) -> None:
    """Write the gradient of a layer's parameters if the layer's output is not used."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


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
    "(Tensor x, Tensor weight, Tensor bias, Tensor? weight_bits, Tensor? bias_bits, "
    "Tensor? task_ids, float epsilon, ScalarType dtype) "
    "-> (Tensor y, Tensor statistics, Tensor arrivals)",
    _masked_layer_norm_fake,
)
register(
    __package__,
    "masked_layer_norm_gradient",
    # The GPU kernel counts its programs in `arrivals`, then sets it back to 0.
    "(Tensor dy, Tensor? d_residual, Tensor x, Tensor statistics, Tensor arrivals, Tensor weight, "
    "Tensor? weight_bits, Tensor? bias_bits, Tensor? task_ids, Tensor(a!) weight_out, "
    "Tensor(b!) bias_out) -> Tensor",
    _gradient_fake,
)
