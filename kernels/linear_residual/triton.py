"""The masked linear layer that ends a residual branch: the kernels of the masked linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked_linear import triton as layer


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    residual: Tensor,
    drop: float,
    seed: Tensor | None,
) -> Tensor:
    """`harmodt::linear_residual`, whose arguments, one by one, are those of its schema."""
    masks = weight_bits, bias_bits, task_ids
    return layer.masked_linear(x, weight, bias, *masks, False, residual, drop, seed)


def linear_residual_input_gradient(
    dy: Tensor,
    weight: Tensor,
    weight_bits: Tensor,
    task_ids: Tensor,
    dtype: torch.dtype,
    drop: float,
    seed: Tensor | None,
) -> Tensor:
    return layer.masked_linear_input_gradient(
        dy, None, weight, weight_bits, task_ids, dtype, drop, seed
    )
