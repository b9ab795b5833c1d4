"""The definition of the masked AdamW step in plain PyTorch."""

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
    rates: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_norm: float = math.inf,
    rounded: Tensor | None = None,
) -> Tensor:
    """Clip the gradient's norm, then AdamW on the active weights; all else stays bit for bit.

    This is the lazy form, as in `torch.optim.SparseAdam`: an inactive weight is moved neither by
    its old moments nor by weight decay. The bias correction counts all steps.
    Tensors and settings are an argument each, as PyTorch's optimisers take them.

    Args:
        weights, first_moment, second_moment: [P], changed in place where active.
        gradient: [P]; it stays as it is.
        mask_bits: int32 [T, words], the masks of all tasks; or None where every weight is active.
            Weights that they do not reach are active too.
        task_ids: int64 [G], the tasks of the step, in any of which a weight must be active; not
            read without masks.
        rates: [3], what changes from step to step: `rates_of_step`.
        max_norm: the gradient is scaled to at most this global norm.
        rounded: [≤ P], where the first weights are written, rounded to its type; or None.

    Returns:
        The norm of the gradient as it was, a tensor of one element.
    """
    gradient, norm = clipped(gradient, max_norm)
    active = _active(mask_bits, task_ids, weights)
    learning_rate, first_correction, second_correction = rates.to(weights.dtype)
    beta1, beta2 = betas
    _replace(first_moment, active, first_moment.lerp(gradient, 1 - beta1))
    _replace(second_moment, active, second_moment.lerp(gradient.square(), 1 - beta2))
    denominator = second_moment.sqrt().mul_(second_correction).add_(epsilon)
    update = (first_moment / denominator).mul_(first_correction)
    update.add_(weights, alpha=weight_decay)
    _replace(weights, active, torch.addcmul(weights, update, -learning_rate))
    if rounded is not None:
        rounded.copy_(weights[: len(rounded)])
    return norm


def rates_of_step(
    step: int, learning_rate: float, betas: tuple[float, float]
) -> tuple[float, float, float]:
    """The learning rate of a step, counted from 1, and what corrects the bias of its two moments.

    Products with these round alike everywhere; a division by a number is a product on a GPU alone.
    """
    beta1, beta2 = betas
    return learning_rate, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)


def _active(mask_bits: Tensor | None, task_ids: Tensor | None, weights: Tensor) -> Tensor:
    """bool [P]: where a weight is active in one of the tasks."""
    active = torch.ones_like(weights, dtype=torch.bool)
    if mask_bits is not None:
        covered = active[: mask_bits.shape[1] * BITS_PER_WORD]
        covered.copy_(unpack_bits(mask_bits[task_ids], len(covered)).any(0))
    return active


def _replace(values: Tensor, active: Tensor, new: Tensor) -> None:
    # where copies bits: adding zero would change -0.0 and, when they are flushed, denormals
    torch.where(active, new, values, out=values)


def clipped(gradient: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """A gradient [P] scaled to a global norm of at most `max_norm`, and the norm as it was."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
