"""LayerNorm whose gains and biases are masked per task."""

from .operation import masked_layer_norm

__all__ = ["masked_layer_norm"]
