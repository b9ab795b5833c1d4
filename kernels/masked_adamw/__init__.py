"""AdamW restricted to the weights that are active in a step."""

from .operation import masked_adamw

__all__ = ["masked_adamw"]
