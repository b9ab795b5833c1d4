"""What a long run holds on to: `python tests/soak.py FOLDER --steps 100000`.

Trains a tiny model, with mask updates, checkpoints, metrics and evaluations, and prints the
process's memory, open files and threads at each tenth of the steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import faults

SIZES = (
    "--embed-dim 16 --layers 1 --heads 1 --context-length 3 --prompt-length 2 --batch-per-task 2 "
    "--tasks-per-step 2 --mask-update-every 100 --log-every 100"
)
COLUMNS = ("step", "MB", "open files", "threads")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for what is written; it must not exist")
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    bench = faults.Bench(arguments.folder.absolute())
    where = bench.fresh("soak")
    tenth = arguments.steps // 10
    words = (
        f"train --data store --output made --device cpu {SIZES} --steps {arguments.steps} "
        f"--evaluate-every {tenth} --checkpoint-every {tenth // 10} --evaluation-episodes 2"
    )
    child = faults.start(words, where)
    print(*(f"{name:>10}" for name in COLUMNS), flush=True)
    checkpoints = where / "made" / "checkpoints"
    for step in range(tenth // 2, arguments.steps, tenth):
        while not list(checkpoints.glob(f"{step:08d}")):
            assert Path(f"/proc/{child}/fd").exists(), faults.end(child, where)
            time.sleep(0.05)
        print(*(f"{value:>10}" for value in (step, *measure(child))), flush=True)
    faults.end(child, where).check(0)


def measure(process: int) -> tuple[int, int, int]:
    """Resident memory in MB, open files and threads of a process."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return int(fields["VmRSS"].split()[0]) // 1000, files, int(fields["Threads"])


if __name__ == "__main__":
    main()
