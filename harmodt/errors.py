"""Prints errors for the person at the keyboard, also the errors of the operating system."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

_AGAIN = "give the same command again"

_CHOOSE = "choose another path"

_SYSTEM = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("the file is larger than is allowed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", _CHOOSE),
    errno.EACCES: ("permission is denied", f"change its permissions or {_CHOOSE}"),
    errno.EPERM: ("the operation is not permitted", f"change its permissions or {_CHOOSE}"),
    errno.ENAMETOOLONG: ("the name is too long", _CHOOSE),
    errno.ENOTDIR: ("a file is where a folder should be", f"move it away or {_CHOOSE}"),
    errno.EEXIST: ("there is a file of that name already", f"move it away or {_CHOOSE}"),
    errno.EISDIR: ("a folder is where a file should be", f"move it away or {_CHOOSE}"),
    errno.ENOTEMPTY: ("the folder is not empty", f"move it away or {_CHOOSE}"),
    errno.ELOOP: ("symbolic links lead in a circle", f"remove them or {_CHOOSE}"),
    errno.ENOENT: ("it does not exist, or was moved away", "put it back"),
    errno.EIO: ("the disk reports an error", "check the disk"),
    errno.EREMOTEIO: ("the disk reports an error", "check the disk"),
    errno.ESTALE: ("the network file system lost it", "check that it is mounted"),
    errno.ENOTCONN: ("the network file system is not connected", "check that it is mounted"),
    errno.ETIMEDOUT: ("the network file system does not answer", "check that it is mounted"),
    errno.EHOSTDOWN: ("the network file system does not answer", "check that it is mounted"),
    errno.ENODEV: ("the device is not there", "check that it is mounted"),
    errno.ENXIO: ("the device is not there", "check that it is mounted"),
    errno.EBUSY: ("another program uses it", "end that program"),
    errno.ENOLCK: ("the file system has no locks", _CHOOSE),
    errno.EOPNOTSUPP: ("the file system cannot do that", _CHOOSE),
    errno.ENOSYS: ("the file system cannot do that", _CHOOSE),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs"),
    errno.EAGAIN: ("no more processes are allowed", "end others or raise the limit (ulimit -u)"),
    errno.ENOMEM: ("there is not enough memory", "end other programs"),
}
"""For each error of the operating system, what happened and what to do about it."""

_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
    "array is too big",
    "Maximum allowed dimension exceeded",
)
"""Messages of PyTorch and NumPy for a size that cannot be allocated."""


class UserError(Exception):
    """A mistake that the person who runs the command can correct.

    The message is one sentence: what is wrong, where (file, key, task) and what to do.
    """


def printable(text: object) -> str:
    """Turn a name, path or message into text that a terminal shows exactly.

    Control characters, bidirectional and other invisible characters, and bytes that are not UTF-8
    become escapes. A person then sees all characters, and no terminal executes them.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Attach advice to the errors of a `with` block.

    Without it, they end with "give the same command again".

    Args:
        how: an instruction to the person, such as "go on with: COMMAND".
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "how_to_go_on"):
            error.how_to_go_on = how  # type: ignore[attr-defined]
        raise


def run_command(main: Callable[[], None]) -> None:
    """Run the `main` function of a command, and print an error as one line.

    The exit status is 2 for an error that a person can correct, 1 for an error of the program,
    whose traceback is written to a file, and 130 for Ctrl-C.
    """
    _print_anything()
    try:
        _check_packages()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # harmodt/__init__.py set it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except BrokenPipeError:  # the reader of the output has ended, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        sentence = describe(error)
        _report(sentence or _describe_unexpected(error))
        sys.exit(2 if sentence else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def describe(error: Exception) -> str | None:
    """The sentence for an error that a person can correct; None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        what, remedy = _SYSTEM[error.errno]
        names = (error.filename, error.filename2)
        paths = [os.fsdecode(name) for name in names if isinstance(name, str | bytes)]
        where = f"{' and '.join(paths)}: " if paths else ""
        return f"{where}{what}: {remedy}, then {_how_to_go_on(error)}"
    if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
        return (
            f"there is not enough memory{_first_line(error)}: choose smaller sizes or end other "
            f"programs, then {_how_to_go_on(error)}"
        )
    return None


def raise_refusal(error: Exception, where: object) -> None:
    """Raise an error again, with the file's name, if the system refused to read the file.

    A refusal does not prove that the file is damaged, so a reader must not say so. This function
    ignores a missing file, because each reader has its own sentence for it.
    """
    if isinstance(error, OSError) and error.errno in _SYSTEM and error.errno != errno.ENOENT:
        error.filename = error.filename or str(where)
        raise error


def _how_to_go_on(error: Exception) -> str:
    return getattr(error, "how_to_go_on", _AGAIN)


def _describe_unexpected(error: Exception) -> str:
    """The sentence for an error of the program. Its traceback is written to a file."""
    command = shlex.join(sys.orig_argv)
    text = f"{command}\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, where = tempfile.mkstemp(prefix="harmodt-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:  # no file can be written, so print the traceback
        print(text, file=sys.stderr)
        where = "the lines above"
    return (
        f"unexpected {type(error).__name__}{_first_line(error)} in `{command}`. All written files "
        f"are kept. Please report this error with the traceback in {where}. To try again, "
        f"{_how_to_go_on(error)}"
    )


def _first_line(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return f" ({first})" if first else ""


def _print_anything() -> None:
    """Print escapes for characters that the terminal's encoding lacks; do not raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_packages() -> None:
    """Refuse packages that are too old, such as an old NumPy on PYTHONPATH.

    Raises:
        UserError: a package is too old; the error names its folder and both versions.
    """
    try:
        requirements = metadata.requires("harmodt") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return
    for requirement in requirements:
        found = re.match(r"([\w.-]+)[^;]*>=([\d.]+)", requirement)
        if found is None or "extra ==" in requirement:
            continue
        name, needed = found.groups()
        with suppress(metadata.PackageNotFoundError):  # importing it will raise an error
            there = metadata.distribution(name)
            if _numbers(there.version) < _numbers(needed):
                raise UserError(
                    f"{name} {there.version} in {there.locate_file('')} is too old: HarmoDT needs "
                    f"{needed} or newer; take that folder out of PYTHONPATH, or give "
                    f"python -m pip install '{name}>={needed}'"
                )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _report(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)
