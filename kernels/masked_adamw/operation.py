"""The masked AdamW step as PyTorch sees it: the public function and the registered operation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bits import words_for
from ..registration import register


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

    The fused form of `reference.masked_adamw`: one kernel after the norm's, in float32.
    Tensors and settings are an argument each, as PyTorch's optimisers take them.

    Args:
        weights, first_moment, second_moment: float32 [P], changed in place where active.
        gradient: float32 [P]; it stays as it is.
        active_bits: int32 [ceil(P / 32)], 1 where the weight is active in at least one task of the
            step.
        step: number of this step, from 1.
        max_norm: the gradient is scaled to at most this global norm.

    Returns:
        The norm of the gradient, float32 [].

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes disagree.
    """
    size = weights.numel()
    for name, tensor, dtype, length in (
        ("weights", weights, torch.float32, size),
        ("gradient", gradient, torch.float32, size),
        ("first_moment", first_moment, torch.float32, size),
        ("second_moment", second_moment, torch.float32, size),
        ("active_bits", active_bits, torch.int32, words_for(size)),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, and the fused AdamW takes {dtype}")
        if tensor.shape != (length,):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, and {size} weights need [{length}]"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has gaps between its elements")
    norm = torch.linalg.vector_norm(gradient)
    beta1, beta2 = betas
    torch.ops.harmodt.masked_adamw(
        weights,
        gradient,
        first_moment,
        second_moment,
        active_bits,
        norm,
        max_norm,
        1 - beta1,
        1 - beta2,
        1 / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        epsilon,
        weight_decay,
        learning_rate,
    )
    return norm


def _masked_adamw_fake(*_: Any) -> None:
    return None


register(
    __package__,
    "masked_adamw",
    "(Tensor(a!) weights, Tensor gradient, Tensor(b!) first_moment, Tensor(c!) second_moment, "
    "Tensor active_bits, Tensor norm, float max_norm, float first_rate, float second_rate, "
    "float first_correction, float second_correction, float epsilon, float weight_decay, "
    "float learning_rate) -> ()",
    _masked_adamw_fake,
)
