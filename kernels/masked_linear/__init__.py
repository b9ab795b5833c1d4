"""Linear layer whose weights are masked per task."""

from .gradients import WeightGradients
from .module import MaskedLinear
from .operation import masked_linear

__all__ = ["MaskedLinear", "WeightGradients", "masked_linear"]
