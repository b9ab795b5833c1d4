"""Linear layer whose weights are masked per task."""

from .reference import masked_linear

__all__ = ["masked_linear"]
