"""Dropout with the residual sum as PyTorch sees it: the public function, the operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import FLOATS, kernels_for, register


def dropout_add(x: Tensor, branch: Tensor, drop: float) -> Tensor:
    """x + dropout(branch).

    The fused form of `reference.dropout_add`: nothing but the sum is materialised. Which elements
    it drops follows from their place and a seed, which PyTorch's generator of the CPU draws; it is
    the same on every device.

    Args:
        x, branch: of the same shape; float32, on a GPU float16 or bfloat16 too.
        drop: probability of dropping an element of the branch, in [0, 1); the rest is rescaled.

    Returns:
        As x and branch, in the dtype of their sum. It is computed in float32.

    Raises:
        TypeError: x or branch is of another type.
        ValueError: their shapes or devices differ.
        BackendUnavailable: there are no fused kernels for the device.
    """
    taken = FLOATS if kernels_for(x.device) == "triton" else (torch.float32,)
    for name, tensor in (("x", x), ("branch", branch)):
        if tensor.dtype not in taken:
            raise TypeError(
                f"{name} is {tensor.dtype}, and the fused dropout_add takes "
                + " or ".join(str(dtype) for dtype in taken)
            )
    if x.device != branch.device:
        raise ValueError(f"x is on {x.device} and branch on {branch.device}")
    if x.shape != branch.shape:
        raise ValueError(f"x {list(x.shape)} and branch {list(branch.shape)} must have one shape")
    if drop == 0.0:
        return x + branch
    return _DropoutAdd.apply(x, branch, drop, int(torch.randint(2**31, ())))


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, drop: float, seed: int) -> Tensor:
        ctx.draw, ctx.dtypes = (drop, seed), (x.dtype, branch.dtype)
        dtype = torch.promote_types(*ctx.dtypes)
        return torch.ops.harmodt.dropout_add(x, branch, drop, seed, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_branch = ctx.dtypes
        d_branch = torch.ops.harmodt.dropout_add(None, dy, *ctx.draw, of_branch)
        return dy.to(of_x), d_branch, None, None


def _dropout_add_fake(
    x: Tensor | None, branch: Tensor, drop: float, seed: int, dtype: torch.dtype
) -> Tensor:
    return branch.new_empty(branch.shape, dtype=dtype)


register(
    __package__,
    "dropout_add",
    "(Tensor? x, Tensor branch, float drop, int seed, ScalarType dtype) -> Tensor",
    _dropout_add_fake,
)
