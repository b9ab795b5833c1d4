"""Measures steps per second of training on 50 tasks, and estimates the time of a million steps.

    python bench/training.py [--seconds 60] [--output training.json]

The data are random episodes. The settings are the paper's, in bf16, with the kernels: one task per
step as in the paper, then five. The estimate includes 200 mask updates, of which one is timed, but
no evaluations and no checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import ON_GPU, random_store
from paths import make_trainer
from report import plain_table

from harmodt.data.store import DataStore
from harmodt.devices import prepare_cpu
from harmodt.files import write_json

STEPS, UPDATES = 1_000_000, 200


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time per number of tasks")
    parser.add_argument("--output", type=Path, help="JSON file; by default, print a table")
    arguments = parser.parse_args()
    prepare_cpu()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", episodes=5, tasks="mt50")
        rows = [measure(store, tasks, arguments.seconds) for tasks in (1, 5)]
    if arguments.output is None:
        print(table(rows))
    else:
        write_json(arguments.output, rows)


def measure(store: DataStore, tasks: int, seconds: float) -> dict[str, Any]:
    """Train for some seconds, then update the masks once."""
    trainer = make_trainer(store, "fused", tasks_per_step=tasks, precision="bf16", graph=True)
    trainer.before_step()  # the first update and the first steps allocate and compile
    for _ in range(5):
        trainer.train_step()
    begin, steps = _now(), 0
    while (elapsed := _now() - begin) < seconds:
        for _ in range(20):
            result = trainer.train_step()
        steps += 20
    assert torch.isfinite(result.losses).all()
    trainer.step = STEPS // 2
    begin = _now()
    assert trainer.before_step()["moved_weights"] == 100
    update = _now() - begin
    whole = STEPS * elapsed / steps + UPDATES * update
    return {
        "tasks_per_step": tasks,
        "steps": steps,
        "seconds": elapsed,
        "mask_update_seconds": update,
        "hours_of_a_million": whole / 3600,
    }


def _now() -> float:
    """The time in seconds, after the device is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: list[dict[str, Any]]) -> str:
    """The speeds as a Markdown table."""
    heads = ["tasks per step", "steps/s", "measured for", "a mask update", "1,000,000 steps"]
    return plain_table(
        heads,
        [
            [
                str(row["tasks_per_step"]),
                f"{row['steps'] / row['seconds']:.1f}",
                f"{row['seconds']:.0f} s",
                f"{row['mask_update_seconds']:.2f} s",
                f"{row['hours_of_a_million']:.1f} h",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
