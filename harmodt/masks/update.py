"""Algorithm 2 of the HarmoDT paper: per-task gradients, then the harmony selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import Backend, NotFinite, Selection, UpdateRefused
from harmodt_kernels.harmony_selection import Importance

from ..config import LearnedMaskSettings
from ..errors import UserError
from .bank import MaskBank
from .gradients import Draw, TaskGradients, UpdateGradients, harmony_score


@dataclass(frozen=True)
class MaskUpdate:
    """The outcome of one mask update.

    Attributes:
        moved: number of weights that left each task's mask, int64 [T]; the same number entered.
        harmony: averaged harmony score (Definition 3.2) of the masked gradients, in [-1, 1].
    """

    moved: Tensor
    harmony: float


def weights_to_move(step: int, steps: int, eta_min: int, eta_max: int) -> int:
    """α_t = ⌈η_max + ½ (η_min − η_max)(1 + cos(2π t / E))⌉ (Eq. 12, Algorithm 1)."""
    wave = 1.0 + math.cos(2.0 * math.pi * step / steps)
    # Round first. Otherwise an error of 1e-15 in the cosine could add a weight.
    return math.ceil(round(eta_max + 0.5 * (eta_min - eta_max) * wave, 9))


class MaskUpdater:
    """Updates the masks of all tasks in place.

    Without dropout, the new masks do not depend on the number of tasks in a chunk.

    Args:
        bank: the masks.
        gradients: computes the per-task gradients.
        backend: the backend that computes the harmony selection.
        settings: λ, the bounds of α_t, and the harmony rule.
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
        steps: E, the steps of the run.
    """

    def __init__(
        self,
        bank: MaskBank,
        gradients: UpdateGradients,
        backend: Backend,
        settings: LearnedMaskSettings,
        importance: Importance,
        steps: int,
    ):
        self.gradients = gradients
        self._bank = bank
        self._backend = backend
        self._settings = settings
        self._importance = importance
        self._steps = steps

    def update(self, step: int, draw: Draw) -> MaskUpdate:
        """Move weights out of and into every task's mask.

        Args:
            step: t, the number of optimiser steps so far.
            draw: draws the tasks' batches.

        Raises:
            NotFinite: a gradient or a loss is NaN or infinite; the masks are then unchanged.
            UserError: the gradients give no valid scores; the masks are then unchanged.
        """
        settings = self._settings
        count = weights_to_move(step, self._steps, settings.eta_min, settings.eta_max)
        masked, dense = self.gradients.on(draw)
        mean = masked.mean()
        selections = [
            self._select(chunk, count, mean, masked, dense) for chunk in range(len(masked.chunks))
        ]
        selection = Selection(*(torch.cat(chunks) for chunks in zip(*selections, strict=True)))
        # The host waits for the device here. If any task has NaN or infinity, no weight moves.
        try:
            self._backend.move_weights(self._bank.bits, selection)
        except NotFinite:
            raise
        except UpdateRefused as refused:
            raise UserError(
                f"the mask update after step {step} cannot score the weights ({refused}): begin a "
                "new run with --harmony-rule upstream-score, which does not divide by the loss, or "
                "with a smaller --balance"
            ) from refused
        return MaskUpdate(selection.moved, harmony_score(selection.agreeing, selection.differing))

    def _select(
        self, chunk: int, count: int, mean: Tensor, masked: TaskGradients, dense: TaskGradients
    ) -> Selection:
        """Select the weights that leave (Eq. 9) and enter (Eq. 10) the masks of one chunk."""
        bank, task_ids = self._bank, masked.chunks[chunk]
        masked_gradients, losses = masked.of(chunk)
        dense_gradients, _ = dense.of(chunk)
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
