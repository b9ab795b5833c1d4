"""Multilayer perceptrons that are told the task.

A batch is a list of groups, one task each. Shapes: G groups, B vectors per group, T tasks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

ToldBy = Literal["one-hot", "multi-head"]
"""How a network is told the task: by T more inputs, all 0 but the task's, which is 1; or by a last
layer of each task's own."""


class TaskMLP(nn.Module):
    """Linear layers with ReLU between them, as PyTorch initialises them.

    Args:
        inputs, outputs: numbers in a vector that is read, the task aside, and in what comes out.
        tasks: T.
        hidden_size, hidden_layers: outputs of each layer but the last, and how many those are.
        told_by: how it is told the task.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tasks: int,
        hidden_size: int,
        hidden_layers: int,
        told_by: ToldBy,
    ):
        super().__init__()
        self.tasks = tasks
        self.told_by = told_by
        one_hot = told_by == "one-hot"
        sizes = [inputs + (tasks if one_hot else 0), *[hidden_size] * hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(hidden_size, outputs if one_hot else tasks * outputs)

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """The outputs, float32 [G, B, outputs].

        Args:
            x: float32 [G, B, inputs].
            task_ids: int64 [G].
        """
        if self.told_by == "one-hot":
            told = task_ids[:, None] == torch.arange(self.tasks, device=x.device)
            x = torch.cat((x, told[:, None].expand(-1, x.shape[1], -1)), dim=-1)
        for layer in self.hidden:
            x = layer(x).relu()
        if self.told_by == "one-hot":
            return self.head(x).float()
        weights, biases = (
            part.unflatten(0, (self.tasks, -1))[task_ids]
            for part in (self.head.weight, self.head.bias)
        )
        return torch.baddbmm(biases[:, None], x, weights.mT).float()


class Actor(TaskMLP):
    """One that chooses actions, in (-1, 1): a tanh is its last layer, as the transformer's."""

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Actions, float32 [G, B, A], after observations [G, B, O]."""
        return super().forward(x, task_ids).tanh()
