"""The masked AdamW step on a CPU: passes tensors to the C library."""

from __future__ import annotations

from ctypes import byref

from torch import Tensor

from ..native.library import AdamWOperands, library, pointer, threads


def masked_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    active_bits: Tensor,
    norm: Tensor,
    max_norm: float,
    *settings: float,
) -> None:
    # As `torch.nn.utils.clip_grad_norm_`; NaN stays NaN.
    scale = ((norm + 1e-6).reciprocal() * max_norm).item()
    # `settings` are the structure's last members in their order, from first_rate on.
    operands = AdamWOperands(
        weights.numel(),
        *map(pointer, (weights, gradient, first_moment, second_moment, active_bits)),
        1.0 if scale > 1.0 else scale,
        *settings,
    )
    library().harmodt_masked_adamw(byref(operands), threads())
