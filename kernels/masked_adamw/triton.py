"""Triton kernel of the masked AdamW step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bits import BITS_PER_WORD
from ..launch import launch

# Mask words of one program: two loads of 16 bytes for each thread and vector.
WORDS = 32
NUM_WARPS = 4


@triton.jit
def lerp(start, end, weight):
    """`torch.lerp`, with its roundings."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def masked_adamw_kernel(
    weights,  # [size]
    gradient,  # [size]
    first_moment,  # [size]
    second_moment,  # [size]
    active_bits,  # int32 [size / 32]
    norm,  # of the gradient, []
    size,
    max_norm,
    first_rate,  # 1 - β₁
    second_rate,  # 1 - β₂
    first_correction,  # 1 / (1 - β₁ᵗ)
    second_correction,  # 1 / √(1 - β₂ᵗ)
    epsilon,
    weight_decay,
    learning_rate,
    WORDS: tl.constexpr,
):
    """The step of the weights of some words.

    A launch takes no structures: what a kernel needs is an argument each.
    """
    start = tl.program_id(0).to(tl.int64) * (WORDS * 32)
    word, place = tl.arange(0, WORDS), tl.arange(0, 32)
    element = word[:, None] * 32 + place[None, :]  # [WORDS, 32]
    inside = element < size - start
    active_bits = tl.load(active_bits + start // 32 + word, mask=word * 32 < size - start, other=0)
    active = (active_bits[:, None] & (1 << place[None, :])) != 0
    weights += start + element
    first_moment += start + element
    second_moment += start + element
    w = tl.load(weights, mask=inside)
    g = tl.load(gradient + start + element, mask=inside)
    m = tl.load(first_moment, mask=inside)
    v = tl.load(second_moment, mask=inside)

    # As `torch.nn.utils.clip_grad_norm_`; NaN stays NaN.
    one = tl.cast(1.0, tl.float32)
    scale = tl.div_rn(one, tl.load(norm) + 1e-6) * tl.cast(max_norm, tl.float32)
    g *= tl.where(scale > one, one, scale)
    new_m = lerp(m, g, tl.cast(first_rate, tl.float32))
    new_v = lerp(v, g * g, tl.cast(second_rate, tl.float32))
    denominator = tl.sqrt_rn(new_v) * tl.cast(second_correction, tl.float32)
    denominator += tl.cast(epsilon, tl.float32)
    update = tl.div_rn(new_m, denominator) * tl.cast(first_correction, tl.float32)
    update = tl.fma(tl.cast(weight_decay, tl.float32), w, update)
    new_w = tl.fma(-tl.cast(learning_rate, tl.float32), update, w)
    # Selecting copies bits, so that whole vectors can be written.
    tl.store(weights, tl.where(active, new_w, w), mask=inside)
    tl.store(first_moment, tl.where(active, new_m, m), mask=inside)
    tl.store(second_moment, tl.where(active, new_v, v), mask=inside)


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    active_bits: Tensor,
    norm: Tensor,
    max_norm: float,
    first_rate: float,
    second_rate: float,
    first_correction: float,
    second_correction: float,
    epsilon: float,
    weight_decay: float,
    learning_rate: float,
) -> None:
    """`harmodt::masked_adamw`, whose arguments, one by one, are those of its schema."""
    size = weights.numel()
    launch(
        masked_adamw_kernel,
        (triton.cdiv(size, WORDS * BITS_PER_WORD),),
        weights=weights,
        gradient=gradient,
        first_moment=first_moment,
        second_moment=second_moment,
        active_bits=active_bits,
        norm=norm,
        size=size,
        max_norm=max_norm,
        first_rate=first_rate,
        second_rate=second_rate,
        first_correction=first_correction,
        second_correction=second_correction,
        epsilon=epsilon,
        weight_decay=weight_decay,
        learning_rate=learning_rate,
        WORDS=WORDS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
