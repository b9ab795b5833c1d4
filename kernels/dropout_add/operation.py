"""Dropout with the residual sum as PyTorch sees it: the public function, the operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import seed_for
from ..registration import FLOATS, kernels_for, register


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
) -> Tensor:
    """x + dropout(branch).

    The fused form of `reference.dropout_add`, which drops the same elements: nothing but the sum is
    materialised.

    Args:
        x, branch: of the same shape; float32, on a GPU float16 or bfloat16 too. x may be None,
            for 0.
        drop: probability of dropping an element of the branch, in [0, 1); the rest is rescaled.
        seed: of the draw, int64 [] or [1], at least 0 and below 2³¹; or None for one that the
            device's generator draws.

    Returns:
        As x and branch, in the dtype of their sum. It is computed in float32.

    Raises:
        TypeError: x, branch or seed is of another type.
        ValueError: shapes or devices do not fit together.
        BackendUnavailable: there are no fused kernels for the device.
    """
    taken = FLOATS if kernels_for(branch.device) == "triton" else (torch.float32,)
    for name, tensor in (("x", x), ("branch", branch)):
        if tensor is not None and tensor.dtype not in taken:
            raise TypeError(
                f"{name} is {tensor.dtype}, and the fused dropout_add takes "
                + " or ".join(str(dtype) for dtype in taken)
            )
    if x is not None and x.device != branch.device:
        raise ValueError(f"x is on {x.device} and branch on {branch.device}")
    if x is not None and x.shape != branch.shape:
        raise ValueError(f"x {list(x.shape)} and branch {list(branch.shape)} must have one shape")
    seed = seed_for(drop, seed, branch.device)
    if seed is None:
        return branch if x is None else x + branch
    return _DropoutAdd.apply(x, branch, drop, seed)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, branch: Tensor, drop: float, seed: Tensor) -> Tensor:
        ctx.drop, ctx.dtypes = drop, ((branch if x is None else x).dtype, branch.dtype)
        ctx.save_for_backward(seed)
        dtype = torch.promote_types(*ctx.dtypes)
        return torch.ops.harmodt.dropout_add(x, branch, drop, seed, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_branch = ctx.dtypes
        d_branch = torch.ops.harmodt.dropout_add(None, dy, ctx.drop, *ctx.saved_tensors, of_branch)
        return dy.to(of_x) if ctx.needs_input_grad[0] else None, d_branch, None, None


def _dropout_add_fake(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor, dtype: torch.dtype
) -> Tensor:
    return branch.new_empty(branch.shape, dtype=dtype)


register(
    __package__,
    "dropout_add",
    "(Tensor? x, Tensor branch, float drop, Tensor seed, ScalarType dtype) -> Tensor",
    _dropout_add_fake,
)
