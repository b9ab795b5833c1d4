"""Multilayer perceptrons that are conditioned on the task.

A batch has groups, and each group has one task. Shapes: G groups, B vectors per group, T tasks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

TaskInput = Literal["one-hot", "multi-head"]
"""How a network is conditioned on the task. one-hot: it has T more inputs, 1 for the task and 0 for
the others. multi-head: each task has its own last layer."""


class TaskMLP(nn.Module):
    """Linear layers with ReLU between them and with PyTorch's default initialisation.

    Args:
        inputs, outputs: sizes of the input vector, without the task, and of the output vector.
        tasks: T.
        hidden_size, hidden_layers: outputs of each hidden layer, and the number of these layers.
        task_input: how the network is conditioned on the task.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tasks: int,
        hidden_size: int,
        hidden_layers: int,
        task_input: TaskInput,
    ):
        super().__init__()
        self.tasks = tasks
        self.task_input = task_input
        one_hot = task_input == "one-hot"
        sizes = [inputs + (tasks if one_hot else 0), *[hidden_size] * hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(hidden_size, outputs if one_hot else tasks * outputs)

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Compute the outputs, float32 [G, B, outputs].

        Args:
            x: float32 [G, B, inputs].
            task_ids: int64 [G].
        """
        if self.task_input == "one-hot":
            one_hot = task_ids[:, None] == torch.arange(self.tasks, device=x.device)
            x = torch.cat((x, one_hot[:, None].expand(-1, x.shape[1], -1)), dim=-1)
        for layer in self.hidden:
            x = layer(x).relu()
        if self.task_input == "one-hot":
            return self.head(x).float()
        weights, biases = (
            part.unflatten(0, (self.tasks, -1))[task_ids]
            for part in (self.head.weight, self.head.bias)
        )
        return torch.baddbmm(biases[:, None], x, weights.mT).float()


class Actor(TaskMLP):
    """A network that chooses actions in (-1, 1) by a final tanh, as the transformer does."""

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Actions, float32 [G, B, A], after observations [G, B, O]."""
        return super().forward(x, task_ids).tanh()
