"""The definition of the residual connection with dropout in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..dropout import kept, seed_for


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
) -> Tensor:
    """x + dropout(branch).

    Args:
        x, branch: of the same shape; x may be None, for 0.
        drop: probability of dropping an element of the branch, in [0, 1); the rest is rescaled.
        seed: of the draw, int64 [] or [1], at least 0 and below 2³¹; or None for one that the
            device's generator draws.
    """
    seed = seed_for(drop, seed, branch.device)
    if seed is not None:
        branch = (branch * kept(branch.shape, drop, seed)).to(branch.dtype)
    return branch if x is None else x + branch
