from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from harmodt.errors import UserError, describe, going_on, printable, run_command


def ending(error: BaseException, capsys) -> tuple[object, str]:
    """Exit status and standard error of a command that ends with an exception."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    return exit.value.code, capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert ending(UserError("no such task"), capsys) == (2, "error: no such task\n")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full: free some space, then"),
        (errno.EDQUOT, "the disk quota is used up: free some space, then"),
        (errno.EFBIG, "the file is larger than is allowed: raise the limit (ulimit -f), then"),
        (errno.EROFS, "the file system is read-only: choose another path, then"),
        (errno.EACCES, "permission is denied: change its permissions or choose another path"),
        (errno.ENAMETOOLONG, "the name is too long: choose another path"),
        (errno.ENOTDIR, "a file is where a folder should be: move it away or"),
        (errno.EEXIST, "there is a file of that name already: move it away or"),
        (errno.ENOENT, "it does not exist, or was moved away: put it back"),
        (errno.EMFILE, "too many files are open: raise the limit (ulimit -n)"),
        (errno.ESTALE, "the network file system lost it: check that it is mounted"),
        (errno.ENOTCONN, "the network file system is not connected: check that it is mounted"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_status_2(number, reason, capsys):
    status, text = ending(OSError(number, "", "data/a.npy"), capsys)
    assert status == 2 and text.count("\n") == 1
    assert text.startswith(f"error: data/a.npy: {reason}")
    assert text.endswith("then give the same command again\n")
    two = OSError(number, "", "a", None, "b")
    assert ending(two, capsys)[1].startswith(f"error: a and b: {reason}")


def refused_reads(number):
    """Readers of other people's files, which an error meets inside."""
    from harmodt.data.importers.arrays import reading
    from harmodt.data.importers.minari import _readable

    for reader in (reading(Path("data/a.npz"), "damaged: remove it"), _readable("data/a.npz")):
        with pytest.raises((OSError, UserError)) as refused, reader:
            raise OSError(number, os.strerror(number))
        yield describe(refused.value)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_refuses_to_an_importer_is_no_damage(number):
    _, here = describe(OSError(number, "", "data/a.npz")).split(": ", 1)
    assert list(refused_reads(number)) == 2 * [f"data/a.npz: {here}"]


def test_how_to_go_on_is_said_by_whoever_knows_it_first(capsys):
    def fail():
        with going_on("give up"), going_on("go on with: python -m x"):
            raise OSError(errno.ENOSPC, "")

    with pytest.raises(SystemExit):
        run_command(fail)
    printed = capsys.readouterr().err
    assert printed == "error: the disk is full: free some space, then go on with: python -m x\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.empty(2**62, np.int8),
        lambda: np.empty((2**40, 2**40)),
        lambda: torch.empty(2**60),
        lambda: torch.empty(2**40, 2**40),
        lambda: torch.empty(2**80),
        lambda: bytearray(2**62),
    ],
)
def test_a_size_that_cannot_be_allocated_is_one_line_and_status_2(make, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(make)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("error: there is not enough memory")
    assert "choose smaller sizes" in printed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a[/b]c λ é 😀 \\", "a[/b]c λ é 😀 \\"),
        ("\x1b]0;title\x07\x1b[31m", r"\x1b]0;title\x07\x1b[31m"),
        ("\x9b1m\r\n\t\x00\x7f", r"\x9b1m\r\n\t\x00\x7f"),
        ("a\u202etxt.exe\u2066\u200b\u2028", r"a\u202etxt.exe\u2066\u200b\u2028"),
        (os.fsdecode(b"\xff"), r"\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown, capsys):
    assert printable(Path(text) if "\0" not in text else text) == shown
    assert ending(UserError(text), capsys) == (2, f"error: {shown}\n")


def test_an_interruption_is_status_130(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_other_errors_are_bugs_whose_traceback_is_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, text = ending(ZeroDivisionError("by\nzero"), capsys)
    (file,) = tmp_path.iterdir()
    assert status == 1 and text.count("\n") == 1
    assert text.startswith("error: unexpected ZeroDivisionError (by) in `")
    assert f"report this error with the traceback in {file}. " in text
    assert text.endswith("To try again, give the same command again\n")
    written = file.read_text()
    assert "Traceback (most recent call last)" in written and "in main\n" in written
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    status, text = ending(ZeroDivisionError(), capsys)
    assert status == 1 and "Traceback (most recent call last)" in text


@pytest.mark.parametrize(("version", "old"), [("1.26.4", True), ("2.0.0", False)])
def test_a_package_that_is_too_old_is_named(tmp_path, version, old):
    """Another NumPy on the path, as far as its description goes."""
    folder = tmp_path / f"numpy-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: numpy\nVersion: {version}\n")
    command = [sys.executable, "-m", "harmodt.data", "info", str(tmp_path / "none")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    wanted = f"error: numpy {version} in {tmp_path} is too old: HarmoDT needs 2.0 or newer; take"
    assert result.stderr.startswith(wanted) == old
    assert ("there is no store" in result.stderr) != old


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_shown_whatever_the_encoding(encoding):
    command = [sys.executable, "-m", "harmodt.train", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 0 and result.stderr == b""
    assert b"\\u03bb" in result.stdout


@pytest.mark.parametrize("module", ["collect", "data", "train", "evaluate"])
def test_an_early_interruption_leaves_no_traceback(module):
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", f"harmodt.{module}", "--help"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        printed = b""
        for line in process.stderr:  # one for each import that is done
            if b"numpy" in line:
                process.send_signal(signal.SIGINT)
                break
        printed = process.stderr.read()
    assert process.returncode == -signal.SIGINT
    assert b"Traceback" not in printed and b"KeyboardInterrupt" not in printed


def test_a_reader_that_goes_away_is_no_error():
    program = """
from harmodt.errors import run_command
def main():
    while True:
        print("x" * 1000)
run_command(main)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
