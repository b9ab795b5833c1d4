"""Passes the tensors of the masked AdamW step to the C library."""

from __future__ import annotations

from ctypes import byref

from torch import Tensor

from ..native.library import AdamWOperands, library, pointer, threads


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    mask_bits: Tensor | None,
    task_ids: Tensor | None,
    lr_and_corrections: Tensor,
    norm: Tensor,
    max_norm: float,
    first_rate: float,
    second_rate: float,
    epsilon: float,
    weight_decay: float,
    bf16_copy: Tensor | None = None,
) -> None:
    """Computes `harmodt::masked_adamw`, with the arguments of its schema."""
    operands = AdamWOperands(
        weights.numel(),
        *map(pointer, (weights, gradient, first_moment, second_moment)),
        norm=pointer(norm),
        max_norm=max_norm,
        first_rate=first_rate,
        second_rate=second_rate,
        epsilon=epsilon,
        weight_decay=weight_decay,
        lr_and_corrections=pointer(lr_and_corrections),
    )
    if mask_bits is not None and task_ids is not None:
        operands.mask_words = mask_bits.shape[1]
        operands.mask_bits, operands.mask_stride = pointer(mask_bits), mask_bits.stride(0)
        operands.tasks, operands.groups = len(mask_bits), len(task_ids)
        operands.task_ids = pointer(task_ids)
    library().harmodt_masked_adamw(byref(operands), threads())
    if bf16_copy is not None:
        bf16_copy.copy_(weights[: len(bf16_copy)])
