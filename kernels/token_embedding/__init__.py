"""The token embedding: a linear layer for each kind of token, and an embedding of the timestep."""

from .operation import token_embedding

__all__ = ["token_embedding"]
