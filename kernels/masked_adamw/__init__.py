"""AdamW on the weights that are active in a step."""

from .operation import masked_adamw
from .optimizer import MaskedAdamW
from .reference import lr_and_corrections_at

__all__ = ["MaskedAdamW", "lr_and_corrections_at", "masked_adamw"]
