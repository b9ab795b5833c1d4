"""LayerNorm whose gains and biases are masked per task."""

from .module import MaskedLayerNorm
from .operation import masked_layer_norm

__all__ = ["MaskedLayerNorm", "masked_layer_norm"]
