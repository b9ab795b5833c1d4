"""Linear layer whose weights are masked per task."""

from .module import MaskedLinear
from .operation import masked_linear

__all__ = ["MaskedLinear", "masked_linear"]
