"""Defines the harmony selection in plain PyTorch (Algorithm 2 of the HarmoDT paper).

It stores the scores of one task at a time. The fused backends store few of a task's scores, unless
many weights move.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..bits import unpack_bits

Importance = Literal["fisher", "magnitude"]
HarmonyRule = Literal["paper", "upstream-score"]

REFUSALS = (
    "its masked gradient holds NaN or infinity",
    "its dense gradient holds NaN or infinity",
    "its loss is NaN or infinite",
    "its loss is not above zero, and the Fisher importance divides by it",
    "the mean gradient holds NaN or infinity",
    "its scores overflow",
)
"""The reasons to refuse a task's selection. If several hold, the first counts."""

_FROM_FINITE = (4, 6)
"""The refusals, counted from 1, that occur although every gradient and every loss is finite."""


class UpdateRefused(ValueError):
    """No mask is updated, because of one task.

    Attributes:
        task: the index of the task.
        reason: what is wrong with the task.
    """

    def __init__(self, task: int, reason: str):
        super().__init__(f"task {task}: {reason}; no mask was changed")
        self.task = task
        self.reason = reason


class NotFinite(UpdateRefused):
    """A gradient or a loss of the task, or the tasks' mean gradient, is NaN or infinite."""


class Selection(NamedTuple):
    """The weights that leave and enter each task's mask.

    Attributes:
        leaving, entering: int64 [T, C], indices into the maskable vector, in no particular order.
            In each row the first `moved` indices count; the rest are -1.
        moved: int64 [T], the number of weights that leave and of weights that enter.
        agreeing, differing: int64 [T], the number of weights whose ḡ_i and ĝ have the same sign
            and opposite signs (Definition 3.2). If one of the two is 0, the weight is not counted.
        refused: uint8 [T], 0 for a valid selection, else 1 + the index of the reason in `REFUSALS`.
            The task's other results are then meaningless.
    """

    leaving: Tensor
    entering: Tensor
    moved: Tensor
    agreeing: Tensor
    differing: Tensor
    refused: Tensor

    def check(self) -> None:
        """Wait for the selection.

        Raises:
            NotFinite: a gradient or a loss is NaN or infinite.
            UpdateRefused: all are finite, but a task's scores cannot be computed from them.
        """
        refused = self.refused.tolist()
        if any(refused):
            # NaN in one task's gradient makes the mean NaN, so every task is refused. The task with
            # the NaN has the lowest number, because in REFUSALS the mean comes after the gradients.
            number = min(filter(None, refused))
            kind = UpdateRefused if number in _FROM_FINITE else NotFinite
            raise kind(refused.index(number), REFUSALS[number - 1])


def select_harmony(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    mean_gradient: Tensor,
    losses: Tensor,
    *,
    count: int,
    balance: float,
    importance: Importance,
    rule: HarmonyRule = "paper",
) -> Selection:
    """Select the `count` weights that leave each task's mask and the `count` weights that enter it.

    The active weights of smallest harmony leave (Eq. 8 and 9). The inactive weights of largest
    agreement with the mean gradient enter (Eq. 10). Both sets are selected with the current mask,
    and ties go to the lowest index. This function changes nothing: `move_weights` applies the
    selection. It refuses the selection if a gradient, a loss or a score is NaN or infinite.

    Every implementation takes these arguments.

    Args:
        mask_bits: int32 [T, P / 32], the masks.
        maskable_bits: int32 [P / 32], 1 for a weight and 0 for padding.
        weights: [P], the maskable weights θ.
        masked_gradients: [T, P], ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i.
        dense_gradients: [T, P], g_i = ∇L_i(θ).
        mean_gradient: [P], ĝ, the mean of ḡ_i over all tasks, also if this call has only some.
        losses: [T], L_i(θ ⊙ M^i). Only the paper's Fisher importance reads them.
        count: weights to move per task. If a task has fewer active or fewer inactive weights, it
            moves fewer.
        balance: λ, the weight of importance against agreement.
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
        rule: "paper", H = A + λI with I_F = (ḡ / L)²; or "upstream-score", H = λA + I with
            I_F = ḡ², the score that the authors' code computes.

    Raises:
        ValueError: the importance or the rule is unknown.
    """
    check_choice(importance, rule)
    divides = importance == "fisher" and rule == "paper"
    tasks, columns = len(mask_bits), min(count, weights.numel())
    maskable = unpack_bits(maskable_bits, weights.numel())
    leaving = torch.full((tasks, columns), -1, device=weights.device)
    entering = leaving.clone()
    moved, agreeing, differing = torch.zeros(3, tasks, dtype=torch.int64, device=weights.device)
    refused = torch.zeros(tasks, dtype=torch.uint8, device=weights.device)
    for task in range(tasks):
        masked, dense, loss = masked_gradients[task], dense_gradients[task], losses[task]
        active = unpack_bits(mask_bits[task], weights.numel())
        inactive = maskable & ~active
        harmony = harmony_scores(weights, masked, mean_gradient, loss, balance, importance, rule)
        agreement = dense * mean_gradient
        scores = torch.where(active, harmony, agreement)[maskable]
        refused[task] = refusal(masked, dense, loss, divides, mean_gradient, scores)
        if refused[task]:
            continue
        mean_of_weights = torch.where(maskable, mean_gradient, 0.0)
        agreeing[task], differing[task] = count_signs(masked, mean_of_weights)
        number = min(count, int(active.sum()), int(inactive.sum()))
        leaving[task, :number] = smallest(harmony, active, number)
        entering[task, :number] = smallest(-agreement, inactive, number)
        moved[task] = number
    return Selection(leaving, entering, moved, agreeing, differing, refused)


def move_weights(mask_bits: Tensor, selection: Selection) -> None:
    """Remove the leaving weights from each task's mask and add the entering ones, in place.

    Args:
        mask_bits: int32 [T, P / 32].
        selection: the selection for the same T tasks.

    Raises:
        UpdateRefused: as `Selection.check` does; no weight was moved.
    """
    selection.check()
    indices = torch.cat((selection.leaving, selection.entering), 1)
    for row, chosen in zip(mask_bits, indices, strict=True):
        chosen = chosen[chosen >= 0]
        flips = torch.zeros_like(row)
        # Each bit is added at most once, so the sum is the union of the bits.
        flips.index_add_(0, chosen // 32, (1 << (chosen % 32)).to(torch.int32))
        row ^= flips


def check_choice(importance: str, rule: str) -> None:
    """Raise ValueError if the importance or the rule is unknown."""
    for name, chosen, choices in (
        ("importance", importance, get_args(Importance)),
        ("rule", rule, get_args(HarmonyRule)),
    ):
        if chosen not in choices:
            raise ValueError(f"{name} is {chosen!r}: it must be {' or '.join(choices)}")


def refusal(
    masked: Tensor, dense: Tensor, loss: Tensor, divides: bool, mean: Tensor, scores: Tensor
) -> int:
    """A task's value of `Selection.refused`. `divides`: the importance divides by the loss."""
    masked_is_fine, dense_is_fine, loss_is_fine, mean_is_fine, scores_are_fine = (
        bool(torch.isfinite(values).all()) for values in (masked, dense, loss, mean, scores)
    )
    usable = bool(loss > 0) or not divides
    fine = masked_is_fine, dense_is_fine, loss_is_fine, usable, mean_is_fine, scores_are_fine
    return 0 if all(fine) else 1 + fine.index(False)


def count_signs(gradients: Tensor, mean_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Count the signs that agree with the mean gradient's and those that differ, int64 [...].

    Args:
        gradients: [..., P].
        mean_gradient: [P].
    """
    signs = gradients.sign() * mean_gradient.sign()
    return (signs > 0).sum(-1), (signs < 0).sum(-1)


def harmony_scores(
    weights: Tensor,
    masked_gradient: Tensor,
    mean_gradient: Tensor,
    loss: Tensor,
    balance: float,
    importance: Importance,
    rule: HarmonyRule,
) -> Tensor:
    """The harmony H of one task (Eq. 8), [P]. Only active weights have one."""
    agreement = masked_gradient * mean_gradient
    if importance == "magnitude":
        score = weights.abs()
    elif rule == "paper":
        score = (masked_gradient * loss.reciprocal()).square()
    else:
        score = masked_gradient.square()
    return agreement + balance * score if rule == "paper" else balance * agreement + score


def smallest(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The indices of the `count` smallest scores among the candidates. Ties go to low indices."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    scores = torch.where(candidates, scores, torch.inf)
    threshold = scores.topk(count, largest=False).values.max()
    below = torch.nonzero(scores < threshold).squeeze(1)
    tied = torch.nonzero((scores == threshold) & candidates).squeeze(1)
    return torch.cat([below, tied[: count - len(below)]])
