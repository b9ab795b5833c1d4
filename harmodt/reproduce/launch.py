"""Becomes another command, which is told to end when the process that began it has ended.

    python -m harmodt.reproduce.launch PARENT MODULE ARGUMENT...

However that process ended, if only by SIGKILL: what it began saves a checkpoint and ends as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); it outlives execve


def main() -> None:
    """The command line."""
    parent, module, *arguments = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent):  # it ended before the call
        sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main()
