"""PyTorch devices that a person names, and how this process computes on them."""

from __future__ import annotations

import ctypes

import torch

from harmodt_kernels import PYTORCH, Backend, BackendUnavailable, fused_backend

from .errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: it is no device's name, or this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"device {name!r} is not there: this machine has {', '.join(there)}"
        ) from None
    return device


def choose_backend(fused: bool, device: torch.device) -> Backend:
    """The fused kernels for the device, or plain PyTorch.

    Raises:
        UserError: the device has no fused kernels.
    """
    if not fused:
        return PYTORCH
    try:
        return fused_backend(device)
    except BackendUnavailable as error:
        raise UserError(f"--fused: {error}; --no-fused computes in plain PyTorch") from None


def set_precision(precision: str, device: torch.device, backend: Backend) -> None:
    """Set PyTorch's switch for how this process multiplies float32 matrices.

    TF32 is a mode of GPUs. The CPU kernels round to bf16 inside, so that no tensor is converted;
    everything else computes in bf16 under autocast, without this switch.

    Raises:
        UserError: TF32 on a device that is not a GPU.
    """
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError("precision tf32 is a mode of GPUs: use fp32 or bf16 on a CPU")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if backend.rounds_inside:
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        products.fp32_precision = "bf16" if precision == "bf16" else "ieee"


def prepare_cpu() -> None:
    """Set up this process for training or acting on a CPU; call it before any computation.

    Denormal numbers are flushed to zero: a softmax with widely spread scores is full of them, and
    products with them take ten times as long. Freed memory is kept: a tensor of a few MB would
    otherwise be a fresh mapping each time, whose page faults cost more than computing it.
    """
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc: there is no such switch
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
