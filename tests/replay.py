"""A computation recorded as a CUDA graph would hold it, and repeated, on the CPU.

What is recorded are the operations of PyTorch and the launches of Triton kernels, with the tensors
and numbers that they were given. Repeating them shows what a graph would: a tensor that was made
anew is found at its old place, and a number that Python computed is the old one.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import harmodt_kernels
from harmodt_kernels.registration import kernels_for

LAUNCHERS = [
    importlib.import_module(f"harmodt_kernels.{path.parent.name}.triton")
    for path in sorted(Path(harmodt_kernels.__file__).parent.glob("*/triton.py"))
]

# What a graph cannot hold: values that the host reads or sends, and sizes that depend on values.
REFUSED = {
    *("_local_scalar_dense", "equal", "item", "is_nonzero", "lift_fresh", "masked_select"),
    *("nonzero", "random_", "unique2", "_assert_async"),
}

# What PyTorch does on the host alone, or by looking at a tensor in another way.
NO_KERNEL = {"_unsafe_view", "_reshape_alias", "promote_types", "detach"}


Launch = Callable[..., None]


@contextlib.contextmanager
def launching(wrap: Callable[[Launch], Launch]) -> Iterator[None]:
    """Launch kernels by what `wrap` makes of the function that launches them."""
    with contextlib.ExitStack() as patches:
        for module in LAUNCHERS:
            if hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", wrap(module.launch)))
        yield


class NotForGraphs(AssertionError):
    """The computation does what a CUDA graph cannot hold."""


class Recording(TorchDispatchMode):
    """Records what is computed inside; `repeat` computes it again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self._launching = False
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Recording:
        self._patches.enter_context(launching(self._noting))
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launching:  # the interpreter computes with PyTorch, too
            return func(*args, **kwargs)
        library, _, name = func.name().partition(".")[0].partition("::")
        kernel = _triton_function(name) if library == "harmodt" else None
        if kernel is not None:  # recorded as what it does
            TorchDispatchMode.__enter__(self)
            try:
                return kernel(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        by_bool = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
        )
        if name in REFUSED or by_bool:
            raise NotForGraphs(f"{func.name()} cannot be in a CUDA graph")
        operands = tree_map(lambda leaf: leaf, (args, kwargs))  # lists may change later
        result = func(*args, **kwargs)
        made = _made(result, operands)
        # A view is the same again; some, as `contiguous`, may be a copy, too.
        if (made or not func.is_view) and "empty" not in name:
            self._calls.append((func, *operands, made))
        return result

    def _noting(self, launch: Launch) -> Launch:
        def note(*args: Any, **kwargs: Any) -> None:
            self._calls.append((launch, args, kwargs, []))
            self._launching = True
            launch(*args, **kwargs)
            self._launching = False

        return note

    def kernels(self) -> tuple[Counter[str], Counter[str]]:
        """The kernels that were launched, by name: those of Triton, and PyTorch's.

        Those that keep a tile of the weight have "stationary" before their name.
        """
        of_triton: Counter[str] = Counter()
        of_pytorch: Counter[str] = Counter()
        for call, args, kwargs, _ in self._calls:
            if isinstance(call, torch._ops.OpOverload):
                of_pytorch[call.name().partition(".")[0].partition("::")[2]] += 1
            else:
                kind = "stationary " if kwargs.get("STATIONARY") else ""
                of_triton[kind + args[0].__name__] += 1
        for name in NO_KERNEL:
            del of_pytorch[name]
        return of_triton, of_pytorch

    def repeat(self) -> None:
        """Compute everything again, with the same operands, into the same places."""
        with torch.inference_mode():
            for call, args, kwargs, made in self._calls:
                again = _made(call(*args, **kwargs), (args, kwargs))
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


def _triton_function(name: str) -> Callable[..., Any] | None:
    """The function of an operation that launches Triton kernels, if these are what runs."""
    if kernels_for(torch.device("cpu")) != "triton":
        return None
    return next(getattr(module, name) for module in LAUNCHERS if hasattr(module, name))


def _made(result: Any, operands: Any) -> list[Tensor]:
    """The tensors of a result that lie in memory of their own."""
    taken = {t.untyped_storage().data_ptr() for t in tree_leaves(operands) if isinstance(t, Tensor)}
    results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
    return [t for t in results if t.untyped_storage().data_ptr() not in taken]
