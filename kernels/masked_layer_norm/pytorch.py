"""The fastest form of the masked LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import with_gradients_in
from . import reference


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
    """The same as `reference.masked_layer_norm`, with the same arguments.

    Without masks it is PyTorch's own layer.
    """
    if weight_bits is None and (group_gradients is None or len(group_gradients[0]) == 1):
        weight, bias = with_gradients_in(group_gradients, weight, bias)
        y = F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
        return y if dtype is None else y.to(dtype), x
    return reference.masked_layer_norm(
        x,
        weight,
        bias,
        weight_bits,
        bias_bits,
        task_ids,
        epsilon=epsilon,
        dtype=dtype,
        group_gradients=group_gradients,
    )
