"""AdamW restricted to the weights that are active in a step."""

from .reference import clip_gradient, masked_adamw

__all__ = ["clip_gradient", "masked_adamw"]
