"""The kernels that a training step launches on a GPU, counted without one: a Markdown table.

    python tests/count_launches.py

The step runs on the CPU with Triton's interpreter: the fused operations go through the launchers
that a GPU uses, and every other operation of PyTorch that computes is a kernel there.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

from tiny import configure, make_store, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from harmodt.draws import TRAIN, Draws

FUSED = "attention dropout_add masked_adamw masked_layer_norm masked_linear"
TASKS = ("reach-v3", "push-v3", "drawer-open-v3", "door-open-v3", "button-press-v3")

# What PyTorch does on the host alone, or by looking at a tensor in another way.
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "expand"),
    *("_unsafe_view", "_reshape_alias", "promote_types", "lift_fresh", "detach"),
}
# What reads a tensor's value: on a GPU the host would wait.
HOST_READS = {"_local_scalar_dense", "equal", "nonzero", "item"}


class Counter(TorchDispatchMode):
    """Counts the kernels of PyTorch and what the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.host_reads: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func.name().partition(".")[0].partition("::")
        if library == "aten" and name in HOST_READS:
            self.host_reads[name] += 1
        elif library == "aten" and not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches() -> Iterator[collections.Counter[str]]:
    """Count the launches of Triton kernels."""
    counted: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        for operation in FUSED.split():
            module = importlib.import_module(f"harmodt_kernels.{operation}.triton")
            launch = module.launch

            def count(kernel: Any, *arguments: Any, launch: Any = launch, **options: Any) -> Any:
                counted[kernel.__name__] += 1
                return launch(kernel, *arguments, **options)

            stack.enter_context(mock.patch.object(module, "launch", count))
        yield counted


def step_launches(groups: int, dropout: float, layers: int = 6) -> tuple[dict, dict, dict]:
    """Kernels of Triton, kernels of PyTorch and host reads of one training step, by name.

    The batch is there already: its drawing and gathering are not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", TASKS[:groups])
        config = configure(
            fused=True,
            layers=layers,
            tasks_per_step=groups,
            dropout=dropout,
            batch_per_task=2,
            mask_update_every=1000,
        )
        trainer = make_trainer(store, config)
        trainer.train_step()  # what is made at the first step alone
        learner = trainer.learner
        batch = learner.sampler.sample(range(groups), Draws(0, TRAIN, 1))
        drawn = mock.patch.object(learner.sampler, "sample", lambda *_: batch)
        with drawn, launches() as of_triton, Counter() as counter:
            learner.train_step(2, range(groups), None)
    return dict(of_triton), dict(counter.kernels), dict(counter.host_reads)


def main() -> None:
    """The command line."""
    cases = [(1, 0.0), (1, 0.1), (5, 0.1)]
    counts = [step_launches(*case) for case in cases]
    print("| kernel |", *(f"{groups} × 8, dropout {dropout} |" for groups, dropout in cases))
    print("| --- |", *("--- |" for _ in cases))
    for kind in range(2):
        for name in sorted({name for count in counts for name in count[kind]}):
            print(f"| `{name}` |", *(f"{count[kind].get(name, 0)} |" for count in counts))
    print("| all |", *(f"{sum(a.values()) + sum(b.values())} |" for a, b, _ in counts))
    print("| reads by the host |", *(f"{sum(reads.values())} |" for *_, reads in counts))


if __name__ == "__main__":
    main()
