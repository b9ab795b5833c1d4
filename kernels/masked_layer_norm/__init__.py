"""LayerNorm with a mask per task on its weight and bias."""

from .module import MaskedLayerNorm
from .operation import masked_layer_norm

__all__ = ["MaskedLayerNorm", "masked_layer_norm"]
