"""Algorithm 2 of the HarmoDT paper: gradients of every task, then the harmony selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import select_harmony

from .config import TrainConfig
from .masks import MaskBank, TaskMasks
from .model import Batch
from .vector import ParameterVector


@dataclass(frozen=True)
class MaskUpdate:
    """What one mask update did.

    Attributes:
        moved: weights that left, and as many that entered, each task's mask, int64 [T].
        harmony: averaged harmony score (Definition 3.2), in [-1, 1].
    """

    moved: Tensor
    harmony: float


TaskLoss = Callable[[Batch, Tensor, TaskMasks | None], Tensor]
"""The losses [G] of a batch and its target actions under some masks, or of the dense model."""


def weights_to_move(step: int, steps: int, eta_min: int, eta_max: int) -> int:
    """α_t = ⌈η_max + ½ (η_min − η_max)(1 + cos(2π t / E))⌉ (Algorithm 2)."""
    wave = 1.0 + math.cos(2.0 * math.pi * step / steps)
    # Rounding first keeps 1e-15 of error in the cosine from adding a weight.
    return math.ceil(round(eta_max + 0.5 * (eta_min - eta_max) * wave, 9))


def update_masks(
    step: int,
    config: TrainConfig,
    bank: MaskBank,
    vector: ParameterVector,
    loss: TaskLoss,
    draws: Sequence[tuple[Batch, Tensor]],
) -> MaskUpdate:
    """Update the masks of all tasks in place (Algorithm 2).

    Args:
        step: t, the optimiser steps done so far.
        draws: for each task, in order of task id, a batch of one group and its target actions.

    Raises:
        ValueError: a gradient or a loss is NaN or infinite.
    """
    maskable = vector.maskable_size
    masked_gradients = vector.weights.new_empty(len(draws), maskable)
    dense_gradients = torch.empty_like(masked_gradients)
    losses = vector.weights.new_empty(len(draws))
    for task, (batch, targets) in enumerate(draws):
        losses[task] = _gradient(
            vector, loss(batch, targets, bank.for_tasks(batch.task_ids)), masked_gradients[task]
        )
        _gradient(vector, loss(batch, targets, None), dense_gradients[task])
    moved = select_harmony(
        bank.bits,
        bank.maskable_bits,
        vector.weights[:maskable],
        masked_gradients,
        dense_gradients,
        losses,
        count=weights_to_move(step, config.steps, config.eta_min, config.eta_max),
        balance=config.balance,
        importance="fisher" if config.algorithm == "harmodt-f" else "magnitude",
        rule=config.harmony_rule,
    )
    return MaskUpdate(moved, averaged_harmony(dense_gradients, masked_gradients.mean(0)))


def averaged_harmony(gradients: Tensor, mean_gradient: Tensor) -> float:
    """Averaged harmony score (Definition 3.2): how far the tasks' gradients agree.

    Args:
        gradients: [T, P], g_i.
        mean_gradient: [P], ĝ.

    Returns:
        The mean of (g_ij ĝ_j) / (|g_ij| |ĝ_j|) over tasks and weights, in [-1, 1]; weights with a
        zero factor are left out, and the score is 0 when none remains.
    """
    signs = gradients.sign() * mean_gradient.sign()
    counted = signs.count_nonzero()
    return float(signs.sum(dtype=torch.float64) / counted.clamp(min=1))


def _gradient(vector: ParameterVector, losses: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of a one-group loss over the maskable weights to `out`."""
    vector.gradient.zero_()
    losses.sum().backward()
    out.copy_(vector.gradient[: len(out)])
    vector.gradient.zero_()
    return losses.detach()[0]
