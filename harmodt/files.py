"""Files that are either written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary sibling: flush, sync, rename.

    After a crash or a full disk the old content of `path` is still there, whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_directory(temporary: Path, final: Path) -> None:
    """Publish a finished directory under its final name, replacing one that is there."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_directory(final.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory; a kill on the way leaves no part of it under its name."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # of an earlier kill
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
