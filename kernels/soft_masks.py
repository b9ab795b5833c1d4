"""Masks with values between 0 and 1, from the operations of a backend on bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .masked_linear.gradients import WeightGradients
from .norm_linear.reference import in_parts


def soft_masks(backend: Backend, levels: int) -> Backend:
    """A backend whose masked layers multiply a weight by 0, 1/L, 2/L, ... or 1.

    Where bits are T masks to `backend`, they are L T to this one: row l T + i says which weights of
    task i have a value above l / L, so that a value is the mean of its L bits. A layer is linear in
    its mask: it is computed under each of the L by itself, and what comes out is averaged. Without
    masks it is computed once.

    Args:
        backend: what computes.
        levels: L, at least 2.
    """
    layers = _Layers(backend, levels)
    return dataclasses.replace(
        backend,
        masked_linear=layers.masked_linear,
        masked_layer_norm=layers.masked_layer_norm,
        norm_linear=layers.norm_linear,
        linear_residual=layers.linear_residual,
    )


Gradients = tuple[Tensor, Tensor | None] | None


@dataclass(frozen=True)
class _Layers:
    """The operations of masked layers."""

    backend: Backend
    levels: int

    def masked_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_bits: Tensor | None,
        bias_bits: Tensor | None,
        task_ids: Tensor | None,
        *,
        relu: bool = False,
        group_gradients: Gradients = None,
        queue: WeightGradients | None = None,
    ) -> Tensor:
        """Its arguments are those of `masked_linear.reference`, which all implementations have."""

        def under(x: Tensor, task_ids: Tensor | None, gradients: Gradients) -> Tensor:
            operands = x, weight, bias, weight_bits, bias_bits, task_ids
            return self.backend.masked_linear(*operands, group_gradients=gradients, queue=queue)

        y = self._mean(under, x, weight_bits, task_ids, group_gradients)
        return y.relu() if relu else y

    def masked_layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_bits: Tensor | None,
        bias_bits: Tensor | None,
        task_ids: Tensor | None,
        *,
        group_gradients: Gradients = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Its arguments are those of `masked_layer_norm.reference`."""

        def under(x: Tensor, task_ids: Tensor | None, gradients: Gradients) -> Tensor:
            operands = x, weight, bias, weight_bits, bias_bits, task_ids
            of_layer = {"group_gradients": gradients, **settings}
            return self.backend.masked_layer_norm(*operands, **of_layer)[0]

        return self._mean(under, x, weight_bits, task_ids, group_gradients), x

    def norm_linear(self, *operands: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """`in_parts` of the two."""
        return in_parts(self.masked_layer_norm, self.masked_linear, *operands, **settings)

    def linear_residual(
        self,
        *operands: Any,
        seed: Tensor | None = None,
        group_gradients: Gradients = None,
        queue: WeightGradients | None = None,
    ) -> Tensor:
        """Its arguments are those of `linear_residual.reference`."""
        *of_layer, residual, drop = operands
        branch = self.masked_linear(*of_layer, group_gradients=group_gradients, queue=queue)
        return self.backend.dropout_add(residual, branch, drop, seed)

    def _mean(
        self,
        under: Callable[[Tensor, Tensor | None, Gradients], Tensor],
        x: Tensor,
        bits: Tensor | None,
        task_ids: Tensor | None,
        gradients: Gradients,
    ) -> Tensor:
        """The mean of what a layer makes of x, [G, R, K], under each of its tasks' L masks."""
        if bits is None or task_ids is None:
            return under(x, task_ids, gradients)
        if gradients is not None and len(gradients[0]) > 1:
            # Each group by itself: its L gradients are added where it has its own.
            parts = []
            for group in range(len(x)):
                only = slice(group, group + 1)
                of_weight, of_bias = gradients
                own = of_weight[only], None if of_bias is None else of_bias[only]
                parts.append(self._mean(under, x[only], bits, task_ids[only], own))
            return torch.cat(parts)
        first_rows = torch.arange(0, len(bits), len(bits) // self.levels, device=bits.device)
        rows = (first_rows[:, None] + task_ids).flatten()
        copies = x.expand(self.levels, *x.shape).flatten(0, 1)
        return under(copies, rows, gradients).unflatten(0, (self.levels, len(x))).mean(0)
