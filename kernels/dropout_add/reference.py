"""The definition of the residual connection with dropout in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dropout_add(x: Tensor, branch: Tensor, drop: float) -> Tensor:
    """x + dropout(branch).

    Args:
        x, branch: of the same shape.
        drop: probability of dropping an element of the branch, in [0, 1); the rest is rescaled.
    """
    return x + F.dropout(branch, drop)
