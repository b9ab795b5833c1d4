"""A run that is killed at its writes, in turn: `python kill_at_writes.py STORE FOLDER EVERY`.

Written so that modules are imported once: every run is a fork, which dies on the spot, nothing
closed and nothing cleaned up, right before or after its n-th write.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from runs import assert_same, play, small_flags

from harmodt import train
from harmodt.training import run as run_module

WRITES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "write")
MORE = (
    *("--steps", "9", "--keep-checkpoints", "1", "--checkpoint-every", "3"),
    *("--evaluate-every", "3", "--evaluation-episodes", "1"),
)


def main(store: str, folder: Path, every: int) -> None:
    run_module.play = play
    arguments = ["--data", store, *small_flags(), *MORE, "--output"]
    assert fork([*arguments, str(folder / "whole")]) == 0
    killed = 0
    while True:
        run = folder / f"cut{killed}"
        if fork([*arguments, str(run)], killed * every) == 0:
            break
        killed += 1
        again = ["--resume", str(run)] if (run / "run.json").exists() else [*arguments, str(run)]
        assert fork(again, 7) in (0, 9)  # and once more
        again = ["--resume", str(run)] if (run / "run.json").exists() else [*arguments, str(run)]
        assert fork(again) == 0, run
        assert_same(folder / "whole", run)
        assert not list(run.rglob(".*"))  # not even a temporary file
    assert killed
    print(killed)


def fork(arguments: list[str], kill_at: int | None = None) -> int:
    """The exit status of a run; 9 where it was killed at a write of that number, from 0."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kill_at is not None:
        die_at(kill_at)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        train.main(arguments)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def die_at(number: int) -> None:
    """Die at the write of that number: even ones before, odd ones after it is done."""
    count = 0

    def wrap(function: Callable) -> Callable:
        def write(*arguments, **options):
            nonlocal count
            before, after = count == number, count + 1 == number
            count += 2
            if before:
                os._exit(9)
            try:
                return function(*arguments, **options)
            finally:
                if after:
                    os._exit(9)

        return write

    for name in WRITES:
        setattr(os, name, wrap(getattr(os, name)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
