"""Triton kernel of the residual connection with dropout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import kept
from ..dropout import rate
from ..launch import launch

# Elements per program: each thread loads 2 x 16 bytes of each float32 operand.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["seed", "threshold"])
def dropout_add_kernel(
    branch,  # [size]
    x,  # [size], or None
    out,  # [size]
    size,
    seed,  # int64 [1]
    threshold,
    scale,
    HAS_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one block of elements of `out`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    result = tl.load(branch + index, mask=inside).to(tl.float32)
    result *= kept(index.to(tl.uint32), tl.load(seed), threshold, scale)
    if HAS_X:
        result += tl.load(x + index, mask=inside).to(tl.float32)
    tl.store(out + index, result.to(out.dtype.element_ty), mask=inside)


def dropout_add(
    x: Tensor | None, branch: Tensor, drop: float, seed: Tensor, dtype: torch.dtype
) -> Tensor:
    x, branch = None if x is None else x.contiguous(), branch.contiguous()
    out = torch.empty(branch.shape, dtype=dtype, device=branch.device)
    threshold, scale = rate(drop)
    launch(
        dropout_add_kernel,
        (triton.cdiv(branch.numel(), BLOCK),),
        branch=branch,
        x=x,
        out=out,
        size=branch.numel(),
        seed=seed,
        threshold=threshold,
        scale=scale,
        HAS_X=x is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
