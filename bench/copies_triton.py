"""Triton kernels for the two passes of the path "masked copies" on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmodt_kernels.launch import launch

WORDS = 32


@triton.jit
def masked_copies_kernel(weights, bits, copies, words, WORDS: tl.constexpr):
    """Computes a block of words of one group's copy."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    group = tl.program_id(1).to(tl.int64)
    bit = tl.arange(0, 32)
    inside = (word < words)[:, None] & (bit < 32)[None, :]
    element = word[:, None] * 32 + bit[None, :]
    mask = tl.load(bits + group * words + word, mask=word < words, other=0)
    active = (mask[:, None] & (1 << bit[None, :])) != 0
    w = tl.load(weights + element, mask=inside)
    tl.store(
        copies + group * words * 32 + element,
        tl.where(active, w, 0.0).to(copies.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def add_masked_kernel(total, gradients, bits, words, groups, WORDS: tl.constexpr):
    """Computes a block of words of the sum over all groups, in order of the groups."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    inside = (word < words)[:, None] & (bit < 32)[None, :]
    element = word[:, None] * 32 + bit[None, :]
    value = tl.load(total + element, mask=inside)
    for group in range(groups):
        row = tl.cast(group, tl.int64) * words
        mask = tl.load(bits + row + word, mask=word < words, other=0)
        active = (mask[:, None] & (1 << bit[None, :])) != 0
        g = tl.load(gradients + row * 32 + element, mask=inside)
        value += tl.where(active, g.to(tl.float32), 0.0)
    tl.store(total + element, value, mask=inside)


def masked_copies(weights: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first weights of a vector with each mask.

    Args:
        weights: float32 [P].
        bits: int32 [G, P_m / 32].

    Returns:
        [G, P_m], in `dtype`.
    """
    groups, words = bits.shape
    copies = weights.new_empty(groups, words * 32, dtype=dtype)
    launch(
        masked_copies_kernel,
        (triton.cdiv(words, WORDS), groups),
        weights=weights,
        bits=bits,
        copies=copies,
        words=words,
        WORDS=WORDS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return copies


def add_masked(total: Tensor, gradients: Tensor, bits: Tensor) -> None:
    """Add gradients [G, P_m], each with its mask, to the first elements of a vector [P]."""
    groups, words = bits.shape
    launch(
        add_masked_kernel,
        (triton.cdiv(words, WORDS),),
        total=total,
        gradients=gradients,
        bits=bits,
        words=words,
        groups=groups,
        WORDS=WORDS,
        num_warps=4,
        enable_fp_fusion=False,
    )
