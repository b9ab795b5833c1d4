"""Defines the masked AdamW step in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bits import BITS_PER_WORD, unpack_bits


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    mask_bits: Tensor | None,
    task_ids: Tensor | None,
    lr_and_corrections: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_norm: float = math.inf,
    bf16_copy: Tensor | None = None,
) -> Tensor:
    """Clip the gradient's norm, then run AdamW on the active weights; the others do not change.

    This is lazy AdamW, as in `torch.optim.SparseAdam`: neither old moments nor weight decay move an
    inactive weight. The bias corrections count all steps.

    Every implementation takes these arguments.

    Args:
        weights, first_moment, second_moment: [P]. Elements of active weights are changed in place.
        gradient: [P]. It is not changed.
        mask_bits: int32 [T, words], the masks of all tasks; or None if every weight is active.
            Weights beyond the last word are always active.
        task_ids: int64 [G], the tasks of the step; or None without masks. A weight is active in the
            step if it is active in one of these tasks.
        lr_and_corrections: [3], the learning rate and the bias corrections, from
            `lr_and_corrections_at`.
        max_norm: the gradient is clipped to this global norm.
        bf16_copy: a buffer [≤ P] of another dtype, usually bf16, or None. The step writes a copy of
            the first weights to it.

    Returns:
        The norm of the gradient before clipping, a tensor of one element.
    """
    gradient, norm = clipped(gradient, max_norm)
    active = _active(mask_bits, task_ids, weights)
    learning_rate, first_correction, second_correction = lr_and_corrections.to(weights.dtype)
    beta1, beta2 = betas
    _replace(first_moment, active, first_moment.lerp(gradient, 1 - beta1))
    _replace(second_moment, active, second_moment.lerp(gradient.square(), 1 - beta2))
    denominator = second_moment.sqrt().mul_(second_correction).add_(epsilon)
    update = (first_moment / denominator).mul_(first_correction)
    update.add_(weights, alpha=weight_decay)
    _replace(weights, active, torch.addcmul(weights, update, -learning_rate))
    if bf16_copy is not None:
        bf16_copy.copy_(weights[: len(bf16_copy)])
    return norm


def lr_and_corrections_at(
    step: int, learning_rate: float, betas: tuple[float, float]
) -> tuple[float, float, float]:
    """The learning rate of a step and the factors that correct the bias of its two moments.

    Steps count from 1. The corrections are factors, not divisors, because products round alike
    on all devices. A GPU would replace a division by a constant with a product, a CPU would not.
    """
    beta1, beta2 = betas
    return learning_rate, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)


def _active(mask_bits: Tensor | None, task_ids: Tensor | None, weights: Tensor) -> Tensor:
    """bool [P], True if a weight is active in one of the tasks."""
    active = torch.ones_like(weights, dtype=torch.bool)
    if mask_bits is not None:
        covered = active[: mask_bits.shape[1] * BITS_PER_WORD]
        covered.copy_(unpack_bits(mask_bits[task_ids], len(covered)).any(0))
    return active


def _replace(values: Tensor, active: Tensor, new: Tensor) -> None:
    # torch.where copies bits. To add 0 would change -0.0, and flush denormals on some devices.
    torch.where(active, new, values, out=values)


def clipped(gradient: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """A gradient [P] clipped to a global norm of at most `max_norm`, and its norm before that."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
