"""What workers hold in tests; the workers import this module, so it imports little."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from harmodt.cores import count_cores
from harmodt.workers import Served


class Sum(Served):
    """Adds up what it is given."""

    def __init__(self, start: int = 0):
        self.total = start

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def fail(self, error: BaseException) -> None:
        raise error

    def exit_at_once(self, status: int) -> None:
        os._exit(status)

    def lambda_of(self) -> object:
        return lambda: self.total  # which cannot be sent


class Place(Served):
    """Tells where it is."""

    def modules(self) -> set[str]:
        return set(sys.modules)

    def group(self) -> tuple[int, int, int]:
        return os.getpid(), os.getpgid(0), os.getsid(0)

    def variables(self) -> dict[str, str]:
        return dict(os.environ)

    def cores(self) -> int:
        return count_cores()


class Waiting(Served):
    """Takes its time, with a program that it has started, and leaves a file when it is closed."""

    def __init__(self, file: Path):
        self.file = file

    def wait_for(self, file: Path) -> None:
        while not file.exists():
            time.sleep(0.01)

    def run_long(self) -> None:
        """The program and its own child hold this process's output open."""
        subprocess.run(["sh", "-c", "sleep 60 & echo started; wait"], stdin=subprocess.DEVNULL)

    def close(self) -> None:
        self.file.write_text("closed")


class Step(Served):
    """Makes files, or waits for one."""

    def do(self, request: tuple[int, Path | None, Path | None]) -> None:
        _, awaited, made = request
        while awaited is not None and not awaited.exists():
            time.sleep(0.01)
        if made is not None:
            made.touch()


class Unmade(Served):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("no such thing")
