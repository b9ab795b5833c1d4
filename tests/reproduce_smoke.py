"""All of table2 at the budget smoke, killed on the way: `python tests/reproduce_smoke.py FOLDER`.

SIGKILL in turn to the reproduction and to the run that is under way, at moments drawn by a seed;
after each the same command is given again. Prints when it was killed and how long it took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from harmodt.files import json_checksum


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for what is written; it must not exist")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, rng = arguments.folder, random.Random(arguments.seed)
    assert not folder.exists(), f"{folder} exists"
    words = [sys.executable, "-m", "harmodt.reproduce", "table2", "--output", str(folder)]
    began = time.monotonic()
    for number in range(arguments.kills):
        with subprocess.Popen(words) as process:
            while under_way(process.pid) is None:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 20))
            child = under_way(process.pid) if number % 2 else None
            os.kill(child or process.pid, signal.SIGKILL)
            what = "a job" if child else "the reproduction"
            print(f"killed {what} after {time.monotonic() - began:.0f} s", flush=True)
            process.terminate()
    last = subprocess.run(words)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    content = json.loads((folder / "table2.json").read_text())
    intact = content.pop("crc32") == json_checksum(content)
    print(f"{seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of computing")
    assert last.returncode == 0 and intact
    assert all(row["seeds"] == [0] for row in content["rows"]), "results are missing"


def under_way(parent: int) -> int | None:
    """The process of the job that a reproduction has begun, if there is one."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0]) if children else None


if __name__ == "__main__":
    main()
