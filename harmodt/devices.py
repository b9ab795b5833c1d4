"""Chooses device, kernels and precision of a model, and prepares a process for a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmodt_kernels import (
    PYTORCH,
    Backend,
    BackendUnavailable,
    RecordingMemory,
    fused_backend,
)

from .config import Precision
from .cores import SHARE, count_cores
from .errors import UserError
from .graph import CallGraph, CudaGraph, CudaMemory

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)


@dataclass(frozen=True)
class Execution:
    """Where and how a model computes.

    Attributes:
        device: the device of the model's parameters.
        backend: the implementation of the model's operations.
        precision: the precision of matrix products.
        graph: whether steps, mask updates and policy calls may be captured and replayed.
        memory: the memory that all captured graphs share. They can share it because one thread
            replays them in turn.
    """

    device: torch.device
    backend: Backend
    precision: Precision = "fp32"
    graph: bool = True
    memory: RecordingMemory | CudaMemory = field(kw_only=True, repr=False, compare=False)

    @classmethod
    def choose(
        cls, device: str, fused: bool, precision: Precision, graph: bool = True
    ) -> Execution:
        """Make the execution from a person's settings.

        Args:
            device: a PyTorch device, or "auto" for a GPU if there is one.
            fused: whether to use the device's fused kernels; otherwise plain PyTorch.

        Raises:
            UserError: there is no such device, or it lacks fused kernels or this precision.
        """
        found = find_device(device)
        if precision in ("tf32x3", "tf32") and found.type != "cuda":
            raise UserError(f"precision {precision} is a mode of GPUs: use fp32 or bf16 on a CPU")
        memory = CudaMemory(found) if found.type == "cuda" else RecordingMemory()
        return cls(found, _choose_backend(fused, found), precision, graph, memory=memory)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products have this precision."""
        return self.backend.precision(self.precision, self.device)

    @property
    def rounded_to(self) -> torch.dtype | None:
        """The dtype of the copy of the weights that matrix products read; None without a copy.

        Without the copy, Triton's kernels would round the weights again for every tile. The CPU
        kernels round the weights when they pack them.
        """
        kept = self.precision == "bf16" and self.backend.name.startswith("triton")
        return torch.bfloat16 if kept else None

    @property
    def repeats(self) -> bool:
        """Whether `repeated` makes graphs; only fused kernels can be captured."""
        on_gpu, on_cpu = self.backend.name == "triton", self.backend.name.startswith("cpu-")
        return self.graph and (on_gpu or on_cpu)

    def repeated(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Make a graph of a function; if that is not possible, return the function itself.

        Args:
            function: a function that meets the conditions of `Graph`.
        """
        if not self.repeats:
            return function
        if isinstance(self.memory, CudaMemory):
            return CudaGraph(function, self.memory)
        return CallGraph(function, self.memory)


def find_device(name: str) -> torch.device:
    """Find the device with a name; "auto" is a GPU if there is one.

    Raises:
        UserError: this is not the name of a device, or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if torch.zeros(1, device=device).tolist() == [0]:  # "meta" holds no numbers
            return device
    except Exception:  # PyTorch has many error types for devices that its build lacks
        pass
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    raise UserError(f"there is no device {name!r}: give auto or one of {', '.join(there)}")


def _choose_backend(fused: bool, device: torch.device) -> Backend:
    if not fused:
        return PYTORCH
    try:
        return fused_backend(device)
    except BackendUnavailable as error:
        raise UserError(f"--fused: {error}; --no-fused selects plain PyTorch") from None


def prepare_cpu() -> None:
    """Set up this process for training or acting on a CPU. Call this before any computation.

    Denormal numbers become 0. A softmax of widely spread scores has many of them, and products with
    them take ten times as long. The process keeps freed memory. Otherwise each tensor of a few MB
    would be a new memory mapping, whose page faults cost more than the computation. If
    `HARMODT_CORES` is set, PyTorch starts at most that many threads, unless `OMP_NUM_THREADS` sets
    their number.

    Raises:
        UserError: `HARMODT_CORES` is not a whole number of 1 or more.
    """
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    if SHARE in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count_cores())


def _keep_freed_memory() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # only glibc has mallopt
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
