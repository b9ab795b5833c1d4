"""The masked AdamW step as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .reference import lr_and_corrections_at

if TYPE_CHECKING:
    from ..masked_model import MaskedModel


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on the weights that are active in a task of the step; the others do not change.

    It has one parameter group, with all parameters of the model. Schedulers change its `lr`. The
    state dict holds the moments and the number of steps.

    Args:
        model: the model and its masks.
        lr: the learning rate.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        max_norm: the gradient is clipped to this global norm.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        model: MaskedModel,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float = math.inf,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}: it must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: both must be at least 0 and below 1")
        if not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}: it must be above 0")
        self.model = model
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([model.vector.weights], {**settings, "max_norm": max_norm})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights that are active in the tasks of the model's calls since the last step.

        Args:
            closure: computes the loss and its gradient anew, or None.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,), model = self.param_groups, self.model
        weights = model.vector.weights
        state = self.state[weights]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weights))
            state["exp_avg_sq"] = torch.zeros_like(weights)
        state["step"] += 1
        schedule = lr_and_corrections_at(state["step"], float(group["lr"]), group["betas"])
        model.backend.masked_adamw(
            weights,
            model.gradient(),
            state["exp_avg"],
            state["exp_avg_sq"],
            model.bits,
            model.tasks_of_step,
            torch.tensor(schedule, dtype=torch.float32, device=weights.device),
            betas=tuple(group["betas"]),
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            max_norm=group["max_norm"],
        )
        model.tasks_of_step = model.tasks_of_step[:0]
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The same as `MaskedModel.zero_grad`."""
        self.model.zero_grad(set_to_none)
