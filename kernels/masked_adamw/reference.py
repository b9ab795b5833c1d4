"""The definition of the masked AdamW step in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bits import unpack_bits


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    active_bits: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_norm: float = math.inf,
) -> Tensor:
    """Clip the gradient's norm, then AdamW on the active weights; all else stays bit for bit.

    This is the lazy form, as in `torch.optim.SparseAdam`: an inactive weight is moved neither by
    its old moments nor by weight decay. The bias correction counts all steps.
    Tensors and settings are an argument each, as PyTorch's optimisers take them.

    Args:
        weights, first_moment, second_moment: [P], changed in place where active.
        gradient: [P]; it stays as it is.
        active_bits: int32 [ceil(P / 32)], 1 where the weight is active in at least one task of the
            step.
        step: number of this step, from 1.
        max_norm: the gradient is scaled to at most this global norm.

    Returns:
        The norm of the gradient as it was, a tensor of one element.
    """
    gradient, norm = clipped(gradient, max_norm)
    active = unpack_bits(active_bits, weights.numel())
    beta1, beta2 = betas
    _replace(first_moment, active, first_moment.lerp(gradient, 1 - beta1))
    _replace(second_moment, active, second_moment.lerp(gradient.square(), 1 - beta2))
    # Products round alike everywhere; a division by a number is a product on a GPU alone.
    denominator = second_moment.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(epsilon)
    update = (first_moment / denominator).mul_(1 / (1 - beta1**step))
    update.add_(weights, alpha=weight_decay)
    _replace(weights, active, torch.sub(weights, update, alpha=learning_rate))
    return norm


def _replace(values: Tensor, active: Tensor, new: Tensor) -> None:
    # where copies bits: adding zero would change -0.0 and, when they are flushed, denormals
    torch.where(active, new, values, out=values)


def clipped(gradient: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """A gradient [P] scaled to a global norm of at most `max_norm`, and the norm as it was."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
