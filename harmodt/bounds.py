"""Bounds of settings, declared where the settings are: `Annotated[int, Bounds(1)]`."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least and most that a number may be, both included."""

    least: float
    most: float = float("inf")

    def __str__(self) -> str:
        bounded = self.most < float("inf")
        return f"{self.least} to {self.most}" if bounded else f"at least {self.least}"


def check_bounds(settings: Any) -> None:
    """Refuse a dataclass with a number outside its bounds; None is always inside.

    Raises:
        UserError: names the setting's flag and what it may be.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for bounds in getattr(hint, "__metadata__", ()):
            if not isinstance(bounds, Bounds) or value is None:
                continue
            if not bounds.least <= value <= bounds.most:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {value}: give {bounds}")
