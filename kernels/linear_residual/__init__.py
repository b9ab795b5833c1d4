"""The masked linear layer that ends a residual branch, with dropout and the residual sum."""

from .operation import linear_residual

__all__ = ["linear_residual"]
