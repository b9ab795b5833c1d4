"""Launches Triton kernels."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a Triton kernel on the device of its first argument.

    Args:
        kernel: a function under `triton.jit`.
        grid: number of programs along each axis.
        arguments: all of the kernel's arguments by name, first a tensor or a tuple that begins with
            one, then `num_warps`, `num_stages` and `enable_fp_fusion`.
    """
    first = next(iter(arguments.values()))
    while isinstance(first, tuple):
        first = first[0]
    device = first.device
    if device.type == "cpu":  # the interpreter
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):  # Triton launches on the current device
        kernel[grid](**arguments)


def precision_of(dtype: torch.dtype) -> str:
    """How products are computed: "half" of 16-bit numbers, "tf32" where PyTorch is told so.

    Else it is "ieee". The switch is PyTorch's own: `torch.backends.cuda.matmul.fp32_precision` or
    `torch.set_float32_matmul_precision`.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
