"""What may have happened to a file while nobody looked."""

from __future__ import annotations

import os
import re
from pathlib import Path


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def swapped(path: Path) -> None:
    """With another file of the kind, or of another kind where there is no other."""
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
    same = [p for p in others if p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    other = (same or others or [Path(__file__)])[0]
    path.write_bytes(other.read_bytes())


def of_another_type(path: Path) -> None:
    path.write_bytes(b"[null, 1]\n" if path.suffix.startswith(".json") else b"PK\3\4" * 100)


def of_another_version(path: Path) -> None:
    content = path.read_bytes()
    if path.suffix == ".json":
        content = re.sub(rb'"version": [0-9]+', b'"version": 999', content, count=1)
    elif path.suffix == ".npz":
        content = content.replace(b"NUMPY\1", b"NUMPY\x09")
    else:
        content = content[:6] + bytes([content[6] ^ 9]) + content[7:]
    path.write_bytes(content)


def huge(path: Path) -> None:
    """A number or a length beyond all bounds."""
    content = path.read_bytes()
    if path.suffix.startswith(".json"):
        content = re.sub(rb": [0-9][^,\n}]*", b": 1" + b"0" * 400, content, count=1)
    elif path.suffix == ".safetensors":
        content = b"\xff" * 7 + b"\x7f" + content[8:]
    else:
        content = re.sub(rb"\(([0-9]+),", rb"(9\g<1>0000000000000,", content)
    path.write_bytes(content)


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 9)


def gone(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def link_to_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (
    *(empty, cut, flipped, swapped, of_another_type, of_another_version, huge, nested, binary),
    *(gone, folder_instead, link_to_nothing, link_to_itself, link_to_zeros, pipe),
)
