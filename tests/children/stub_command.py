"""In place of a training run: `python -m stub_command FILE [--seconds S] [--status N]`.

Writes its process id and how many cores there are for it into FILE.begun, waits, and writes FILE,
or exits with a status. When it is told to end it writes FILE.ended.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from harmodt.cores import count_cores

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path)
parser.add_argument("--seconds", type=float, default=0)
parser.add_argument("--status", type=int, default=0)
arguments = parser.parse_args()


def leave(number: int, _: object) -> None:
    arguments.file.with_suffix(".ended").write_text(str(number))
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, leave)
begun = arguments.file.with_suffix(".tmp")
begun.write_text(f"{os.getpid()} {count_cores()}")
begun.rename(arguments.file.with_suffix(".begun"))
time.sleep(arguments.seconds)
if arguments.status:
    print("error: the stub was told to fail")
    sys.exit(arguments.status)
arguments.file.write_text("done")
