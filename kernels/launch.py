"""Launches Triton kernels.

A kernel takes its tensors and numbers as separate arguments. Triton compiles a kernel again when an
integer becomes 1 or a multiple of 16, unless `do_not_specialize` names this argument. It cannot
name a number in a tuple. So operands are in a tuple only if their number varies, or if all of them
may be absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a Triton kernel on the device of its first argument.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: number of programs along each axis.
        arguments: all of the kernel's arguments by name, then `num_warps`, `num_stages` and
            `enable_fp_fusion`. The first is a tensor or a tuple that begins with a tensor.
    """
    first = next(iter(arguments.values()))
    while isinstance(first, tuple):
        first = first[0]
    device = first.device
    if device.type == "cpu":  # Triton's interpreter runs the kernel
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):  # Triton launches on the current device
        kernel[grid](**arguments)


_three_products = False


@contextlib.contextmanager
def float32_in_three_products(on: bool) -> Iterator[None]:
    """A context that sets whether the kernels multiply float32 operands as "tf32x3".

    PyTorch's own switches have no name for it. All threads share the setting, because a backward
    pass on a GPU runs in another thread.
    """
    global _three_products
    before, _three_products = _three_products, on
    try:
        yield
    finally:
        _three_products = before


def precision_of(dtype: torch.dtype) -> str:
    """How the kernels multiply operands of a dtype: "half", "tf32", "tf32x3" or "ieee".

    16-bit operands are multiplied as "half". For float32 the context `Backend.precision` decides.
    Outside of it, PyTorch's own switch decides: `torch.backends.cuda.matmul.fp32_precision` or
    `torch.set_float32_matmul_precision`.
    """
    if dtype != torch.float32:
        return "half"
    if _three_products:
        return "tf32x3"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def input_precision(precision: str) -> str:
    """The argument of `tl.dot` for a precision of `precision_of`."""
    return "ieee" if precision == "half" else precision
