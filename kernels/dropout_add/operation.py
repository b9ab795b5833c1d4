"""Dropout with the residual sum as PyTorch sees it: the public function, the operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import register


def dropout_add(x: Tensor, branch: Tensor, drop: float) -> Tensor:
    """x + dropout(branch).

    The fused form of `reference.dropout_add` for a CPU, in float32: nothing but the sum is
    materialised. Which elements it drops is drawn from PyTorch's generator.

    Args:
        x, branch: float32, of the same shape.
        drop: probability of dropping an element of the branch, in [0, 1); the rest is rescaled.

    Raises:
        TypeError: x or branch is not float32.
        ValueError: their shapes differ.
        BackendUnavailable: there is no such kernel for the device.
    """
    for name, tensor in (("x", x), ("branch", branch)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, and the fused dropout_add takes float32")
    if x.shape != branch.shape:
        raise ValueError(f"x {list(x.shape)} and branch {list(branch.shape)} must have one shape")
    if drop == 0.0:
        return x + branch
    return _DropoutAdd.apply(x, branch, drop, int(torch.randint(2**31, ())))


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, drop: float, seed: int) -> Tensor:
        ctx.draw = drop, seed
        return torch.ops.harmodt.dropout_add(x, branch, drop, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, torch.ops.harmodt.dropout_add(None, dy, *ctx.draw), None, None


def _dropout_add_fake(x: Tensor | None, branch: Tensor, drop: float, seed: int) -> Tensor:
    return torch.empty_like(branch, memory_format=torch.contiguous_format)


register(
    __package__,
    "dropout_add",
    "(Tensor? x, Tensor branch, float drop, int seed) -> Tensor",
    _dropout_add_fake,
    kernels=("cpu",),
)
