"""Soft masks: masks with values between 0 and 1, computed by a backend for binary masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .masked_linear.gradients import WeightGradients
from .norm_linear.reference import norm_then_linear


def soft_masks(backend: Backend, levels: int) -> Backend:
    """A backend whose masked layers multiply a weight by 0, 1/L, 2/L, ... or 1.

    The bits hold L T masks for T tasks: mask l T + i marks the weights whose value in task i is
    above l / L. So a value is the mean of its L bits. A layer is linear in its mask: `backend`
    computes it once with each of the task's L masks, and the outputs are averaged. A layer without
    masks is computed once.

    Args:
        backend: computes the layers with binary masks.
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
        """Takes the arguments of `masked_linear.reference.masked_linear`."""

        def layer(x: Tensor, task_ids: Tensor | None, gradients: Gradients) -> Tensor:
            operands = x, weight, bias, weight_bits, bias_bits, task_ids
            return self.backend.masked_linear(*operands, group_gradients=gradients, queue=queue)

        y = self._mean(layer, x, weight_bits, task_ids, group_gradients)
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
        """Takes the arguments of `masked_layer_norm.reference.masked_layer_norm`."""

        def layer(x: Tensor, task_ids: Tensor | None, gradients: Gradients) -> Tensor:
            operands = x, weight, bias, weight_bits, bias_bits, task_ids
            options = {"group_gradients": gradients, **settings}
            return self.backend.masked_layer_norm(*operands, **options)[0]

        return self._mean(layer, x, weight_bits, task_ids, group_gradients), x

    def norm_linear(self, *operands: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """Takes the arguments of `norm_linear.reference.norm_linear`."""
        return norm_then_linear(self.masked_layer_norm, self.masked_linear, *operands, **settings)

    def linear_residual(
        self,
        *operands: Any,
        seed: Tensor | None = None,
        group_gradients: Gradients = None,
        queue: WeightGradients | None = None,
    ) -> Tensor:
        """Takes the arguments of `linear_residual.reference.linear_residual`."""
        *layer_operands, residual, drop = operands
        branch = self.masked_linear(*layer_operands, group_gradients=group_gradients, queue=queue)
        return self.backend.dropout_add(residual, branch, drop, seed)

    def _mean(
        self,
        layer: Callable[[Tensor, Tensor | None, Gradients], Tensor],
        x: Tensor,
        bits: Tensor | None,
        task_ids: Tensor | None,
        gradients: Gradients,
    ) -> Tensor:
        """The mean of a layer's outputs for x, [G, R, K], over each task's L masks.

        `layer` takes x, the mask of each group and the buffers for gradients.
        """
        if bits is None or task_ids is None:
            return layer(x, task_ids, gradients)
        if gradients is not None and len(gradients[0]) > 1:
            # Groups are computed one by one: a buffer [1, ...] gets the sum of the L gradients.
            outputs = []
            for group in range(len(x)):
                only = slice(group, group + 1)
                weight_gradients, bias_gradients = gradients
                buffers = (
                    weight_gradients[only],
                    None if bias_gradients is None else bias_gradients[only],
                )
                outputs.append(self._mean(layer, x[only], bits, task_ids[only], buffers))
            return torch.cat(outputs)
        # Group g is computed with the masks l T + task_ids[g], for l = 0, …, L - 1.
        first_rows = torch.arange(0, len(bits), len(bits) // self.levels, device=bits.device)
        rows = (first_rows[:, None] + task_ids).flatten()
        copies = x.expand(self.levels, *x.shape).flatten(0, 1)
        return layer(copies, rows, gradients).unflatten(0, (self.levels, len(x))).mean(0)
