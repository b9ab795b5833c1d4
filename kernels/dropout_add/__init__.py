"""A residual connection around a branch with dropout."""

from .operation import dropout_add

__all__ = ["dropout_add"]
