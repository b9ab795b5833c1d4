"""Linear layer with a mask per task on its weight and bias."""

from .gradients import WeightGradients
from .module import MaskedLinear
from .operation import masked_linear

__all__ = ["MaskedLinear", "WeightGradients", "masked_linear"]
