"""The fused masked AdamW step: its public function, its checks and its registered operation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bits import words_for
from ..operands import check
from ..registration import register

# The dtypes of a copy of the weights.
_COPIES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    mask_bits: Tensor | None,
    task_ids: Tensor | None,
    lr_and_corrections: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_norm: float = math.inf,
    bf16_copy: Tensor | None = None,
) -> Tensor:
    """Clip the gradient's norm, then run AdamW on the active weights; the others do not change.

    This is the fused form of `reference.masked_adamw` and takes the same arguments, in float32. A
    first kernel computes the norm, and a second one does the rest.

    Args:
        weights, first_moment, second_moment: float32 [P]. Elements of active weights are changed in
            place.
        gradient: float32 [P]. It is not changed.
        mask_bits: int32 [T, words], the masks of all tasks; or None if every weight is active.
            Weights beyond the last word are always active.
        task_ids: int64 [G], the tasks of the step, below T; or None without masks. A GPU does not
            check them. A weight is active in the step if it is active in one of these tasks.
        lr_and_corrections: float32 [3], the learning rate and the bias corrections, from
            `lr_and_corrections_at`. On a GPU, the kernel reads them when it runs.
        max_norm: the gradient is clipped to this global norm.
        bf16_copy: a buffer [≤ P] of another floating-point dtype, usually bf16, or None. The step
            writes a copy of the first weights to it.

    Returns:
        The norm of the gradient before clipping, float32 [].

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on a CPU, a task id is out of range.
    """
    size, device = weights.numel(), weights.device
    for name, tensor, length in (
        ("weights", weights, size),
        ("gradient", gradient, size),
        ("first_moment", first_moment, size),
        ("second_moment", second_moment, size),
        ("lr_and_corrections", lr_and_corrections, 3),
    ):
        beside = [("weights", weights)]
        check(name, tensor, torch.float32, (length,), device, layout="contiguous", beside=beside)
    if mask_bits is not None:
        _check_masks(mask_bits, task_ids, size, device)
    if bf16_copy is not None:
        lengths = range(size + 1)
        check("bf16_copy", bf16_copy, _COPIES, (lengths,), device, layout="contiguous")
    norm = torch.linalg.vector_norm(gradient)
    beta1, beta2 = betas
    torch.ops.harmodt.masked_adamw(
        weights,
        gradient,
        first_moment,
        second_moment,
        mask_bits,
        None if mask_bits is None else task_ids,
        lr_and_corrections,
        norm,
        max_norm,
        1 - beta1,
        1 - beta2,
        epsilon,
        weight_decay,
        bf16_copy,
    )
    return norm


def _check_masks(
    mask_bits: Tensor, task_ids: Tensor | None, size: int, device: torch.device
) -> None:
    words = range(words_for(size) + 1)
    check("mask_bits", mask_bits, torch.int32, (None, words), device, layout="rows")
    if task_ids is None:
        raise ValueError("task_ids is None: mask_bits needs the tasks of the step, int64 [G]")
    check("task_ids", task_ids, torch.int64, (None,), device, layout="contiguous")


def _masked_adamw_fake(*_: Any) -> None:
    return None


register(
    __package__,
    "masked_adamw",
    "(Tensor(a!) weights, Tensor gradient, Tensor(b!) first_moment, Tensor(c!) second_moment, "
    "Tensor? mask_bits, Tensor? task_ids, Tensor lr_and_corrections, Tensor norm, float max_norm, "
    "float first_rate, float second_rate, float epsilon, float weight_decay, "
    "Tensor(d!)? bf16_copy=None) -> ()",
    _masked_adamw_fake,
)
