"""The tokens of time steps: a linear layer for each kind, and the time step's embedding."""

from .operation import token_embedding

__all__ = ["token_embedding"]
