"""A computation recorded as a CUDA graph would hold it, and repeated, on the CPU.

What is recorded are the operations of PyTorch and the launches of Triton kernels, with the tensors
and numbers that they were given. Repeating them shows what a graph would: a tensor that was made
anew is found at its old place, and a number that Python computed is the old one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import harmodt_kernels
from harmodt_kernels import CannotRecord, Recording

LAUNCHERS = [
    importlib.import_module(f"harmodt_kernels.{path.parent.name}.triton")
    for path in sorted(Path(harmodt_kernels.__file__).parent.glob("*/triton.py"))
]

Launch = Callable[..., None]


@contextlib.contextmanager
def launching(wrap: Callable[[Launch], Launch]) -> Iterator[None]:
    """Launch kernels by what `wrap` makes of the function that launches them."""
    with contextlib.ExitStack() as patches:
        for module in LAUNCHERS:
            if hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", wrap(module.launch)))
        yield


class GraphRecording(Recording):
    """A recording that holds launches of Triton kernels, and refuses what a GPU alone cannot do."""

    def __init__(self, function: Callable[[], Tensor]):
        with launching(self._noting):
            super().__init__(function)

    def check(self, func: Any, args: Any) -> None:
        super().check(func, args)
        if func._opname in ("lift_fresh", "_assert_async"):  # the host sends numbers, or waits
            raise CannotRecord(f"{func.name()} cannot be in a CUDA graph")

    def _note_precision(self) -> None:
        """Nothing: the switch is a CPU's."""

    def kernels(self) -> tuple[Counter[str], Counter[str]]:
        """The kernels that were launched, by name: those of Triton, and PyTorch's.

        Those that keep a tile of the weight have "stationary" before their name.
        """
        of_triton: Counter[str] = Counter()
        of_pytorch: Counter[str] = Counter()
        for call in self.calls:
            operation = call.func if isinstance(call.func, torch._ops.OpOverload) else call.args[0]
            if isinstance(operation, torch._ops.OpOverload):
                of_pytorch[operation._opname] += 1
            else:
                kind = "stationary " if call.keywords.get("STATIONARY") else ""
                of_triton[kind + operation.__name__] += 1
        return of_triton, of_pytorch

    def _noting(self, launch: Launch) -> Launch:
        def note(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # the interpreter computes with PyTorch, too
                launch(*args, **kwargs)
                args, kwargs = self.operands(args, kwargs)
            self.calls.append(functools.partial(launch, *args, **kwargs))

        return note
