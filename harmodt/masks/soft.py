"""Soft masks: values between 0 and 1, lowered where tasks conflict and raised where they agree.

After SoCo-DT (Wang et al., arXiv 2511.13133), as far as its abstract goes; docs/baselines.md says
what that leaves open and what was chosen.
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
from .gradients import Draw, GradientFamilies, harmony_score


@dataclass(frozen=True)
class SoftMaskUpdate:
    """What one update of soft masks did.

    Attributes:
        lowered, raised: weights whose value in each task's mask became less and more, int64 [T].
        harmony: averaged harmony score (Definition 3.2 of the HarmoDT paper) of the masked
            gradients, in [-1, 1].
    """

    lowered: Tensor
    raised: Tensor
    harmony: float


def fence_factor(step: int, steps: int, settings: SoftMaskSettings) -> float:
    """How many interquartile ranges a threshold lies above the third quartile.

    From `fence_max` at the start it falls along half a cosine to `fence_min` after `fence_peak` of
    the run, and rises along another one until the end.
    """
    done = step / steps
    rising = done < settings.fence_peak
    part = done / settings.fence_peak if rising else (1 - done) / (1 - settings.fence_peak)
    wave = 0.5 * (1 - math.cos(math.pi * part))
    return settings.fence_max + (settings.fence_min - settings.fence_max) * wave


def upper_fence(scores: Tensor, factor: float) -> float:
    """Q3 + factor (Q3 - Q1) of scores [n], quartiles being the ⌈n/4⌉-th and ⌈3n/4⌉-th smallest.

    Returns:
        At least 0, for a score below says the opposite; infinity if there are no scores.
    """
    if not len(scores):
        return math.inf
    first, third = (
        scores.kthvalue(math.ceil(len(scores) * quarters / 4)).values.double()
        for quarters in (1, 3)
    )
    return max(float(third + factor * (third - first)), 0.0)


def retained_levels(importance: Tensor, levels: int) -> Tensor:
    """The level, uint8 [n] of 0 to L, that each of n conflicting weights may keep at most.

    The weights are parted by importance into L + 1 groups of as equal size as ties allow: the least
    important may keep nothing, the most important all.
    """
    kept = torch.zeros(len(importance), dtype=torch.uint8, device=importance.device)
    for part in range(1, levels + 1) if len(importance) else ():
        place = max(len(importance) * part // (levels + 1), 1)
        kept += importance > importance.kthvalue(place).values
    return kept


class SoftMaskUpdater:
    """Updates the soft masks of all tasks in place.

    Args:
        bank: the masks.
        families: the tasks' gradients.
        settings: of the thresholds.
        steps: E, of the run.
    """

    def __init__(
        self, bank: MaskBank, families: GradientFamilies, settings: SoftMaskSettings, steps: int
    ):
        self.families = families
        self._bank = bank
        self._settings = settings
        self._steps = steps
        self._maskable = unpack_bits(bank.maskable_bits, bank.vector.maskable_size)

    def update(self, step: int, draw: Draw) -> SoftMaskUpdate:
        """Lower and raise values in every task's mask.

        Args:
            step: t, the optimiser steps done so far.
            draw: the tasks' batches.

        Raises:
            NotFinite: a gradient is NaN or infinite; the masks are then unchanged.
        """
        bank, factor = self._bank, fence_factor(step, self._steps, self._settings)
        masked, dense = self.families.of(draw)
        mean = masked.mean()
        found, counts = bank.bits.clone(), []
        for part, task_ids in enumerate(masked.parts):
            gradients = zip(task_ids, masked.of(part)[0], dense.of(part)[0], strict=True)
            for task, of_masked, of_dense in gradients:
                _check_finite(task, of_masked, of_dense)
                before = self._levels_of(task)
                after = self._moved(before, of_masked, of_dense, mean, factor)
                for level, row in enumerate(found[task :: bank.tasks]):
                    row.copy_(pack_bits(after > level))
                moved = (after < before).sum(), (after > before).sum()
                counts.append(torch.stack((*moved, *count_signs(of_masked, mean))))
        bank.bits.copy_(found)
        lowered, raised, agreeing, differing = torch.stack(counts, 1)
        return SoftMaskUpdate(lowered, raised, harmony_score(agreeing, differing))

    def _levels_of(self, task: int) -> Tensor:
        """How many levels each weight of a task's mask has, uint8 [P_m]."""
        rows = self._bank.bits[task :: self._bank.tasks]
        return unpack_bits(rows, self._bank.vector.maskable_size).sum(0, dtype=torch.uint8)

    def _moved(
        self, before: Tensor, masked: Tensor, dense: Tensor, mean: Tensor, factor: float
    ) -> Tensor:
        """A task's levels after an update, from its levels, all [P_m].

        An active weight conflicts if -ḡ_i ĝ lies above the fence of the active ones': its level
        falls to what its Fisher information ḡ_i² lets it keep. Another one below the highest level
        is in harmony if g_i ĝ lies above the fence of such weights: its level rises by one.
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
