"""Selection of the weights that enter and leave each task's mask."""

from .operation import move_weights, select_harmony
from .reference import (
    HarmonyRule,
    Importance,
    NotFinite,
    Selection,
    UpdateRefused,
    count_signs,
)

__all__ = [
    "HarmonyRule",
    "Importance",
    "NotFinite",
    "Selection",
    "UpdateRefused",
    "count_signs",
    "move_weights",
    "select_harmony",
]
