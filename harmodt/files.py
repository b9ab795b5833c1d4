"""Files that are written whole or not at all, and directories with one owner at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError, printable

LOCK = ".lock"
"""The file that names the owner of a directory while a command writes to the directory."""


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path`, sync it to the disk and rename it to `path`.

    After a crash, or if the disk is full, `path` still has its complete old content.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """The temporary file that this process writes and then renames to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished file to the disk, then rename it. It replaces any file of that name."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def clear_temporaries(path: Path) -> None:
    """Delete temporary files for `path`, except files of processes that still run."""
    for file in path.parent.glob(f"{glob.escape(f'.{path.name}.')}*.tmp"):
        process = file.name[len(path.name) + 2 : -len(".tmp")]
        if re.fullmatch("[0-9]{1,9}", process) and not _lives(int(process)):
            file.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomic(path, lambda file: file.write(content))


def check_writable(directory: Path) -> None:
    """Check that files can be written into a directory, which may be missing. Leave nothing there.

    Raises:
        OSError: the directory cannot be made, or files cannot be written into it.
    """
    with _made(directory):
        clear_temporaries(directory / "check")
        file = temporary_path(directory / "check")
        try:
            file.write_bytes(b"0")
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a missing directory for a block; delete it afterwards if it stayed empty."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for made in missing:
                made.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_bytes(path: Path) -> bytes:
    """Read a regular file. Refuse pipes, devices and directories.

    Raises:
        UserError: the path is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait without O_NONBLOCK
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file: move it away and restore the file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def names_in(directory: Path) -> list[str]:
    """The sorted names in a directory; an empty list if there is no directory.

    Raises:
        OSError: the system refuses to read the directory. `Path.exists` and `Path.glob` may hide
            such an error and return nothing.
    """
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def checksum(content: bytes) -> str:
    """The CRC-32 of some bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def json_checksum(content: Any) -> str:
    """The checksum of a JSON value; spaces and the order of keys do not affect it."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def replace_directory(temporary: Path, final: Path) -> None:
    """Rename a finished directory to its final name. It replaces a directory of that name."""
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
    """Delete a directory. A kill leaves the complete directory, or nothing under its name."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # left by an earlier kill
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a directory while the block runs. If the directory is missing, make it.

    The lock ends with its process. If the directory was made here and stayed empty, it is deleted
    again.

    Raises:
        UserError: another process owns the directory.
    """
    path = directory / LOCK
    with _made(directory):
        descriptor = _lock(path)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path) -> int:
    """Open and lock a file. The lock ends when the descriptor is closed, also by a kill.

    If the file system has no locks, print a warning and return the file without a lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode("ascii", "replace") or "that has just begun"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is in use by another command, process {owner}: wait until it has "
                "ended, or end it"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _warn_of_no_locks(path.parent)
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last owner has deleted the file: try again with a new one


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of `flock` on file systems without locks: Lustre, some network mounts."""

_warned = False


def _warn_of_no_locks(directory: Path) -> None:
    """Warn that no lock keeps other commands out. Each process warns only once."""
    global _warned
    if not _warned:
        _warned = True
        print(
            f"warning: the file system of {printable(directory)} has no locks (flock): make sure "
            "that no other command writes there at the same time",
            file=sys.stderr,
        )
