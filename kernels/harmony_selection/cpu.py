"""Passes the tensors of the harmony selection to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..bits import BITS_PER_WORD
from ..native.library import SelectionOperands, library, pointer, threads


def select_harmony(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    mean_gradient: Tensor,
    losses: Tensor,
    count: int,
    balance: float,
    importance: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `harmodt::select_harmony`, with the arguments of its schema."""
    tasks, words = mask_bits.shape
    columns = min(count, weights.numel())
    leaving = torch.empty(tasks, columns, dtype=torch.int64)
    entering = torch.empty_like(leaving)
    counts = torch.empty(tasks, 3, dtype=torch.int64)
    refused = torch.empty(tasks, dtype=torch.uint8)
    losses = losses.contiguous()
    operands = SelectionOperands(
        tasks=tasks,
        words=words,
        mask_bits=pointer(mask_bits),
        mask_stride=mask_bits.stride(0),
        maskable_bits=pointer(maskable_bits),
        weights=pointer(weights),
        masked_gradients=pointer(masked_gradients),
        masked_stride=masked_gradients.stride(0),
        dense_gradients=pointer(dense_gradients),
        dense_stride=dense_gradients.stride(0),
        mean_gradient=pointer(mean_gradient),
        losses=pointer(losses),
        count=columns,
        balance=balance,
        fisher=importance == "fisher",
        paper=rule == "paper",
    )
    results = (pointer(t) for t in (leaving, entering, counts, refused))
    library().harmodt_select_harmony(byref(operands), *results, threads())
    return leaving, entering, counts, refused


def move_weights(mask_bits: Tensor, leaving: Tensor, entering: Tensor) -> None:
    size = mask_bits.shape[1] * BITS_PER_WORD
    for name, indices in (("leaving", leaving), ("entering", entering)):
        if indices.numel() and (largest := int(indices.max())) >= size:
            raise IndexError(f"selection.{name} holds {largest}, but a mask has {size} bits only")
    for indices in (leaving.contiguous(), entering.contiguous()):
        library().harmodt_move_weights(
            pointer(mask_bits), mask_bits.stride(0), pointer(indices), *indices.shape
        )
