"""AdamW for a parameter vector. It moves only the active weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harmodt_kernels import Backend, lr_and_corrections_at
from harmodt_kernels.vector import ParameterVector

from ..config import OptimisationSettings


class Optimiser:
    """AdamW that clips the gradient's norm and does not change inactive weights.

    Args:
        vector: the weights and their gradient.
        settings: learning rate and its schedule, clipping, weight decay.
        backend: the backend that computes the masked AdamW.
        rounded_to: the dtype of the bf16 copy of the maskable weights, or None for no copy.

    Attributes:
        bf16_copy: the bf16 copy, [P_m], or None. `round_weights` and every step write it.
    """

    def __init__(
        self,
        vector: ParameterVector,
        settings: OptimisationSettings,
        backend: Backend,
        rounded_to: torch.dtype | None = None,
    ):
        self.settings = settings
        self._vector = vector
        self._backend = backend
        self.first_moment = torch.zeros_like(vector.weights)
        self.second_moment = torch.zeros_like(vector.weights)
        self.bf16_copy: Tensor | None = None
        if rounded_to is not None and vector.maskable_size:
            self.bf16_copy = torch.empty_like(
                vector.weights[: vector.maskable_size], dtype=rounded_to
            )
            self.round_weights()

    def round_weights(self) -> None:
        """Write the bf16 copy again after other code changed the weights."""
        if self.bf16_copy is not None:
            self.bf16_copy.copy_(self._vector.weights[: self._vector.maskable_size])

    def step(self, mask_bits: Tensor | None, task_ids: Tensor, rates: Tensor) -> Tensor:
        """Move the active weights.

        Args:
            mask_bits: int32 [T, P_m / 32], the tasks' masks, or None without masks.
            task_ids: int64 [G], the tasks of the step. A weight moves if it is active in at least
                one of them.
            rates: float32 [3], learning rate and bias corrections: the step's row of `rates`.

        Returns:
            The norm of the unclipped gradient, a tensor of one element.
        """
        return self._backend.masked_adamw(
            self._vector.weights,
            self._vector.gradient,
            self.first_moment,
            self.second_moment,
            mask_bits,
            task_ids,
            rates,
            betas=self.settings.betas,
            epsilon=self.settings.adam_epsilon,
            weight_decay=self.settings.weight_decay,
            max_norm=self.settings.gradient_clip,
            bf16_copy=self.bf16_copy,
        )

    def rates(self, steps: Sequence[int]) -> Tensor:
        """Learning rates and bias corrections of steps, which count from 1: float32 [S, 3]."""
        settings = self.settings
        return torch.tensor(
            [lr_and_corrections_at(s, learning_rate(s, settings), settings.betas) for s in steps]
        )

    def tensors(self) -> dict[str, Tensor]:
        """The moments by their names in a checkpoint."""
        return {"first_moment": self.first_moment, "second_moment": self.second_moment}


def learning_rate(step: int, settings: OptimisationSettings) -> float:
    """The learning rate at a step: the product of a linear warm-up and a cosine.

    The cosine falls from 1 at the start of the run to `final_learning_rate` at its end.
    """
    warm = min(step / settings.warmup_steps, 1.0) if settings.warmup_steps else 1.0
    wave = 0.5 * (1.0 + math.cos(math.pi * min(step / settings.steps, 1.0)))
    floor = settings.final_learning_rate
    return settings.learning_rate * warm * (floor + (1.0 - floor) * wave)
