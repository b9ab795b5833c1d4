from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from harmodt.errors import UserError, run_command


def ending(error: BaseException, capsys) -> tuple[object, str]:
    """Exit status and standard error of a command that ends with an exception."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    return exit.value.code, capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert ending(UserError("no such task"), capsys) == (2, "error: no such task\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_status_2(number, capsys):
    status, text = ending(OSError(number, "full", "data/a.npy"), capsys)
    assert status == 2 and text.count("\n") == 1
    assert "the disk is full while writing data/a.npy" in text


def test_an_interruption_is_status_130(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_other_errors_are_bugs_and_keep_their_traceback():
    def main() -> None:
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        run_command(main)


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
