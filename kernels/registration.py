"""Registers the fused operations with PyTorch, which dispatches them by device.

PyTorch calls the operation `harmodt::NAME`. On a GPU, the function NAME in `triton.py` computes it;
on a CPU, the function NAME in `cpu.py`. The first call imports that file, so importing the package
needs neither Triton nor a GPU nor the C library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal

import torch

from .native import library

Kernels = Literal["triton", "cpu"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that the Triton kernels take."""


class BackendUnavailable(RuntimeError):
    """A device has no fused kernels. The message says what is missing."""


_LIBRARY = torch.library.Library("harmodt", "DEF")
_PACKAGES: dict[str, str] = {}  # operation to package

# NVIDIA Ampere is the oldest generation whose matrix units multiply bf16 and TF32.
_OLDEST_CAPABILITY = (8, 0)


def register(package: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define the operation `harmodt::NAME` from `PACKAGE.triton.NAME` and `PACKAGE.cpu.NAME`.

    Args:
        package: the operation's package.
        name: the name of the operation and of both functions.
        schema: the operation's arguments and results, in PyTorch's schema language.
        fake: returns empty results of the right shape and dtype. PyTorch calls it to trace a model.
    """

    _PACKAGES[name] = package

    def run_triton(*arguments: Any) -> Any:
        return _function(f"{package}.triton", name)(*arguments)

    def run_on_cpu(*arguments: Any) -> Any:
        missing = None if interpreted() else library.why_missing()
        if missing is not None:
            raise BackendUnavailable(missing)
        return kernel(name)(*arguments)

    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run_triton, "CUDA")
    _LIBRARY.impl(name, run_on_cpu, "CPU")
    torch.library.register_fake(f"harmodt::{name}", fake, lib=_LIBRARY)


def kernel(name: str) -> Callable[..., Any]:
    """The function that computes an operation on a CPU."""
    module = "triton" if interpreted() else "cpu"
    return _function(f"{_PACKAGES[name]}.{module}", name)


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that run on a device."""
    return "cpu" if device.type == "cpu" and not interpreted() else "triton"


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def check_available(device: torch.device) -> None:
    """Raise BackendUnavailable, with what is missing, if the kernels cannot run on the device."""
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"there are no fused kernels for {device.type} devices")
    if kernels_for(device) == "cpu":
        missing = library.why_missing()
        if missing is not None:
            raise BackendUnavailable(missing)
        return
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable(
            "the fused kernels for a GPU need Triton, which is not installed: it comes with "
            "PyTorch's CUDA builds on Linux"
        )
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            raise BackendUnavailable(
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, capability))}, and the fused kernels need 8.0 or later"
            )


def interpreted() -> bool:
    """Whether TRITON_INTERPRET is set, so that Triton's interpreter runs the kernels on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")
