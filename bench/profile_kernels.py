"""Prints a table of the kernels of a training step and of their time, by torch.profiler.

    python bench/profile_kernels.py [--tasks 1 5 50] [--precision bf16 …] [--output profile.json]

The step is that of the path "fused". A host wait is a call in which the host waits until the device
is done. On a CPU, the table shows PyTorch's operations instead of kernels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import ON_GPU, finished, profiled, random_store
from paths import make_trainer
from report import plain_table, seconds

from harmodt.data.store import DataStore
from harmodt.devices import prepare_cpu
from harmodt.files import write_json

STEPS = 10
SHOWN = 25
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 5, 50])
    choices = ("fp32", "tf32x3", "bf16")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=choices)
    parser.add_argument("--output", type=Path, help="JSON file; by default, print a table")
    arguments = parser.parse_args()
    prepare_cpu()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", episodes=2, tasks="mt50")
        found = [measure(store, t, p) for p in arguments.precision for t in arguments.tasks]
    if arguments.output is None:
        print(table(found))
    else:
        write_json(arguments.output, found)


def measure(store: DataStore, tasks: int, precision: str) -> dict[str, Any]:
    """A step's time, kernels and host waits. Kernels are listed by name, the longest first."""
    trainer = make_trainer(store, "fused", tasks_per_step=tasks, precision=precision)

    def steps() -> None:
        for _ in range(STEPS):
            trainer.train_step()

    run = finished(steps)
    run()  # the first steps compile
    begin = time.perf_counter()
    run()
    wall = time.perf_counter() - begin
    kernels, host_calls = profiled(run)
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "tasks": tasks,
        "precision": precision,
        "wall_seconds": wall / STEPS,
        "device_seconds": sum(s for _, s in kernels.values()) / STEPS,
        "launches": sum(count for count, _ in kernels.values()) / STEPS,
        "host_waits": {name: host_calls[name] / STEPS for name in WAITS if host_calls[name]},
        "kernels": [[name, count / STEPS, s / STEPS] for name, (count, s) in longest],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown tables: a line per step, then the longest kernels of the last one."""
    what = "kernels" if ON_GPU else "operations"
    overview = plain_table(
        ["tasks", "precision", "a step", f"in {what}", what, "host waits"],
        [
            [
                str(row["tasks"]),
                row["precision"],
                seconds(row["wall_seconds"]),
                seconds(row["device_seconds"]),
                f"{row['launches']:.0f}",
                f"{sum(row['host_waits'].values()):.1f}",
            ]
            for row in found
        ],
    )
    last = found[-1]
    rows = [
        [f"{count:.0f}", name[:60], seconds(s), f"{s / last['device_seconds']:.1%}"]
        for name, count, s in last["kernels"][:SHOWN]
    ]
    heads = ["times", f"of {what}, {last['tasks']} tasks, {last['precision']}", "a step", "share"]
    return f"{overview}\n\n{plain_table(heads, rows)}"


if __name__ == "__main__":
    main()
