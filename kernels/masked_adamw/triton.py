"""Triton kernel of the masked AdamW step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bits import BITS_PER_WORD
from ..launch import launch

# Mask words per program: each thread loads 2 x 16 bytes of each vector.
WORDS = 32
NUM_WARPS = 4
# Masks that a program loads at a time: their loads do not wait for each other.
TASKS = 16


@triton.jit
def lerp(start, end, weight):
    """`torch.lerp`, with the same roundings."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def active_in_step(mask_bits, mask_stride, mask_words, task_ids, tasks, word, TASKS: tl.constexpr):
    """Mask words of the weights that are active in at least one task of the step.

    Words beyond the masks have only ones: the weights there have no mask.
    """
    covered = word < mask_words
    active = tl.where(covered, 0, -1)
    for first in range(0, tasks, TASKS):
        i = first + tl.arange(0, TASKS)
        task = tl.load(task_ids + i, mask=i < tasks, other=0)
        inside = (i < tasks)[:, None] & covered[None, :]
        words = tl.load(
            mask_bits + task[:, None] * mask_stride + word[None, :], mask=inside, other=0
        )
        active |= tl.reduce(words, 0, either)
    return active


@triton.jit(do_not_specialize=["tasks"])
def masked_adamw_kernel(
    weights,  # [size]
    gradient,  # [size]
    first_moment,  # [size]
    second_moment,  # [size]
    mask_bits,  # int32 [T, mask_words], mask_stride apart
    task_ids,  # int64 [tasks]
    lr_and_corrections,  # [3]: learning rate, 1 / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ)
    norm,  # [], norm of the gradient
    bf16_copy,  # [copy_size]
    size,
    copy_size,
    mask_words,
    mask_stride,
    tasks,
    max_norm,
    first_rate,  # 1 - β₁
    second_rate,  # 1 - β₂
    epsilon,
    weight_decay,
    MASKED: tl.constexpr,
    BF16_COPY: tl.constexpr,
    WORDS: tl.constexpr,
    TASKS: tl.constexpr,
):
    """Updates the weights of one block of mask words."""
    start = tl.program_id(0).to(tl.int64) * (WORDS * 32)
    word, bit = tl.arange(0, WORDS), tl.arange(0, 32)
    element = word[:, None] * 32 + bit[None, :]  # [WORDS, 32]
    inside = element < size - start
    weights += start + element
    first_moment += start + element
    second_moment += start + element
    w = tl.load(weights, mask=inside)
    g = tl.load(gradient + start + element, mask=inside)
    m = tl.load(first_moment, mask=inside)
    v = tl.load(second_moment, mask=inside)
    active = inside
    if MASKED:
        words = active_in_step(
            mask_bits, mask_stride, mask_words, task_ids, tasks, start // 32 + word, TASKS
        )
        active &= (words[:, None] & (1 << bit[None, :])) != 0

    # The same as `torch.nn.utils.clip_grad_norm_`: NaN stays NaN.
    one = tl.cast(1.0, tl.float32)
    scale = tl.div_rn(one, tl.load(norm) + 1e-6) * tl.cast(max_norm, tl.float32)
    g *= tl.where(scale > one, one, scale)
    new_m = lerp(m, g, tl.cast(first_rate, tl.float32))
    new_v = lerp(v, g * g, tl.cast(second_rate, tl.float32))
    denominator = tl.sqrt_rn(new_v) * tl.load(lr_and_corrections + 2)
    denominator += tl.cast(epsilon, tl.float32)
    update = tl.div_rn(new_m, denominator) * tl.load(lr_and_corrections + 1)
    update = tl.fma(tl.cast(weight_decay, tl.float32), w, update)
    new_w = tl.fma(-tl.load(lr_and_corrections), update, w)
    # tl.where copies bits, so inactive weights can be stored too, and stores need no mask for them.
    new_w = tl.where(active, new_w, w)
    tl.store(weights, new_w, mask=inside)
    tl.store(first_moment, tl.where(active, new_m, m), mask=inside)
    tl.store(second_moment, tl.where(active, new_v, v), mask=inside)
    if BF16_COPY:
        new_w = new_w.to(bf16_copy.dtype.element_ty)
        tl.store(bf16_copy + start + element, new_w, mask=element < copy_size - start)


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    mask_bits: Tensor | None,
    task_ids: Tensor | None,
    lr_and_corrections: Tensor,
    norm: Tensor,
    max_norm: float,
    first_rate: float,
    second_rate: float,
    epsilon: float,
    weight_decay: float,
    bf16_copy: Tensor | None = None,
) -> None:
    """Computes `harmodt::masked_adamw`, with the arguments of its schema."""
    size = weights.numel()
    launch(
        masked_adamw_kernel,
        (triton.cdiv(size, WORDS * BITS_PER_WORD),),
        weights=weights,
        gradient=gradient,
        first_moment=first_moment,
        second_moment=second_moment,
        mask_bits=mask_bits,
        task_ids=task_ids,
        lr_and_corrections=lr_and_corrections,
        norm=norm,
        bf16_copy=bf16_copy,
        size=size,
        copy_size=0 if bf16_copy is None else bf16_copy.numel(),
        mask_words=0 if mask_bits is None else mask_bits.shape[1],
        mask_stride=0 if mask_bits is None else mask_bits.stride(0),
        tasks=0 if task_ids is None else len(task_ids),
        max_norm=max_norm,
        first_rate=first_rate,
        second_rate=second_rate,
        epsilon=epsilon,
        weight_decay=weight_decay,
        MASKED=mask_bits is not None,
        BF16_COPY=bf16_copy is not None,
        WORDS=WORDS,
        TASKS=TASKS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
