"""Defines the residual connection with dropout in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..dropout import kept, seed_for


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
) -> Tensor:
    """x + dropout(branch).

    Args:
        x, branch: tensors of one shape; x may be None, for 0.
        drop: probability of dropping an element of the branch, in [0, 1). Kept elements are divided
            by 1 - drop.
        seed: the seed of dropout, int64 [] or [1], or None: see `dropout.seed_for`.
    """
    seed = seed_for(drop, seed, branch.device)
    if seed is not None:
        branch = (branch * kept(branch.shape, drop, seed)).to(branch.dtype)
    return branch if x is None else x + branch
