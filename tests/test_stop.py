"""How signals end a run: the first after a checkpoint, a second one at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# A program that waits in `handled` in one of three ways, and prints what it came to.
CHILD = """
import ctypes, sys, time
from harmodt.training import stop as module

module.MOMENT = float(sys.argv[2])
class Telling(module.Stop):
    def _remember(self, number, frame):
        super()._remember(number, frame)
        print("remembered", flush=True)

stop = Telling()
with stop.handled():
    print("waiting", flush=True)
    if sys.argv[1] == "python":
        while True:
            time.sleep(0.01)
    elif sys.argv[1] == "library":  # no handler of Python's is called meanwhile
        lock = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(lock)
    else:
        sys.stdin.readline()
print(stop.signal.name, flush=True)
"""


def start(how: str, moment: float) -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", CHILD, how, str(moment)], text=True, **pipes)
    assert child.stdout.readline() == "waiting\n"
    return child


def first_signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send it and wait until the child has said so."""
    child.send_signal(number)
    while not (line := child.stderr.readline()).startswith(number.name):
        assert line
    assert (
        line == f"{number.name}: saving and ending; a second Ctrl-C or SIGTERM ends this at once\n"
    )


@pytest.mark.parametrize("how", ["python", "library"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_program_that_hangs(how, number):
    with start(how, moment=0.05) as child:
        try:
            first_signal(child, signal.SIGINT)
            time.sleep(0.1)
            child.send_signal(number)
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 128 + number
    assert error.strip() == f"{number.name}: ended at once; what was written to the disk is kept"


@pytest.mark.parametrize(
    ("numbers", "moment"),
    [
        ([signal.SIGINT, signal.SIGINT], 3600),  # one Ctrl-C that comes twice
        ([signal.SIGINT, signal.SIGHUP], 0),  # the terminal is closed after it
    ],
)
def test_another_signal_that_is_no_second_request_changes_nothing(numbers, moment):
    with start("input", moment) as child:
        try:
            first_signal(child, numbers[0])
            # Python would call the handlers of two waiting signals in the order of their numbers.
            assert child.stdout.readline() == "remembered\n"
            child.send_signal(numbers[1])
            assert child.stdout.readline() == "remembered\n"
            out, error = child.communicate("\n", timeout=60)
        finally:
            child.kill()
    assert (child.returncode, out, error.strip()) == (0, "SIGINT\n", "")
