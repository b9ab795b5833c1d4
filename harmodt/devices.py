"""PyTorch devices that a person names."""

from __future__ import annotations

import torch

from harmodt_kernels import REFERENCE, Backend, BackendUnavailable, fused_backend

from .errors import UserError


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
    """The fused kernels for the device, or the reference path in plain PyTorch.

    Raises:
        UserError: the device has no fused kernels.
    """
    if not fused:
        return REFERENCE
    try:
        return fused_backend(device)
    except BackendUnavailable as error:
        raise UserError(f"--fused: {error}; --no-fused is the reference path") from None


def set_precision(precision: str, device: torch.device) -> None:
    """Let this process multiply float32 matrices in TF32 if the precision is "tf32".

    Raises:
        UserError: the device is not a GPU.
    """
    if precision != "tf32":
        return
    if device.type != "cuda":
        raise UserError("precision tf32 is a mode of GPUs: use fp32 or bf16 on a CPU")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
