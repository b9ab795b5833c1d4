"""The fused residual connection with dropout: its public function, checks and operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..dropout import seed_for
from ..operands import check
from ..registration import FLOATS, kernels_for, register


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
) -> Tensor:
    """x + dropout(branch).

    This is the fused form of `reference.dropout_add` and drops the same elements. It allocates
    only the sum.

    Args:
        x, branch: tensors of one shape. float32; on a GPU also float16 or bfloat16. x may be None,
            for 0.
        drop: probability of dropping an element of the branch, in [0, 1). Kept elements are divided
            by 1 - drop.
        seed: the seed of dropout, int64 [] or [1], or None: see `dropout.seed_for`.

    Returns:
        The sum, in the shape of branch and the dtype to which PyTorch promotes x and branch. It is
        computed in float32.

    Raises:
        TypeError: x, branch or seed has a dtype that is not accepted.
        ValueError: shapes or devices do not fit together, or `drop` is out of range.
        BackendUnavailable: the device has no fused kernels.
    """
    taken = FLOATS if kernels_for(branch.device) == "triton" else (torch.float32,)
    check("branch", branch, taken, branch.shape, branch.device)
    if x is not None:
        check("x", x, taken, branch.shape, branch.device, beside=[("branch", branch)])
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
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_dtype, branch_dtype = ctx.dtypes
        operands = None, dy, ctx.drop, *ctx.saved_tensors, branch_dtype
        d_branch = torch.ops.harmodt.dropout_add(*operands)
        return dy.to(x_dtype) if ctx.needs_input_grad[0] else None, d_branch, None, None


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
