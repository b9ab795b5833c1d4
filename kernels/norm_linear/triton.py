"""A masked LayerNorm and the linear layer after it: the masked linear layer's kernel does both."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked_linear import triton as layer


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
    groups, rows, inputs = x.shape
    norm = layer.Norm(
        gain=gain,
        shift=shift,
        gain_bits=gain_bits,
        shift_bits=shift_bits,
        gain_task_stride=gain_bits.stride(0),
        shift_task_stride=shift_bits.stride(0),
        epsilon=epsilon,
        statistics=torch.empty(groups, rows, 2, dtype=torch.float32, device=x.device),
        affine=torch.empty(groups, 2, inputs, dtype=torch.float32, device=x.device),
        # The kernel sets the counters to 0. Without rows it does not run, so they start at 0.
        arrivals=(torch.empty if rows else torch.zeros)(groups, dtype=torch.int32, device=x.device),
    )
    masks = weight_bits, bias_bits, task_ids
    y = layer.masked_linear(x, weight, bias, *masks, relu, norm=norm, dtype=dtype)
    return y, norm.statistics, norm.affine, norm.arrivals
