"""Passes the tensors of the residual connection with dropout to the C library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.library import library, pointer, threads


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor, dtype: torch.dtype
) -> Tensor:
    x, branch = None if x is None else x.contiguous(), branch.contiguous()
    out = torch.empty_like(branch, dtype=dtype)
    operands = map(pointer, (x, branch, out))
    library().harmodt_dropout_add(branch.numel(), *operands, drop, pointer(seed), threads())
    return out
