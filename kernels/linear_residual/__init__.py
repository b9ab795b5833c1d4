"""The masked linear layer at the end of a residual branch, with dropout and the residual sum."""

from .operation import linear_residual

__all__ = ["linear_residual"]
