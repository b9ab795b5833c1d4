"""AdamW on the weights that are active in a step."""

from .operation import masked_adamw
from .reference import rates_of_step

__all__ = ["masked_adamw", "rates_of_step"]
