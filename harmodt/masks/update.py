"""Algorithm 2 of the HarmoDT paper: gradients of every task, then the harmony selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import Selection

from ..batch import Batch
from ..config import TrainConfig
from .bank import MaskBank, TaskMasks
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


TaskLoss = Callable[[Batch, Tensor, TaskMasks], Tensor]
"""The losses [G] of a batch and its target actions under some masks."""

Draw = Callable[[Sequence[int]], tuple[Batch, Tensor]]
"""A batch of one group for each task, and its target actions; the same for the same tasks."""


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
    draw: Draw,
) -> MaskUpdate:
    """Update the masks of all tasks in place (Algorithm 2).

    Gradients are computed for as many tasks at a time as a training step holds. If those of all
    tasks fit into `config.mask_update_gb`, they are kept from the mean to the selection; if not,
    they are computed again for the selection, and memory does not grow with the number of tasks.
    The masks come out the same.

    Args:
        step: t, the optimiser steps done so far.

    Raises:
        ValueError: a gradient or a loss is NaN or infinite; the masks are then unchanged.
    """
    tasks = range(len(bank.bits))
    parts = [tasks[i : i + config.tasks_per_step] for i in tasks[:: config.tasks_per_step]]
    gradients = _Gradients(bank, vector, loss, draw)
    fits = 2 * len(tasks) * vector.maskable_size * 4 <= config.mask_update_gb * 1e9
    kept = [gradients.of(part) for part in parts] if fits else None
    masked = (gradients.masked(part)[0] for part in parts) if kept is None else (k[0] for k in kept)
    mean = torch.zeros_like(vector.weights[: vector.maskable_size])
    for part_gradients in masked:
        mean += part_gradients.sum(0)
    mean /= len(tasks)
    selections, signs = [], _Signs(mean)
    for part in parts:
        masked_gradients, dense_gradients, losses = kept.pop(0) if kept else gradients.of(part)
        signs.add(dense_gradients)
        selections.append(
            bank.backend.select_harmony(
                bank.bits[part.start : part.stop],
                bank.maskable_bits,
                vector.weights[: vector.maskable_size],
                masked_gradients,
                dense_gradients,
                mean,
                losses,
                count=weights_to_move(step, config.steps, config.eta_min, config.eta_max),
                balance=config.balance,
                importance="fisher" if config.algorithm == "harmodt-f" else "magnitude",
                rule=config.harmony_rule,
            )
        )
    # Nothing moves before every task's gradients were found to be finite.
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    bank.backend.move_weights(bank.bits, selection)
    return MaskUpdate(selection.moved, signs.averaged_harmony())


class _Gradients:
    """Computes the gradients of several tasks' losses over the maskable weights, [G, P]."""

    def __init__(self, bank: MaskBank, vector: ParameterVector, loss: TaskLoss, draw: Draw):
        self._bank = bank
        self._vector = vector
        self._loss = loss
        self._draw = draw

    def of(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i, g_i = ∇L_i(θ) and the losses L_i(θ ⊙ M^i), [G]."""
        masked, losses = self.masked(tasks)
        dense = self._zeros(tasks)
        self._backward(tasks, self._bank.dense(len(tasks), dense))
        return masked, dense, losses

    def masked(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ḡ_i and the losses, [G]."""
        masked = self._zeros(tasks)
        task_ids = torch.tensor(list(tasks), device=masked.device)
        return masked, self._backward(tasks, self._bank.for_tasks(task_ids, masked))

    def _backward(self, tasks: Sequence[int], masks: TaskMasks) -> Tensor:
        losses = self._loss(*self._draw(tasks), masks)
        losses.sum().backward()
        self._vector.gradient.zero_()  # what the weights without masks got
        return losses.detach()

    def _zeros(self, tasks: Sequence[int]) -> Tensor:
        # zeros, because nothing is written to the padding
        return self._vector.weights.new_zeros(len(tasks), self._vector.maskable_size)


class _Signs:
    """Sums up the averaged harmony score (Definition 3.2): how far the tasks' gradients agree.

    It is the mean of (g_ij ĝ_j) / (|g_ij| |ĝ_j|) over tasks and weights; weights with a zero
    factor are left out.

    Args:
        mean_gradient: ĝ, [P].
    """

    def __init__(self, mean_gradient: Tensor):
        self._mean_signs = mean_gradient.sign()
        self._sum = mean_gradient.new_zeros((), dtype=torch.float64)
        self._counted = mean_gradient.new_zeros((), dtype=torch.int64)

    def add(self, gradients: Tensor) -> None:
        """Count in some tasks' g_i, [G, P]."""
        for gradient in gradients:
            signs = gradient.sign().mul_(self._mean_signs)
            self._sum += signs.sum(dtype=torch.float64)
            self._counted += signs.count_nonzero()

    def averaged_harmony(self) -> float:
        """The score, in [-1, 1]; 0 when every weight was left out."""
        return float(self._sum / self._counted.clamp(min=1))
