"""Dataclasses of settings: the types that say what a setting may be, checks, and JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from .errors import UserError, printable

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]

Settings = TypeVar("Settings")


def settings(group: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of every setting of a group and of the groups in it."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value)
        else:
            yield field.name, value


def change(group: Settings, values: Mapping[str, Any]) -> Settings:
    """A copy of a group, and of the groups in it, with other values of the settings it has."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = change(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(group, **changes)  # type: ignore[type-var]


def parse_arguments(kind: Any, arguments: Sequence[str] | None = None, **options: Any) -> Any:
    """`tyro.cli`, whose help and errors show arguments and defaults as a terminal can take them.

    Args:
        kind: the dataclass to make of the arguments, or several.
        arguments: those of the command line by default.
        options: others of tyro's; `default` is an instance of `kind`.
    """
    import tyro  # here, because only commands need it

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return tyro.cli(kind, args=arguments, console_outputs=False, **options)
    except SystemExit:
        if "default" in options:
            shown = {name: _shown(value) for name, value in settings(options["default"])}
            options["default"] = change(options["default"], shown)
        tyro.cli(kind, args=[printable(argument) for argument in arguments], **options)
        raise


def _shown(value: Any) -> Any:
    """A setting as it is printed."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    return type(value)(printable(value)) if isinstance(value, str | Path) else value


def check(group: Any) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: names the setting and what it may be.
    """
    kind: type = type(group)
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            for bounds in _bounds_of(kind)[field.name]:
                for number in values:
                    _check_bounds(field.name, number, bounds)
    if hasattr(group, "check"):
        group.check()


@functools.cache
def _bounds_of(kind: type) -> dict[str, tuple[Meta, ...]]:
    """The bounds of each setting of a group; read once, because reading types takes long."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: tuple(_bounds(hints[field.name])) for field in dataclasses.fields(kind)}


def _bounds(hint: Any) -> Iterator[Meta]:
    """The bounds that a type names, at any depth."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Meta))
    for part in getattr(hint, "__args__", ()):
        yield from _bounds(part)


def _check_bounds(name: str, value: float, bounds: Meta) -> None:
    low = bounds.ge if bounds.gt is None else bounds.gt
    high = bounds.le if bounds.lt is None else bounds.lt
    above = low is None or (value > low if bounds.gt is not None else value >= low)
    below = high is None or (value < high if bounds.lt is not None else value <= high)
    if above and below and math.isfinite(value):
        return
    opening, closing = "(" if bounds.gt is not None else "[", ")" if bounds.lt is not None else "]"
    if high == 1:
        allowed = f"a share in {opening}{low}, {high}{closing}"
    elif high is not None:
        allowed = f"{low} to {high}"
    elif bounds.gt is not None:
        allowed = f"a number above {low}"
    else:
        allowed = f"{low} or more"
    raise UserError(f"{name} is {value}: give {allowed}")


def to_json(group: Any) -> dict[str, Any]:
    """Settings as plain JSON values, a dictionary for each group."""
    values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return {
        name: to_json(value)
        if dataclasses.is_dataclass(value)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in values.items()
    }


def from_json(kind: type[Settings], values: Any, where: str) -> Settings:
    """The inverse of `to_json`: exactly the settings that a group has, of the right types.

    Args:
        kind: the dataclass of the group.
        values: what was read.
        where: named in the error.

    Raises:
        UserError: a setting is missing, unknown, of another type or out of its bounds.
    """
    try:
        group = msgspec.convert(values, kind, dec_hook=_from_text)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise UserError(f"{where} is damaged ({error}): restore it from a copy") from None
    odd = _odd_keys(values, to_json(group))
    if odd:
        raise UserError(
            f"{where} lacks, or has beyond what it should, {', '.join(sorted(odd))}: it was "
            "changed, or written by another version; restore it from a copy or begin again"
        )
    return group


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


def _odd_keys(values: Any, expected: Any, prefix: str = "") -> set[str]:
    """The keys that are missing, or that should not be there, as deep as keys are expected."""
    if not isinstance(values, dict) or not isinstance(expected, dict):
        return set()
    odd = {f"{prefix}{key}" for key in values.keys() ^ expected.keys()}
    both = values.keys() & expected.keys()
    below = (_odd_keys(values[key], expected[key], f"{prefix}{key}.") for key in both)
    return odd.union(*below)
