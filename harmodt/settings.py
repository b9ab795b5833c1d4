"""Dataclasses of settings: the types of values, checks, and JSON."""

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
"""The lower bound of a number above 0. msgspec turns `gt=0` into "at least the smallest denormal
number". If the processor flushes denormals to 0 (`devices.prepare_cpu`), this would accept 0."""

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(ge=ABOVE_ZERO)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]

Settings = TypeVar("Settings")


def settings(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every setting in a group and in its subgroups."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value)
        else:
            yield field.name, value


def change(group: Settings, values: Mapping[str, Any]) -> Settings:
    """Copy a group and its subgroups with new values; ignore names that are not settings of the
    group."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = change(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(group, **changes)  # type: ignore[type-var]


def parse_arguments(kind: Any, arguments: Sequence[str] | None = None, **options: Any) -> Any:
    """Call `tyro.cli`. Its help and errors show arguments and defaults as printable text.

    Args:
        kind: the dataclass to make from the arguments, or a union of several.
        arguments: the arguments; by default those of the command line.
        options: other options of `tyro.cli`; `default` is an instance of `kind`.
    """
    import tyro  # here, because only commands need it

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return tyro.cli(kind, args=arguments, console_outputs=False, **options)
    except SystemExit:  # help or an error is due: parse again to print it
        if "default" in options:
            shown = {name: _shown(value) for name, value in settings(options["default"])}
            options["default"] = change(options["default"], shown)
        tyro.cli(kind, args=[printable(argument) for argument in arguments], **options)
        raise


def _shown(value: Any) -> Any:
    """A setting's value with printable text."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    return type(value)(printable(value)) if isinstance(value, str | Path) else value


def check(group: Any) -> None:
    """Refuse invalid settings.

    Raises:
        UserError: a setting is invalid; the error names it and its valid values.
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
    """The type of each setting in a group. It is cached, because reading types takes long."""
    return get_type_hints(kind, include_extras=True)


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Raise UserError if a value has a wrong type, is out of bounds, or is not finite."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        index = re.search(r"`\$\[([0-9]+)\]`", str(error))  # `$[2]`: a tuple's third element
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
    """The valid values of a type, in words; with `one`, the valid elements of a tuple."""
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
    """Settings as plain JSON values, with a dictionary for each group."""
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
    """The inverse of `to_json`. The values must be exactly the settings of the group.

    Args:
        kind: the dataclass of the group.
        values: the JSON values.
        where: the place that the values come from, for the error.

    Raises:
        UserError: a setting is missing or unknown, has a wrong type, or is out of its bounds.
    """
    group = convert(where, values, kind, dec_hook=_from_text)
    odd = _odd_keys(values, to_json(group))
    if odd:
        raise UserError(
            f"{where} has missing or unknown entries ({', '.join(sorted(odd))}): it was changed, "
            "or another version wrote it; restore it from a copy or begin again"
        )
    return group


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


def _odd_keys(values: Any, expected: Any, prefix: str = "") -> set[str]:
    """The missing and the unknown keys of a dictionary and of the dictionaries in it."""
    if not isinstance(values, dict) or not isinstance(expected, dict):
        return set()
    odd = {f"{prefix}{key}" for key in values.keys() ^ expected.keys()}
    both = values.keys() & expected.keys()
    below = (_odd_keys(values[key], expected[key], f"{prefix}{key}.") for key in both)
    return odd.union(*below)
