"""Algorithm 2 of the HarmoDT paper: gradients of every task, then the harmony selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import Backend, Selection
from harmodt_kernels.harmony_selection import Importance

from ..config import LearnedMaskSettings
from .bank import MaskBank, TaskMasks
from .gradients import HarmonyScore, TaskGradients, TaskLosses


@dataclass(frozen=True)
class MaskUpdate:
    """What one mask update did.

    Attributes:
        moved: weights that left, and as many that entered, each task's mask, int64 [T].
        harmony: averaged harmony score (Definition 3.2) of the masked gradients, in [-1, 1].
    """

    moved: Tensor
    harmony: float


def weights_to_move(step: int, steps: int, eta_min: int, eta_max: int) -> int:
    """α_t = ⌈η_max + ½ (η_min − η_max)(1 + cos(2π t / E))⌉ (Eq. 12, Algorithm 1)."""
    wave = 1.0 + math.cos(2.0 * math.pi * step / steps)
    # Rounding first keeps 1e-15 of error in the cosine from adding a weight.
    return math.ceil(round(eta_max + 0.5 * (eta_min - eta_max) * wave, 9))


class MaskUpdater:
    """Updates the masks of all tasks in place.

    Gradients are computed for as many tasks at a time as a training step holds. If the masked ones
    of all tasks fit into `mask_update_gb`, they are kept from the mean to the selection.

    Args:
        bank: the masks.
        backend: its harmony selection is used.
        settings: λ, α_t's bounds, the rule.
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
        steps: E, of the run.
        tasks_at_once: whose gradients are computed together.
    """

    def __init__(
        self,
        bank: MaskBank,
        backend: Backend,
        settings: LearnedMaskSettings,
        importance: Importance,
        steps: int,
        tasks_at_once: int,
    ):
        self._bank = bank
        self._backend = backend
        self._settings = settings
        self._importance = importance
        self._steps = steps
        self._tasks_at_once = tasks_at_once

    def update(self, step: int, losses: TaskLosses) -> MaskUpdate:
        """Move weights out of and into every task's mask.

        Args:
            step: t, the optimiser steps done so far.
            losses: computes the tasks' losses.

        Raises:
            ValueError: a gradient or a loss is NaN or infinite; the masks are then unchanged.
        """
        settings = self._settings
        count = weights_to_move(step, self._steps, settings.eta_min, settings.eta_max)
        masked = self._gradients(losses, dense=False)
        dense = self._gradients(losses, dense=True)
        mean = masked.mean()
        harmony, selections = HarmonyScore(mean), []
        for part, task_ids in enumerate(masked.parts):
            of_masks, of_losses = masked.of(part)
            harmony.add(of_masks)
            without_masks, _ = dense.of(part)
            selections.append(
                self._select(task_ids, count, mean, of_masks, without_masks, of_losses)
            )
        # Nothing moves before every task's gradients were found to be finite.
        selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
        self._backend.move_weights(self._bank.bits, selection)
        return MaskUpdate(selection.moved, harmony.value())

    def _gradients(self, losses: TaskLosses, *, dense: bool) -> TaskGradients:
        """ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i, or g_i = ∇L_i(θ), which are needed once."""
        bank, at_once = self._bank, self._tasks_at_once
        task_ids = range(len(bank.bits))
        parts = [task_ids[i : i + at_once] for i in task_ids[::at_once]]
        if not dense:
            to_keep = self._settings.mask_update_gb * 1e9
            return TaskGradients(bank.vector, losses, bank.for_tasks, parts, to_keep)

        def without_masks(task_ids: Tensor, group_gradients: Tensor) -> TaskMasks:
            return TaskMasks(bank.vector, None, task_ids, group_gradients)

        return TaskGradients(bank.vector, losses, without_masks, parts)

    def _select(
        self,
        task_ids: Sequence[int],
        count: int,
        mean: Tensor,
        masked_gradients: Tensor,
        dense_gradients: Tensor,
        losses: Tensor,
    ) -> Selection:
        """Which weights leave (Eq. 9) and enter (Eq. 10) the masks of these consecutive tasks."""
        bank = self._bank
        return self._backend.select_harmony(
            bank.bits[task_ids[0] : task_ids[-1] + 1],
            bank.maskable_bits,
            bank.vector.weights[: bank.vector.maskable_size],
            masked_gradients,
            dense_gradients,
            mean,
            losses,
            count=count,
            balance=self._settings.balance,
            importance=self._importance,
            rule=self._settings.harmony_rule,
        )
