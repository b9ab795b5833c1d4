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


def upper_fence(scores: Tensor, factor: float) -> Tensor:
    """Q3 + factor (Q3 - Q1) of scores [n]; Q1 and Q3 are the ⌈n/4⌉-th and ⌈3n/4⌉-th smallest.

    Returns:
        The fence, float64 [], or 0 if it is negative, so that no weight with a negative score is
        above it: such a weight neither conflicts nor agrees. Without scores the fence is infinite.
    """
    if not len(scores):
        return scores.new_full((), math.inf, dtype=torch.float64)
    first, third = (
        scores.kthvalue(math.ceil(len(scores) * quarters / 4)).values.double()
        for quarters in (1, 3)
    )
    return (third + factor * (third - first)).clamp(min=0)


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

    The host waits for the device once before the tasks, once for each chunk of tasks, and once at
    the end. It must know how many weights it compares before PyTorch can select among them.

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
        sizes = self._sizes()
        masked, dense = self.gradients.on(draw)
        mean = masked.mean()
        found, outcomes = bank.bits.clone(), []
        for chunk, task_ids in enumerate(masked.chunks):
            of_masked, of_dense = masked.of(chunk)[0], dense.of(chunk)[0]
            conflicts, numbers = [], []
            for task, gradient in zip(task_ids, of_masked, strict=True):
                conflicting = self._conflicting(task, -gradient * mean, factor, sizes[task][0])
                conflicts.append(pack_bits(conflicting))
                numbers.append(conflicting.sum())
            counted = torch.stack(numbers).tolist()
            for i, task in enumerate(task_ids):
                before = self._levels_of(task)
                after, conflicting = before.clone(), unpack_bits(conflicts[i], len(mean))
                self._lower(after, conflicting, counted[i], of_masked[i])
                self._raise(after, before, conflicting, of_dense[i] * mean, factor, sizes[task][1])
                for level, row in enumerate(found[task :: bank.tasks]):
                    row.copy_(pack_bits(after > level))
                finite = [torch.isfinite(part[i]).all() for part in (of_masked, of_dense)]
                moved = (after < before).sum(), (after > before).sum()
                outcomes.append(torch.stack((*finite, *moved, *count_signs(of_masked[i], mean))))
        *finite, lowered, raised, agreeing, differing = torch.stack(outcomes, 1).cpu()
        _check_finite(*finite)
        bank.bits.copy_(found)
        return SoftMaskUpdate(lowered, raised, harmony_score(agreeing, differing))

    def _sizes(self) -> list[list[int]]:
        """For each task, the number of active weights, and of weights whose level is below L."""
        sizes = []
        for levels in map(self._levels_of, range(self._bank.tasks)):
            below = self._maskable & (levels < self._bank.levels)
            sizes.append(torch.stack(((levels > 0).sum(), below.sum())))
        return torch.stack(sizes).tolist()

    def _levels_of(self, task: int) -> Tensor:
        """The level of each weight in a task's mask, uint8 [P_m]."""
        rows = self._bank.bits[task :: self._bank.tasks]
        return unpack_bits(rows, self._bank.vector.maskable_size).sum(0, dtype=torch.uint8)

    def _conflicting(self, task: int, conflict: Tensor, factor: float, active: int) -> Tensor:
        """Which of a task's weights conflict, bool [P_m].

        An active weight conflicts if -ḡ_i ĝ lies above the fence of all active weights.

        Args:
            conflict: -ḡ_i ĝ, [P_m].
            active: the number of active weights.
        """
        chosen = self._levels_of(task) > 0
        return chosen & (conflict > upper_fence(conflict[_places(chosen, active)], factor))

    def _lower(self, after: Tensor, conflicting: Tensor, number: int, masked: Tensor) -> None:
        """Lower the level of each conflicting weight to the one that its ḡ_i² lets it keep.

        Args:
            after: the levels, uint8 [P_m], which are changed.
            conflicting: bool [P_m], True for `number` weights.
            masked: ḡ_i, [P_m]; its square is the Fisher information.
        """
        places = _places(conflicting, number)
        kept = retained_levels(masked[places].square(), self._bank.levels)
        after[places] = after[places].minimum(kept)

    def _raise(
        self,
        after: Tensor,
        before: Tensor,
        conflicting: Tensor,
        harmony: Tensor,
        factor: float,
        below: int,
    ) -> None:
        """Raise levels by one where the tasks agree.

        The scores g_i ĝ of all weights whose level is below L give a fence. If the score of such a
        weight is above this fence, and the weight does not conflict, its level rises.

        Args:
            after: the levels, uint8 [P_m], which are changed.
            before: the levels before the update.
            harmony: g_i ĝ, [P_m].
            below: the number of weights whose level was below L.
        """
        chosen = self._maskable & (before < self._bank.levels)
        fence = upper_fence(harmony[_places(chosen, below)], factor)
        after += chosen & (harmony > fence) & ~conflicting


def _places(chosen: Tensor, number: int) -> Tensor:
    """The indices where `chosen`, bool [P_m], is True, int64 [number].

    The caller knows the number, so the host does not wait for the device.
    """
    return torch.nonzero_static(chosen, size=number)[:, 0]


def _check_finite(masked: Tensor, dense: Tensor) -> None:
    """Refuse the gradients of all tasks if one is NaN or infinite.

    Args:
        masked, dense: [T] on the CPU, 1 where a task's gradient is finite.

    Raises:
        NotFinite: a gradient is NaN or infinite.
    """
    for task, finite in enumerate(torch.stack((masked, dense), 1).tolist()):
        for name, good in zip(("masked", "dense"), finite, strict=True):
            if not good:
                raise NotFinite(task, f"its {name} gradient holds NaN or infinity")
