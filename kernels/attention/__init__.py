"""Causal self-attention over the short sequences of a decision transformer."""

from .operation import attention

__all__ = ["attention"]
