"""Dataclasses of settings: the types that say what a setting may be, checks, and JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, inspect

from .errors import UserError, printable
from .sealed import convert

ABOVE_ZERO = sys.float_info.min
"""The lowest bound of a number above 0. msgspec takes `gt=0` for the smallest denormal number or
more, and with it 0 where the processor flushes those to zero (`devices.prepare_cpu`)."""

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(ge=ABOVE_ZERO)]
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
    types = _types_of(kind)
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        else:
            _check_value(field.name, value, types[field.name])
    if hasattr(group, "check"):
        group.check()


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    """The type of each setting of a group; read once, because reading types takes long."""
    return get_type_hints(kind, include_extras=True)


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Raise UserError where a value is not of its type or bounds, or a number is not finite."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        index = re.search(r"`\$\[([0-9]+)\]`", str(error))
        wrong = value[int(index[1])] if index else value
    else:
        values = value if isinstance(value, tuple) else (value,)
        infinite = [v for v in values if isinstance(v, float) and not math.isfinite(v)]
        if not infinite:
            return
        wrong = infinite[0]
    allowed = _words(inspect.type_info(kind), one=wrong is not value)
    raise UserError(f"{name} is {wrong}: give {allowed}")


def _words(kind: inspect.Type, one: bool = False) -> str:
    """What a setting of a type may be, or what one of its values may be, if it has several."""
    match kind:
        case inspect.TupleType(item_types=(kind, *others)):
            return _words(kind) if one else f"{1 + len(others)} values, each {_words(kind)}"
        case inspect.VarTupleType(item_type=kind):
            return _words(kind) if one else f"several values, each {_words(kind)}"
        case inspect.UnionType(types=kinds):
            some = (k for k in kinds if not isinstance(k, inspect.NoneType))
            return " or ".join(_words(k, one) for k in some)
        case inspect.LiteralType(values=values):
            return " or ".join(map(str, values))
        case inspect.IntType() | inspect.FloatType():
            return _words_of_number(kind)
        case inspect.StrType():
            return "a text"
        case inspect.BoolType():
            return "true or false"
    return f"a {getattr(kind, 'cls', type(kind)).__name__}"


def _words_of_number(kind: inspect.IntType | inspect.FloatType) -> str:
    above_zero = kind.ge == ABOVE_ZERO
    low = 0 if above_zero else kind.ge
    high = kind.le if kind.lt is None else kind.lt
    opening, closing = "(" if above_zero else "[", "]" if kind.lt is None else ")"
    if high == 1:
        return f"a share in {opening}{low}, {high}{closing}"
    if high is not None:
        return f"{low} to {high}"
    if low is not None:
        return "a number above 0" if above_zero else f"{low} or more"
    return "a whole number" if isinstance(kind, inspect.IntType) else "a finite number"


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
    group = convert(where, values, kind, dec_hook=_from_text)
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
