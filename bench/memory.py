"""Measures the peak memory of a training step for several numbers of tasks and each path.

    python bench/memory.py [--tasks 5 50 200 1000] [--output memory.json]

Each task has only one window in the step: otherwise activations would hide the copies of weights.
The step is that of the paper's model (d = 128, dropout 0.1) in bf16. The peak does not include the
model, the optimiser and the packed masks of all tasks; the masks have a column of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from measuring import peak_bytes, random_masks, random_store
from paths import make_trainer
from report import plain_table, size

from harmodt.data.store import DataStore
from harmodt.devices import prepare_cpu
from harmodt.files import write_json
from harmodt.masks.bank import MaskBank
from harmodt_kernels.vector import ParameterVector

COMPARED = ("fused", "masked copies", "reference", "dense")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 50, 200, 1000])
    parser.add_argument("--output", type=Path, help="JSON file; by default, print a table")
    arguments = parser.parse_args()
    prepare_cpu()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", episodes=2)
        rows = [measure(store, tasks) for tasks in arguments.tasks]
    if arguments.output is None:
        print(table(rows))
    else:
        write_json(arguments.output, rows)


def measure(store: DataStore, tasks: int) -> dict[str, Any]:
    """The bytes of the masks, and of a step with each path; None if memory was not enough."""
    names = [store.tasks[index % len(store.tasks)] for index in range(tasks)]
    repeated = SimpleNamespace(tasks=names, task=store.task, environment=store.environment)
    with mock.patch.object(MaskBank, "initialise", _random_bank):
        peaks = {path: _peak(repeated, path, tasks) for path in COMPARED}
        trainer = make_trainer(repeated, "fused", tasks_per_step=tasks)
    masks = trainer.learner.bank.bits.nbytes
    return {"tasks": tasks, "mask_bytes": masks, "peak_bytes": peaks}


def _random_bank(vector: ParameterVector, sparsities: Sequence[float], *_: Any) -> MaskBank:
    """Random masks, because masks of the right densities take long to draw for 1000 tasks."""
    return MaskBank(vector, random_masks(len(sparsities), vector.maskable_size // 32))


def _peak(store: Any, path: str, tasks: int) -> int | None:
    settings = {"tasks_per_step": tasks, "batch_per_task": 1, "precision": "bf16"}
    trainer = make_trainer(store, path, graph=False, **settings)
    try:
        trainer.train_step()
        return peak_bytes(trainer.train_step)
    except torch.OutOfMemoryError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """The memory as a Markdown table."""
    cells = [
        [
            str(row["tasks"]),
            size(row["mask_bytes"]),
            *(
                size(row["peak_bytes"][path]) if row["peak_bytes"][path] else "out of memory"
                for path in COMPARED
            ),
        ]
        for row in rows
    ]
    return plain_table(["tasks", "masks", *COMPARED], cells)


if __name__ == "__main__":
    main()
