"""Prints how the time of a training step is divided, as a Markdown table.

    python bench/profile_step.py [--path fused|reference|dense] [--dropout 0.1] [--precision bf16]
                                 [--tasks 1] [--size 5.29M] [--no-graph]

The step is that of bench_train_step.py: the paper's model (d = 128), five tasks, 8 windows each.
Every operation is timed where the recorded step calls it; for the other paths, where PyTorch
dispatches it. The line "everything else" is the rest of a step that is not observed. (PyTorch's
profiler is not used: it allocates between the tensors, so that these land on fresh pages again and
again.) The last line is the arithmetic of the masked linear layers, at the peak that this machine
had between the steps.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_train_step import linear_operations, peak
from measuring import random_store
from paths import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from harmodt.devices import prepare_cpu
from harmodt.training.trainer import Trainer
from harmodt_kernels import Recording

STEPS = 20

# Part of the step to the names of its operations.
PARTS = {
    "linear layers, forward, with LayerNorm before and residual after": (
        "harmodt::masked_linear",
        "harmodt::norm_linear",
    ),
    "linear layers, gradient of x": ("harmodt::masked_linear_input_gradient",),
    "linear layers, gradient of W and b": (
        "harmodt::masked_linear_weight_gradient",
        "harmodt::masked_linear_weight_gradients",  # as PyTorch dispatches it
    ),
    "products of other layers, or of the reference": (
        "aten::addmm",
        "aten::baddbmm",
        "aten::mm",
        "aten::bmm",
    ),
    "attention, forward": ("harmodt::attention",),
    "attention, gradient": ("harmodt::attention_gradient",),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "other LayerNorms, forward": ("harmodt::masked_layer_norm", "aten::native_layer_norm"),
    "LayerNorm, gradient": (
        "harmodt::masked_layer_norm_gradient",
        "aten::native_layer_norm_backward",
    ),
    "embedding": ("harmodt::token_embedding", "harmodt::token_embedding_gradient"),
    "residual sums, dropout": ("aten::add", "aten::add_", "harmodt::dropout_add"),
    "optimiser": ("harmodt::masked_adamw", "aten::linalg_vector_norm"),
}


class OperationTimes(TorchDispatchMode):
    """Adds up the seconds of each operation, by its name without the overload.

    A replayed step dispatches nothing, so its recorded calls are replaced by timed ones.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.seconds: collections.Counter[str] = collections.Counter()
        self._recording: Recording | None = getattr(trainer.learner._step, "recording", None)

    def __enter__(self) -> OperationTimes:
        if self._recording is not None:
            self._calls = self._recording.calls
            self._recording.calls = [partial(self._timed, name_of(c), c) for c in self._calls]
        return super().__enter__()

    def __exit__(self, *of_error: Any) -> None:
        super().__exit__(*of_error)
        if self._recording is not None:
            self._recording.calls = self._calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._timed(func.name().partition(".")[0], func, *args, **(kwargs or {}))

    def _timed(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[name] += time.perf_counter() - start
        return result


def name_of(call: partial[Any]) -> str:
    """The name of the operation that a recorded call runs, or of another function."""
    for function in (call.func, *call.args):
        if isinstance(function, torch._ops.OpOverload):
            return function.name().partition(".")[0]
        if isinstance(function, ctypes._CFuncPtr):
            return function.__name__.replace("harmodt_", "harmodt::", 1)
    return call.func.__name__


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="fused", choices=("fused", "reference", "dense"))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--size", default="1.47M", help="size of the model; 5.29M is d = 256")
    parser.add_argument("--no-graph", action="store_true", help="compute each step anew")
    arguments = parser.parse_args()
    prepare_cpu()
    with tempfile.TemporaryDirectory() as directory:
        store = random_store(Path(directory) / "store", episodes=20)
        trainer = make_trainer(
            store,
            arguments.path,
            dropout=arguments.dropout,
            precision=arguments.precision,
            tasks_per_step=arguments.tasks,
            size=arguments.size,
            graph=not arguments.no_graph,
        )
        step, operations, fastest = measure(trainer, arguments.precision)
        print(table(step, operations))
        if arguments.path == "fused":
            print(floor(linear_operations(trainer), fastest, step))


def measure(trainer: Trainer, precision: str) -> tuple[float, dict[str, float], float]:
    """Median seconds of unobserved steps, mean seconds of each operation in observed steps, and the
    median of the machine's peak between the steps, in operations per second."""
    times, peaks = [], []
    for _ in range(2):
        trainer.train_step()  # the second call records the step
    operations = OperationTimes(trainer)
    for step in range(-3, 2 * STEPS):
        peaks.append(peak(precision))
        start = time.perf_counter()
        if step >= 0 and step % 2:  # in turn, because the machine's speed changes
            with operations:
                trainer.train_step()
        else:
            trainer.train_step()
            times.append(time.perf_counter() - start)
    seconds = {name: total / STEPS for name, total in operations.seconds.items()}
    return statistics.median(times), seconds, statistics.median(peaks)


def table(step: float, operations: dict[str, float]) -> str:
    """The parts of a step, and the rest of its time."""
    parts = {part: sum(operations.get(n, 0.0) for n in names) for part, names in PARTS.items()}
    parts = {part: seconds for part, seconds in parts.items() if seconds}
    parts["everything else: embeddings, sampling, loss, Python"] = step - sum(parts.values())
    rows = [f"| {part} | {1e3 * s:.1f} ms | {s / step:.0%} |" for part, s in parts.items()]
    head = ["| | time | share |", "| --- | ---: | ---: |"]
    return "\n".join([*head, *rows, f"| **a step** | **{1e3 * step:.0f} ms** | |"])


def floor(operations: int, fastest: float, step: float) -> str:
    """The arithmetic of the masked linear layers at the machine's peak, as a share of a step."""
    seconds = operations / fastest
    return (
        f"\nThe masked linear layers compute {operations / 1e9:.1f} GFLOP. At the measured peak of "
        f"{fastest / 1e9:.0f} GFLOP/s this takes {1e3 * seconds:.1f} ms: {seconds / step:.2f} of "
        "a step."
    )


if __name__ == "__main__":
    main()
