"""The masked LayerNorm as PyTorch sees it: the registered operations and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import words_for
from ..registration import register


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    *,
    epsilon: float = 1e-5,
    group_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LayerNorm under the mask of each group's task, fused for a CPU.

    The same as `reference.masked_layer_norm` in one pass over x, in float32; weight and bias get
    no gradient where `group_gradients` is given.

    Raises:
        TypeError: x, weight or bias is not float32, bits not int32 or task_ids not int64.
        ValueError: shapes or strides do not fit together.
        IndexError: there is no such task.
        BackendUnavailable: there is no such kernel for the device.
    """
    for names, tensors, dtype in (
        (("x", "weight", "bias"), (x, weight, bias), torch.float32),
        (("weight_bits", "bias_bits"), (weight_bits, bias_bits), torch.int32),
        (("task_ids",), (task_ids,), torch.int64),
    ):
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.dtype != dtype:
                raise TypeError(f"{name} is {tensor.dtype}, and the fused LayerNorm takes {dtype}")
    size, words = x.shape[-1], words_for(x.shape[-1])
    tasks = len(weight_bits)
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("weight", weight, (size,)),
        ("bias", bias, (size,)),
        ("weight_bits", weight_bits, (tasks, words)),
        ("bias_bits", bias_bits, (tasks, words)),
        ("task_ids", task_ids, (len(x),)),
    ]
    for name, tensor, shape in expected:
        if x.dim() != 3 or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: with x {list(x.shape)}, which must be "
                f"[groups, rows, size], it must be {list(shape)}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1")
    d_weight, d_bias = group_gradients or (None, None)
    return _MaskedLayerNorm.apply(
        x, weight, bias, weight_bits, bias_bits, task_ids, epsilon, d_weight, d_bias
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
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> Tensor:
        y, statistics = torch.ops.harmodt.masked_layer_norm(
            x, weight, bias, weight_bits, bias_bits, task_ids, epsilon
        )
        ctx.save_for_backward(x, statistics, weight, weight_bits, bias_bits, task_ids)
        ctx.group_gradients = d_weight, d_bias
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = torch.ops.harmodt.masked_layer_norm_gradient(dy, *ctx.saved_tensors)
        d_weight, d_bias = ctx.group_gradients
        if d_weight is not None:
            d_weight.copy_(dw)
            d_bias.copy_(db)
            return dx, *[None] * 8
        return dx, dw.sum(0), db.sum(0), *[None] * 6


def _masked_layer_norm_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:2], 2)


def _gradient_fake(dy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, size = dy.shape[0], dy.shape[2]
    return torch.empty_like(dy), dy.new_empty(groups, size), dy.new_empty(groups, size)


register(
    __package__,
    "masked_layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor weight_bits, Tensor bias_bits, "
    "Tensor task_ids, float epsilon) -> (Tensor y, Tensor statistics)",
    _masked_layer_norm_fake,
)
register(
    __package__,
    "masked_layer_norm_gradient",
    "(Tensor dy, Tensor x, Tensor statistics, Tensor weight, Tensor weight_bits, "
    "Tensor bias_bits, Tensor task_ids) -> (Tensor dx, Tensor d_weight, Tensor d_bias)",
    _gradient_fake,
)
