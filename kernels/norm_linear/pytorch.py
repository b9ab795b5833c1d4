"""The fastest form of a masked LayerNorm and the linear layer after it in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..masked_layer_norm.pytorch import masked_layer_norm
from ..masked_linear.pytorch import masked_linear
from .reference import norm_then_linear


def norm_linear(*operands: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """`norm_then_linear` with the operations of this implementation."""
    return norm_then_linear(masked_layer_norm, masked_linear, *operands, **settings)
