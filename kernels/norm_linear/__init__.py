"""The masked linear layer behind a masked LayerNorm, in one operation."""

from .operation import norm_linear

__all__ = ["norm_linear"]
