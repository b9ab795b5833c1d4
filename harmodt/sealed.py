"""Files that carry a checksum: each kind is read, checked and refused here, in the same words.

A sealed object is a JSON object whose last entry, `crc32`, is the checksum of the rest. A sealed
line is the same on one line of a file of many. The checksum of a binary file stands in the file
that names it.

A file is damaged where its content proves it: its checksum fails, or it is not of its form. What
the system refuses (no permission, too many open files, a disk error) is an OSError, which proves
nothing about the file: it passes through, and `errors.py` words it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .errors import UserError
from .files import checksum, json_checksum, read_bytes, write_json

Content = TypeVar("Content")

RESTORE = "restore it from a copy"

_CRC = ', "crc32": "'
"""Stands between the rest of a sealed line and its checksum."""


@dataclass(frozen=True)
class Kind:
    """A kind of JSON file.

    Attributes:
        name: follows "is not" where a file is of another kind: "the description of a run".
        format: what the file's entry of that name says; None where the kind has no such entry.
        version: the version that is written.
        also_reads: earlier versions that are still read.
        instead: an order that says which file or folder to name in place of another kind's.
        again: an order that says how to make a file of another version again.
        remedy: an order that says what to do about a damaged file.
        sealed: whether the object holds its own checksum.
    """

    name: str
    format: str | None
    version: int
    instead: str
    again: str
    remedy: str = RESTORE
    sealed: bool = True
    also_reads: tuple[int, ...] = ()


def damaged(what: object, why: object, remedy: str = RESTORE) -> UserError:
    """The error of a file, or of a part of one, whose content proves that it is damaged.

    Args:
        what: the file's path, or words that contain it.
        why: how it is known.
        remedy: an order to the person.
    """
    return UserError(f"{what} is damaged ({why}): {remedy}")


def convert(
    what: object,
    values: Any,
    kind: type[Content],
    remedy: str = RESTORE,
    dec_hook: Callable[[type, Any], Any] | None = None,
) -> Content:
    """JSON values as a type of msgspec's or a dataclass.

    Args:
        what, remedy: as in `damaged`.
        dec_hook: as in `msgspec.convert`.

    Raises:
        UserError: the values do not fit the type.
    """
    try:
        return msgspec.convert(values, kind, dec_hook=dec_hook)
    except (ValueError, RecursionError) as error:  # msgspec's own error is a ValueError
        raise damaged(what, error, remedy) from None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object with its checksum as its last entry, whole or not at all."""
    write_json(path, {**content, "crc32": json_checksum(content)})


def read(path: Path, content: type[Content], kind: Kind) -> Content:
    """Read an object of a kind.

    Args:
        content: the type that the object must fit; `dict` keeps every entry but the checksum.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        OSError: the system refuses to read it.
        UserError: it is no regular file, damaged, of another kind or of another version.
    """
    try:
        found = json.loads(read_bytes(path), parse_constant=_finite, parse_float=_finite)
        seal = found.pop("crc32", None) if kind.sealed and isinstance(found, dict) else None
        actual = json_checksum(found) if kind.sealed else None
    except (ValueError, RecursionError) as error:  # of JSON that is nested too deep
        raise damaged(path, f"it is no JSON: {error}", kind.remedy) from None
    if not isinstance(found, dict) or found.get("format") != kind.format:
        raise UserError(f"{path} is not {kind.name}: {kind.instead}")
    version = found.get("version")
    if version not in (readable := (*kind.also_reads, kind.version)):
        versions = f"version{'s' if kind.also_reads else ''} {' and '.join(map(str, readable))}"
        raise UserError(
            f"{path} is of version {version!r:.20}, and this HarmoDT reads {versions}: "
            f"{kind.again}, or use the HarmoDT that wrote it"
        )
    if seal != actual:
        raise damaged(path, "its checksum fails", kind.remedy)
    return convert(path, found, content, kind.remedy)


def read_binary(path: Path, recorded: str, remedy: str) -> bytes:
    """Read a file whose checksum is recorded elsewhere.

    Args:
        recorded: its checksum.
        remedy: as in `damaged`.

    Raises:
        OSError: the system refuses to read it.
        UserError: it is missing, no regular file, or its checksum fails.
    """
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {remedy}") from None
    check(path, checksum(content), recorded, remedy)
    return content


def check(what: object, actual: str, recorded: str, remedy: str) -> None:
    """Raise the UserError of a damaged file where its checksum is not the recorded one."""
    if actual != recorded:
        raise damaged(what, "its checksum fails", remedy)


def seal_line(values: Mapping[str, Any]) -> str:
    """An object as a sealed line.

    The checksum is of the rest as text, and stands last so that the rest can be had as text.
    """
    text = json.dumps(values)
    return f'{text[:-1]}{_CRC}{checksum(text.encode())}"}}\n'


def read_lines(path: Path, content: type[Content], remedy: str) -> list[tuple[str, Content, bytes]]:
    """Read a file of sealed lines; leaves out a last line that a kill cut short.

    Args:
        content: the type that each line must fit.
        remedy: what to do about a damaged line.

    Returns:
        For each line its place, as words that contain the path, its values and its bytes.

    Raises:
        OSError: there is no such file, or the system refuses to read it.
        UserError: it is no regular file, or a line is damaged.
    """
    *lines, _cut_short = read_bytes(path).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {path}"
        text, _, seal = line.partition(_CRC.encode())
        check(where, f'{checksum(text + b"}")}"}}', seal.decode("utf-8", "replace"), remedy)
        try:
            values = json.loads(text + b"}")
        except (ValueError, RecursionError) as error:
            raise damaged(where, f"it is no JSON: {error}", remedy) from None
        found.append((where, convert(where, values, content, remedy), line + b"\n"))
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is not finite")
    return float(text)
