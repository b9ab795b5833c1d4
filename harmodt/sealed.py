"""Writes, reads and checks files that have a checksum, with the same errors for all kinds.

A sealed object is a JSON object whose last entry, `crc32`, is the checksum of the other entries. A
sealed line is such an object on one line; a file can have many lines. The checksum of a binary file
is in another file, which names the binary file.

A file is called damaged only if its content proves it: the checksum or the form is wrong. If the
system refuses to read a file (no permission, too many open files, a disk error), it raises an
OSError. Such an error proves nothing about the file, so readers do not catch it. `errors.py` turns
it into a sentence.
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
"""The text between the other entries of a sealed line and its checksum."""


@dataclass(frozen=True)
class Kind:
    """A kind of JSON file.

    Attributes:
        name: what the file is, as "the description of a run". Errors print it after "is not".
        format: value of the entry "format"; None if the kind has no such entry.
        version: the version that HarmoDT writes.
        also_reads: earlier versions that HarmoDT can still read.
        instead: advice for a file of another kind: the file or folder to name instead.
        again: advice for a file of another version: how to make the file again.
        remedy: advice for a damaged file.
        sealed: whether the object contains its own checksum.
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
    """The error for a damaged file or a damaged part of a file.

    Args:
        what: the file's path, or words that contain it.
        why: the reason that proves the damage.
        remedy: advice to the person.
    """
    return UserError(f"{what} is damaged ({why}): {remedy}")


def convert(
    what: object,
    values: Any,
    kind: type[Content],
    remedy: str = RESTORE,
    dec_hook: Callable[[type, Any], Any] | None = None,
) -> Content:
    """Convert JSON values to a dataclass or another type that msgspec knows.

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
    """Write an object whole or not at all, with its checksum as the last entry."""
    write_json(path, {**content, "crc32": json_checksum(content)})


def read(path: Path, content: type[Content], kind: Kind) -> Content:
    """Read a JSON file of one kind.

    Args:
        content: the type that the object must fit. `dict` keeps all entries except the checksum.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        OSError: the system refuses to read the file.
        UserError: the file is not a regular file, is damaged, or has another kind or version.
    """
    try:
        found = json.loads(read_bytes(path), parse_constant=_finite, parse_float=_finite)
        seal = found.pop("crc32", None) if kind.sealed and isinstance(found, dict) else None
        actual = json_checksum(found) if kind.sealed else None
    except (ValueError, RecursionError) as error:  # RecursionError: the nesting is too deep
        raise damaged(path, f"it is not JSON: {error}", kind.remedy) from None
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
        recorded: the checksum that the file must have.
        remedy: as in `damaged`.

    Raises:
        OSError: the system refuses to read the file.
        UserError: the file is missing, is not a regular file, or has another checksum.
    """
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {remedy}") from None
    check(path, checksum(content), recorded, remedy)
    return content


def check(what: object, actual: str, recorded: str, remedy: str) -> None:
    """Raise the error for a damaged file if its checksum is not the recorded one."""
    if actual != recorded:
        raise damaged(what, "its checksum fails", remedy)


def seal_line(values: Mapping[str, Any]) -> str:
    """Write an object as a sealed line.

    The checksum comes last. It is computed from the text of all other entries, which a reader finds
    before it.
    """
    text = json.dumps(values)
    return f'{text[:-1]}{_CRC}{checksum(text.encode())}"}}\n'


def read_lines(path: Path, content: type[Content], remedy: str) -> list[tuple[str, Content, bytes]]:
    """Read a file of sealed lines. Ignore a last line that a kill cut short.

    Args:
        content: the type that each line must fit.
        remedy: advice for a damaged line.

    Returns:
        For each line its number and path in words, its values and its bytes.

    Raises:
        OSError: there is no such file, or the system refuses to read it.
        UserError: the file is not a regular file, or a line is damaged.
    """
    *lines, _cut_short = read_bytes(path).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {path}"
        text, _, seal = line.partition(_CRC.encode())
        # `seal` is the checksum and the two characters "} that end the line.
        check(where, f'{checksum(text + b"}")}"}}', seal.decode("utf-8", "replace"), remedy)
        try:
            values = json.loads(text + b"}")
        except (ValueError, RecursionError) as error:
            raise damaged(where, f"it is not JSON: {error}", remedy) from None
        found.append((where, convert(where, values, content, remedy), line + b"\n"))
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is not finite")
    return float(text)
