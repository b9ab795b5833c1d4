"""Records a computation on the CPU as a CUDA graph would capture it, and replays it.

The recording holds the operations of PyTorch and the launches of Triton kernels, with their tensors
and numbers. A replay behaves as a graph does: it uses a tensor's old address even if the program
has allocated a new tensor, and it uses the old value of a number that Python computed.
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
    """Replace the function that launches kernels with `wrap` of it."""
    with contextlib.ExitStack() as patches:
        for module in LAUNCHERS:
            if hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", wrap(module.launch)))
        yield


class GraphRecording(Recording):
    """A recording with launches of Triton kernels. It refuses operations that need the host."""

    def __init__(self, function: Callable[[], Tensor]):
        with launching(self._noting):
            super().__init__(function)

    def check(self, func: Any, args: Any) -> None:
        super().check(func, args)
        if func._opname in ("lift_fresh", "_assert_async"):  # the host sends values, or waits
            raise CannotRecord(f"{func.name()} cannot be in a CUDA graph")

    def _note_precision(self) -> None:
        """Record nothing: this switch is for CPUs."""

    def kernels(self) -> tuple[Counter[str], Counter[str]]:
        """The numbers of Triton's and of PyTorch's kernels, by name.

        A kernel with a stationary weight has "stationary" before its name.
        """
        triton_kernels: Counter[str] = Counter()
        pytorch_kernels: Counter[str] = Counter()
        for call in self.calls:
            operation = call.func if isinstance(call.func, torch._ops.OpOverload) else call.args[0]
            if isinstance(operation, torch._ops.OpOverload):
                pytorch_kernels[operation._opname] += 1
            else:
                kind = "stationary " if call.keywords.get("STATIONARY") else ""
                triton_kernels[kind + operation.__name__] += 1
        return triton_kernels, pytorch_kernels

    def _noting(self, launch: Launch) -> Launch:
        def note(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # the interpreter's own PyTorch calls are not recorded
                launch(*args, **kwargs)
                args, kwargs = self.operands(args, kwargs)
            self.calls.append(functools.partial(launch, *args, **kwargs))

        return note
