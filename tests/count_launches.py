"""Counts the kernels that a training step launches on a GPU, without a GPU: a Markdown table.

    python tests/count_launches.py

The step runs on the CPU. The fused operations call the launchers of a GPU, but their kernels
compute nothing. Every other operation of PyTorch that computes something counts as a kernel.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from replay import GraphRecording, launching
from tiny import configure, make_store, make_trainer

from harmodt.environments import family

TASKS = family("metaworld").resolve_tasks(["mt50"])
SIZES = {
    "embed_dim": 128,
    "heads": 8,
    "batch_per_task": 8,
    "context_length": 20,
    "prompt_length": 5,
}


def step_launches(
    groups: int, dropout: float, precision: str = "fp32", layers: int = 6
) -> tuple[Counter, Counter]:
    """The numbers of Triton's and of PyTorch's kernels in one training step, by name.

    The data and the drawn indices are on the device: the step gathers its windows.

    Raises:
        CannotRecord: the step needs the host to read a value.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", TASKS[:groups])
        config = configure(
            fused=True,
            layers=layers,
            tasks_per_step=groups,
            dropout=dropout,
            precision=precision,
            **SIZES,
            data_device="same",
            mask_update_every=1000,
        )
        trainer = make_trainer(store, config)
        learner = trainer.learner
        # The kernels need not compute: no launch depends on a number that a kernel computes.
        with launching(lambda launch: lambda *_, **__: None):
            trainer.train_step()  # the first step also does work that later ones do not
            recording = GraphRecording(learner._compute)
    return recording.kernels()


def main() -> None:
    """The command line."""
    cases = [(1, 0.0, "fp32"), (1, 0.1, "fp32"), (50, 0.1, "fp32"), (1, 0.1, "bf16")]
    counts = [step_launches(groups, drop, precision=name) for groups, drop, name in cases]
    print("| kernel |", *(f"{groups} × 8, dropout {d}, {name} |" for groups, d, name in cases))
    print("| --- |", *("--- |" for _ in cases))
    for kind in range(2):
        for name in sorted({name for count in counts for name in count[kind]}):
            print(f"| `{name}` |", *(f"{count[kind][name]} |" for count in counts))
    print("| all |", *(f"{a.total() + b.total()} |" for a, b in counts))


if __name__ == "__main__":
    main()
