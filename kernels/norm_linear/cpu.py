"""Passes the tensors of a masked LayerNorm and the linear layer after it to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..masked_layer_norm import cpu as layer_norm
from ..masked_linear import cpu as linear
from ..native.library import library, pointer, threads


def norm_linear(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    gain_bits: Tensor,
    shift_bits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    epsilon: float,
    relu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `harmodt::norm_linear`, with the arguments of its schema."""
    linear.check_dtype(dtype)
    x, weight, bias = x.contiguous(), weight.float(), None if bias is None else bias.float()
    groups, rows, inputs = x.shape
    y = x.new_empty(groups, rows, len(weight))
    statistics, affine = x.new_empty(groups, rows, 2), x.new_empty(groups, 2, inputs)
    shape = linear.shape_of(x, weight, y, weight_bits, bias_bits, task_ids, dtype)
    norm = layer_norm.shape_of(x, gain_bits, shift_bits, task_ids, epsilon)
    library().harmodt_norm_linear(
        byref(shape),
        byref(norm),
        *map(pointer, (x, gain, shift, weight, bias)),
        relu,
        *map(pointer, (y, statistics, affine)),
        threads(),
    )
    return y.to(dtype), statistics, affine, layer_norm.no_arrivals(groups)
