"""The fused harmony selection: its public functions, its checks and its registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import BITS_PER_WORD
from ..operands import check
from ..registration import register
from .reference import HarmonyRule, Importance, Selection, check_choice

# The kernels index elements with 32-bit integers. The last indices stay unused, because the last
# chunk, or the last block of values of a program, may reach beyond the end of the vector.
MOST_BITS = 2**31 - 2048


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

    This is the fused form of `reference.select_harmony`, with the same arguments and the same
    result, in float32. It reads the gradients once, and a second time only in the chunks that can
    hold selected weights. Its workspace does not grow with the number of tasks. The host does not
    wait for the device.

    Args:
        mask_bits: int32 [T, P / 32], the masks.
        maskable_bits: int32 [P / 32], 1 for a weight and 0 for padding.
        weights: float32 [P], the maskable weights θ; P ≤ 2³¹ - 2048.
        masked_gradients: float32 [T, P], ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i.
        dense_gradients: float32 [T, P], g_i = ∇L_i(θ).
        mean_gradient: float32 [P], ĝ, the mean of ḡ_i over all tasks.
        losses: float32 [T], L_i(θ ⊙ M^i). Only the paper's Fisher importance reads them.
        count: weights to move per task. If a task has fewer active or fewer inactive weights, it
            moves fewer.
        balance: λ, the weight of importance against agreement.
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
        rule: "paper" or "upstream-score", as in `reference.select_harmony`.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes, strides or devices do not fit together, the importance or the rule is
            unknown, or the count is below 0.
    """
    check_choice(importance, rule)
    if count < 0:
        raise ValueError(f"count is {count}: it must be at least 0")
    _check_tensors(
        mask_bits,
        maskable_bits,
        weights,
        masked_gradients,
        dense_gradients,
        mean_gradient,
        losses,
    )
    leaving, entering, counts, refused = torch.ops.harmodt.select_harmony(
        mask_bits,
        maskable_bits,
        weights,
        masked_gradients,
        dense_gradients,
        mean_gradient,
        losses,
        count,
        balance,
        importance,
        rule,
    )
    moved, agreeing, differing = counts.unbind(1)
    return Selection(leaving, entering, moved, agreeing, differing, refused)


def move_weights(mask_bits: Tensor, selection: Selection) -> None:
    """Remove the leaving weights from each task's mask and add the entering ones, in place.

    If it raises an error, no weight was moved.

    Args:
        mask_bits: int32 [T, P / 32]; rows may have gaps between them.
        selection: the selection for the same T tasks. A GPU does not check its indices.

    Raises:
        UpdateRefused: as `Selection.check` does.
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices do not fit together, or a row of bits has gaps.
        IndexError: on a CPU, an index lies beyond the mask.
    """
    check("mask_bits", mask_bits, torch.int32, (None, None), mask_bits.device, layout="rows")
    shape = len(mask_bits), selection.leaving.shape[-1]
    for name in ("leaving", "entering"):
        indices = getattr(selection, name)
        beside = [("mask_bits", mask_bits)]
        check(f"selection.{name}", indices, torch.int64, shape, mask_bits.device, beside=beside)
    selection.check()
    torch.ops.harmodt.move_weights(mask_bits, selection.leaving, selection.entering)


def _check_tensors(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    mean_gradient: Tensor,
    losses: Tensor,
) -> None:
    check("mask_bits", mask_bits, torch.int32, (None, None), mask_bits.device)
    tasks, words = mask_bits.shape
    size = words * BITS_PER_WORD
    if size > MOST_BITS:
        raise ValueError(
            f"a mask has {size} bits, but the fused selection takes at most {MOST_BITS}"
        )
    operands: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("mask_bits", mask_bits, torch.int32, (tasks, words)),
        ("maskable_bits", maskable_bits, torch.int32, (words,)),
        ("weights", weights, torch.float32, (size,)),
        ("masked_gradients", masked_gradients, torch.float32, (tasks, size)),
        ("dense_gradients", dense_gradients, torch.float32, (tasks, size)),
        ("mean_gradient", mean_gradient, torch.float32, (size,)),
        ("losses", losses, torch.float32, (tasks,)),
    ]
    beside = [("mask_bits", mask_bits)]
    for name, tensor, dtype, shape in operands:
        check(name, tensor, dtype, shape, mask_bits.device, layout="rows", beside=beside)


def _select_harmony_fake(
    mask_bits: Tensor, maskable_bits: Tensor, weights: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks, count = len(mask_bits), others[4]
    leaving = mask_bits.new_empty(tasks, min(count, weights.numel()), dtype=torch.int64)
    counts = mask_bits.new_empty(tasks, 3, dtype=torch.int64)
    refused = mask_bits.new_empty(tasks, dtype=torch.uint8)
    return leaving, torch.empty_like(leaving), counts, refused


def _move_weights_fake(*_: Any) -> None:
    return None


register(
    __package__,
    "select_harmony",
    "(Tensor mask_bits, Tensor maskable_bits, Tensor weights, Tensor masked_gradients, "
    "Tensor dense_gradients, Tensor mean_gradient, Tensor losses, int count, float balance, "
    "str importance, str rule) -> (Tensor leaving, Tensor entering, Tensor counts, Tensor refused)",
    _select_harmony_fake,
)
register(
    __package__,
    "move_weights",
    "(Tensor(a!) mask_bits, Tensor leaving, Tensor entering) -> ()",
    _move_weights_fake,
)
