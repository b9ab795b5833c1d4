"""Soft masks have values between 0 and 1. Conflicts lower a value, and agreement raises it.

They follow SoCo-DT (Wang et al., arXiv 2511.13133), as far as its abstract describes them.
docs/baselines.md lists the choices that the abstract leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import NotFinite, pack_bits, unpack_bits
from harmodt_kernels.harmony_selection import count_signs

from ..config import SoftMaskSettings
from .bank import MaskBank
from .gradients import Draw, UpdateGradients, harmony_score


@dataclass(frozen=True)
class SoftMaskUpdate:
    """The outcome of one update of soft masks.

    Attributes:
        lowered, raised: number of values in each task's mask that fell and that rose, int64 [T].
        harmony: averaged harmony score (Definition 3.2 of the HarmoDT paper) of the masked
            gradients, in [-1, 1].
    """

    lowered: Tensor
    raised: Tensor
    harmony: float


def fence_factor(step: int, steps: int, settings: SoftMaskSettings) -> float:
    """How far the threshold lies above the third quartile, in interquartile ranges.

    It falls from `fence_max` to `fence_min` while the share of done steps grows from 0 to
    `fence_peak`. Then it rises to `fence_max` until the end. Both parts are half a cosine.
    """
    done = step / steps
    rising = done < settings.fence_peak
    part = done / settings.fence_peak if rising else (1 - done) / (1 - settings.fence_peak)
    wave = 0.5 * (1 - math.cos(math.pi * part))
    return settings.fence_max + (settings.fence_min - settings.fence_max) * wave


def upper_fence(scores: Tensor, factor: float) -> float:
    """Q3 + factor (Q3 - Q1) of scores [n]; Q1 and Q3 are the ⌈n/4⌉-th and ⌈3n/4⌉-th smallest.

    Returns:
        The fence, or 0 if it is negative, so that no weight with a negative score is above it: such
        a weight neither conflicts nor agrees. Without scores the fence is infinite.
    """
    if not len(scores):
        return math.inf
    first, third = (
        scores.kthvalue(math.ceil(len(scores) * quarters / 4)).values.double()
        for quarters in (1, 3)
    )
    return max(float(third + factor * (third - first)), 0.0)


def retained_levels(importance: Tensor, levels: int) -> Tensor:
    """The highest level that each of n conflicting weights may keep, uint8 [n] from 0 to L.

    Importance divides the weights into L + 1 groups, which are of equal size if there are no ties.
    The least important group keeps level 0, and the most important group keeps level L.
    """
    kept = torch.zeros(len(importance), dtype=torch.uint8, device=importance.device)
    # A weight gains one level for each boundary between groups that its importance exceeds.
    for part in range(1, levels + 1) if len(importance) else ():
        place = max(len(importance) * part // (levels + 1), 1)
        kept += importance > importance.kthvalue(place).values
    return kept


class SoftMaskUpdater:
    """Updates the soft masks of all tasks in place.

    Args:
        bank: the masks.
        gradients: computes the per-task gradients.
        settings: the settings of the thresholds.
        steps: E, the steps of the run.
    """

    def __init__(
        self, bank: MaskBank, gradients: UpdateGradients, settings: SoftMaskSettings, steps: int
    ):
        self.gradients = gradients
        self._bank = bank
        self._settings = settings
        self._steps = steps
        self._maskable = unpack_bits(bank.maskable_bits, bank.vector.maskable_size)

    def update(self, step: int, draw: Draw) -> SoftMaskUpdate:
        """Lower and raise values in every task's mask.

        Args:
            step: t, the number of optimiser steps so far.
            draw: draws the tasks' batches.

        Raises:
            NotFinite: a gradient is NaN or infinite; the masks are then unchanged.
        """
        bank, factor = self._bank, fence_factor(step, self._steps, self._settings)
        masked, dense = self.gradients.on(draw)
        mean = masked.mean()
        found, counts = bank.bits.clone(), []
        for chunk, task_ids in enumerate(masked.chunks):
            gradients = zip(task_ids, masked.of(chunk)[0], dense.of(chunk)[0], strict=True)
            for task, masked_gradient, dense_gradient in gradients:
                _check_finite(task, masked_gradient, dense_gradient)
                before = self._levels_of(task)
                after = self._moved(before, masked_gradient, dense_gradient, mean, factor)
                for level, row in enumerate(found[task :: bank.tasks]):
                    row.copy_(pack_bits(after > level))
                moved = (after < before).sum(), (after > before).sum()
                counts.append(torch.stack((*moved, *count_signs(masked_gradient, mean))))
        bank.bits.copy_(found)
        lowered, raised, agreeing, differing = torch.stack(counts, 1)
        return SoftMaskUpdate(lowered, raised, harmony_score(agreeing, differing))

    def _levels_of(self, task: int) -> Tensor:
        """The level of each weight in a task's mask, uint8 [P_m]."""
        rows = self._bank.bits[task :: self._bank.tasks]
        return unpack_bits(rows, self._bank.vector.maskable_size).sum(0, dtype=torch.uint8)

    def _moved(
        self, before: Tensor, masked: Tensor, dense: Tensor, mean: Tensor, factor: float
    ) -> Tensor:
        """A task's levels after an update; all tensors are [P_m].

        An active weight conflicts if -ḡ_i ĝ lies above the fence of all active weights. Its level
        falls to the level that its Fisher information ḡ_i² lets it keep. The scores g_i ĝ of
        all weights whose level is below L give a second fence. If the score of such a weight lies
        above this fence, and the weight does not conflict, its level rises by one.
        """
        levels, after = self._bank.levels, before.clone()
        active, suppressed = before > 0, self._maskable & (before < levels)
        conflict, harmony = -masked * mean, dense * mean
        conflicting = active & (conflict > upper_fence(conflict[active], factor))
        kept = retained_levels(masked[conflicting].square(), levels)
        after[conflicting] = after[conflicting].minimum(kept)
        agreeing = suppressed & (harmony > upper_fence(harmony[suppressed], factor))
        after += agreeing & ~conflicting
        return after


def _check_finite(task: int, masked: Tensor, dense: Tensor) -> None:
    for name, gradient in (("masked", masked), ("dense", dense)):
        if not bool(torch.isfinite(gradient).all()):
            raise NotFinite(task, f"its {name} gradient holds NaN or infinity")
