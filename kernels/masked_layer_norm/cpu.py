"""The masked LayerNorm on a CPU: passes tensors to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..native.library import LayerNormShape, library, pointer, pointer_to_ids, threads


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, statistics = torch.empty_like(x), x.new_empty(*x.shape[:2], 2)
    shape = shape_of(x, weight_bits, bias_bits, task_ids, epsilon)
    library().harmodt_masked_layer_norm(
        byref(shape), *map(pointer, (x, weight, bias, y, statistics)), threads()
    )
    return y, statistics


def masked_layer_norm_gradient(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_bits: Tensor,
    bias_bits: Tensor,
    task_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    of_weights, of_biases = (x.new_empty(len(x), x.shape[-1]) for _ in range(2))
    shape = shape_of(x, weight_bits, bias_bits, task_ids)
    library().harmodt_masked_layer_norm_gradient(
        byref(shape),
        *map(pointer, (dy, x, statistics, weight, dx, of_weights, of_biases)),
        threads(),
    )
    return dx, of_weights, of_biases


def shape_of(
    x: Tensor, weight_bits: Tensor, bias_bits: Tensor, task_ids: Tensor, epsilon: float = 0.0
) -> LayerNormShape:
    return LayerNormShape(
        *x.shape,
        pointer(weight_bits),
        weight_bits.stride(0),
        pointer(bias_bits),
        bias_bits.stride(0),
        pointer_to_ids(task_ids, len(weight_bits)),
        epsilon,
    )
