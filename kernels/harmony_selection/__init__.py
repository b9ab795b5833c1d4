"""Selection of the weights that enter and leave each task's mask."""

from .reference import HarmonyRule, Importance, select_harmony

__all__ = ["HarmonyRule", "Importance", "select_harmony"]
