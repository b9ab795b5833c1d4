"""Small MLPs of two algorithms, and what they compute and learn in float64, for tests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from tiny import CONFIG, configure
from torch import Tensor

from harmodt.config import TrainConfig

# A step that neither a clipped gradient nor an epsilon of Adam's hides.
SIZES = {
    "hidden_size": 16,
    "hidden_layers": 2,
    "batch_per_task": 12,
    "learning_rate": 0.05,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-2,
    "gradient_clip": 0.1,
}


def configure_mlp(algorithm: str, **changes: Any) -> TrainConfig:
    """The tiny run's settings for MLPs of 16 wide."""
    return configure(algorithm, **{**SIZES, **changes})


class Weights:
    """The weights of a learner in float64, which learn as its own should.

    Args:
        tensors: of the learner.
        networks: the names of those that learn.
    """

    def __init__(self, tensors: dict[str, Tensor], networks: Iterable[str]):
        self.all = {
            name: tensor.detach().double().clone()
            for name, tensor in tensors.items()
            if not name.startswith("optimizer.")
        }
        self.parts = [[n for n in self.all if n.startswith(f"{net}.")] for net in networks]
        self.clipped = False  # any gradient so far
        learned = [name for part in self.parts for name in part]
        self.moments = {n: (self.all[n] * 0, self.all[n] * 0) for n in learned}
        for name in learned:
            self.all[name].requires_grad_()

    def forward(self, network: str, x: Tensor, task: int, tasks: int, task_input: str) -> Tensor:
        """Outputs [outputs] of a network after one vector of a task.

        No sum before a ReLU may be so near to 0 that rounding decides on which side it is.
        """
        if task_input == "one-hot":
            x = torch.cat((x, torch.eye(tasks, dtype=x.dtype)[task]))
        for layer in range(2):
            x = self._layer(f"{network}.hidden.{layer}", x)
            assert x.abs().min() > 1e-6
            x = torch.where(x > 0, x, 0 * x)
        heads = self._layer(f"{network}.head", x)
        size = len(heads) if task_input == "one-hot" else len(heads) // tasks
        start = 0 if task_input == "one-hot" else task * size
        return heads[start : start + size]

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return self.all[f"{name}.weight"] @ x + self.all[f"{name}.bias"]

    def learn(self, loss: Tensor, step: int) -> float:
        """A step of AdamW, each network's gradient clipped; the norm of the whole gradient."""
        gradients = dict(
            zip(self.moments, torch.autograd.grad(loss, self._of(self.moments)), strict=True)
        )
        wave = (1 + math.cos(math.pi * step / CONFIG["steps"])) / 2
        fallen = CONFIG["final_learning_rate"] * (1 - wave) + wave
        rate = SIZES["learning_rate"] * min(step / 4, 1.0) * fallen
        total = 0.0
        for part in self.parts:
            norm = sum(float(gradients[name].square().sum()) for name in part) ** 0.5
            scale = min(1.0, SIZES["gradient_clip"] / norm)
            self.clipped |= scale < 1.0
            total += norm**2
            for name in part:
                self._move(name, gradients[name] * scale, rate, step)
        return total**0.5

    def _move(self, name: str, gradient: Tensor, rate: float, step: int) -> None:
        first, second = self.moments[name]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        self.moments[name] = first, second
        root = (second / (1 - 0.999**step)).sqrt() + SIZES["adam_epsilon"]
        with torch.no_grad():
            weights = self.all[name]
            weights *= 1 - rate * SIZES["weight_decay"]
            weights -= rate * first / (1 - 0.9**step) / root

    def _of(self, names: Iterable[str]) -> list[Tensor]:
        return [self.all[name] for name in names]

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Compare with a learner's own."""
        assert self.all.keys() == {n for n in tensors if not n.startswith("optimizer.")}
        for name, weights in self.all.items():
            torch.testing.assert_close(
                tensors[name].double(), weights.detach(), rtol=1e-4, atol=1e-5, msg=name
            )
