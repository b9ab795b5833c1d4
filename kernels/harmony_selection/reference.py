"""The definition of the harmony selection in plain PyTorch (Algorithm 2 of the HarmoDT paper).

It materialises the score matrices [T, P], which the fused backends never do.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..bits import pack_bits, unpack_bits

Importance = Literal["fisher", "magnitude"]
HarmonyRule = Literal["paper", "upstream"]


def select_harmony(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    losses: Tensor,
    *,
    count: int,
    balance: float,
    importance: Importance,
    rule: HarmonyRule = "paper",
) -> Tensor:
    """Move `count` weights of every task's mask towards harmony, in place.

    Each task gives up the active weights of smallest harmony (Eq. 8-10) and takes the inactive
    weights of largest agreement with the mean gradient (Eq. 12). Both are chosen on the mask as it
    was before, ties go to the lowest index, and the number of active weights does not change.

    Args:
        mask_bits: int32 [T, P / 32], the masks; changed in place.
        maskable_bits: int32 [P / 32], 1 where the element is a weight and 0 where it is padding.
        weights: [P], the maskable weights θ.
        masked_gradients: [T, P], ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i.
        dense_gradients: [T, P], g_i = ∇L_i(θ).
        losses: [T], L_i(θ ⊙ M^i), read by the paper's Fisher importance.
        count: weights to move per task, capped by the number of candidates on either side.
        balance: λ, the weight of importance against agreement.
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
        rule: "paper", H = A + λI with I_F = (ḡ / L)²; or "upstream", H = λA + I with I_F = ḡ²,
            which is what the authors' code computes.

    Returns:
        int64 [T], how many weights moved in each task's mask.

    Raises:
        ValueError: a gradient, a loss or a score of it is NaN or infinite; the masks are then
            unchanged.
    """
    for name, values in (
        ("masked gradients", masked_gradients),
        ("dense gradients", dense_gradients),
        ("losses", losses),
    ):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the {name} hold NaN or infinity; the masks were left unchanged")
    if importance == "fisher" and rule == "paper" and not bool((losses > 0).all()):
        raise ValueError("a loss is zero, and the Fisher importance divides by it")
    mean_gradient = masked_gradients.mean(0)
    maskable = unpack_bits(maskable_bits, weights.numel())
    selected = torch.empty_like(mask_bits)
    moved = torch.zeros(len(mask_bits), dtype=torch.int64)
    for task in range(len(mask_bits)):
        active = unpack_bits(mask_bits[task], weights.numel())
        inactive = maskable & ~active
        harmony = harmony_scores(
            weights, masked_gradients[task], mean_gradient, losses[task], balance, importance, rule
        )
        agreement = dense_gradients[task] * mean_gradient
        if not bool(torch.isfinite(torch.where(active, harmony, agreement)[maskable]).all()):
            raise ValueError(f"the scores of task {task} overflow; the masks were left unchanged")
        number = min(count, int(active.sum()), int(inactive.sum()))
        active[smallest(harmony, active, number)] = False
        active[smallest(-agreement, inactive, number)] = True
        selected[task] = pack_bits(active)
        moved[task] = number
    mask_bits.copy_(selected)
    return moved


def harmony_scores(
    weights: Tensor,
    masked_gradient: Tensor,
    mean_gradient: Tensor,
    loss: Tensor,
    balance: float,
    importance: Importance,
    rule: HarmonyRule,
) -> Tensor:
    """H of one task (Eq. 8-10) over the maskable vector [P]; it holds for the active entries."""
    agreement = masked_gradient * mean_gradient
    if importance == "magnitude":
        score = weights.abs()
    elif rule == "paper":
        score = (masked_gradient / loss).square()
    else:
        score = masked_gradient.square()
    return agreement + balance * score if rule == "paper" else balance * agreement + score


def smallest(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest scores among the candidates, lowest index first on ties."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    scores = torch.where(candidates, scores, torch.inf)
    threshold = scores.topk(count, largest=False).values.max()
    below = torch.nonzero(scores < threshold).squeeze(1)
    tied = torch.nonzero((scores == threshold) & candidates).squeeze(1)
    return torch.cat([below, tied[: count - len(below)]])
