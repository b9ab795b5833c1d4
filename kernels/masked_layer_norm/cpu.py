"""Passes the tensors of the masked LayerNorm to the C library."""

from __future__ import annotations

import functools
from ctypes import byref

import torch
from torch import Tensor

from ..masks import stride_of
from ..native.library import (
    LayerNormShape,
    WeightGradient,
    library,
    pointer,
    threads,
)


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `harmodt::masked_layer_norm`, with the arguments of its schema."""
    x = x.contiguous()
    y, statistics = torch.empty_like(x), x.new_empty(*x.shape[:2], 2)
    shape = shape_of(x, weight_bits, bias_bits, task_ids, epsilon)
    library().harmodt_masked_layer_norm(
        byref(shape), *map(pointer, (x, weight, bias, y, statistics)), threads()
    )
    return y.to(dtype), statistics, no_arrivals(len(x))


@functools.cache
def no_arrivals(groups: int) -> Tensor:
    """Zeros, int32 [G]. Only a GPU needs these counters, to find the last program of a group."""
    with torch.inference_mode(False):
        return torch.zeros(groups, dtype=torch.int32)


def masked_layer_norm_gradient(
    dy: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    _: Tensor,
    weight: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor,
) -> Tensor:
    """Computes `harmodt::masked_layer_norm_gradient`, with the arguments of its schema."""
    dy, x = dy.float().contiguous(), x.contiguous()
    d_residual = None if d_residual is None else d_residual.contiguous()
    dx = torch.empty_like(x)
    out = WeightGradient(
        per_group=len(weight_out) == len(x),
        weight=pointer(weight_out),
        weight_group_stride=weight_out.stride(0),
        bias=pointer(bias_out),
        bias_group_stride=bias_out.stride(0),
    )
    shape = shape_of(x, weight_bits, bias_bits, task_ids)
    library().harmodt_masked_layer_norm_gradient(
        byref(shape),
        *map(pointer, (dy, d_residual, x, statistics, weight, dx)),
        byref(out),
        threads(),
    )
    return dx


def shape_of(
    x: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    epsilon: float = 0.0,
) -> LayerNormShape:
    return LayerNormShape(
        *x.shape,
        0 if weight_bits is None else len(weight_bits),
        pointer(weight_bits),
        stride_of(weight_bits, 0),
        pointer(bias_bits),
        stride_of(bias_bits, 0),
        pointer(task_ids),
        epsilon,
    )
