"""A masked LayerNorm and the masked linear layer after it, in one operation."""

from .operation import norm_linear

__all__ = ["norm_linear"]
