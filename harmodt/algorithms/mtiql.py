"""MTIQL: implicit Q-learning on all tasks' data with multilayer perceptrons.

Kostrikov, Nair and Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022
(arXiv 2110.06169), called IQL. Its policy is a Gaussian. Here the policy is a Gaussian's mean,
behind a tanh, with a fixed deviation: the weighted likelihood becomes a weighted squared error, and
with all weights at 1 it is MTBC's. The papers that list MTIQL give a number of parameters and no
architecture. The one here was chosen: the policy, the value and the two critics, without the
critics' targets, have 1.72 M parameters for Meta-World's 50 tasks (the HarmoDT paper's Table 1:
1.74 M).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from ..batch import Batch
from ..config import ModelSize
from ..data.transitions import WINDOW, transitions_of
from ..masks.vector import ParameterVector
from ..networks.task_mlp import TaskInput, TaskMLP
from ..settings import ABOVE_ZERO, NotNegative, ShareBelowOne
from .learner import Setup
from .mlp import POLICY, MLPLearner, MLPSettings

VALUE, CRITICS, TARGETS = "value", "critics", "target_critics"

LARGEST_WEIGHT = 100.0
"""Largest weight of an action in the policy's loss, as in IQL's code."""


@dataclass(frozen=True)
class MTIQLSettings(MLPSettings):
    """MTIQL: MLPs that imitate the data's actions; better actions than expected count more."""

    hidden_size: ModelSize = 440
    """Outputs of each hidden layer of each network."""
    critic_conditioning: TaskInput = "multi-head"
    """The value and the critics read the task as a one-hot vector, or have a head for each task."""
    discount: ShareBelowOne = 0.99
    """γ, the discount of a reward one step later."""
    expectile: Annotated[float, Meta(ge=ABOVE_ZERO, lt=1)] = 0.7
    """τ, the expectile of the critics' values that the value learns: 0.5 is the mean, 1 the
    largest."""
    temperature: NotNegative = 100.0
    """β in an action's weight exp(β A), which is at most 100. With 0 all actions count alike.
    Advantages A are divided by --return-scale, as rewards are: at 1000 and Meta-World's rewards of
    about 5 a step, one step's reward gives exp(0.5)."""
    target_rate: Annotated[float, Meta(ge=ABOVE_ZERO, le=1)] = 0.02
    """Share of the way from the critics' targets to the critics that each step goes. IQL's code has
    0.005; short runs need more, because a reward spreads back about one step with each update."""


class MTIQLLearner(MLPLearner[MTIQLSettings]):
    """Trains a policy, a value and two critics; a slow copy of the critics rates actions.

    All networks move at once, by gradients at the weights before the step.
    """

    window = WINDOW

    def __init__(self, setup: Setup):
        super().__init__(setup)
        spec, critic = setup.environment, self._build_critic
        self.train_network(VALUE, critic(spec.observation_size))
        pairs = spec.observation_size + spec.action_size
        critics = nn.ModuleList(critic(pairs) for _ in range(2))
        self.targets = copy.deepcopy(critics).requires_grad_(False)
        self.train_network(CRITICS, critics)
        self.averages[TARGETS] = ParameterVector(self.targets, self.execution.device)

    def _build_critic(self, inputs: int) -> TaskMLP:
        """A network with one output, drawn from PyTorch's generator."""
        return TaskMLP(inputs, 1, *self.sizes, self.settings.critic_conditioning)

    def after_step(self, step: int) -> None:
        """Move the critics' targets towards the critics."""
        critics = self.trained[CRITICS].weights
        self.averages[TARGETS].weights.lerp_(critics, self.settings.target_rate)

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """The sum of the losses of value, critics and policy (Eq. 5, 6 and 7 of IQL), [G].

        Each loss is a mean over the transitions whose next observation is known or not needed.
        """
        own, tasks = self.settings, batch.task_ids
        step = transitions_of(batch, targets, self.setup.environment)
        pairs = torch.cat((step.observations, step.actions), dim=-1)
        value, policy = self.networks[VALUE], self.networks[POLICY]
        with torch.no_grad():
            worth = _values(self.targets, pairs, tasks).amin(0)
            later = value(step.next_observations, tasks)[..., 0].masked_fill(step.terminal, 0.0)
            wanted = step.rewards + own.discount * later
        advantages = worth - value(step.observations, tasks)[..., 0]
        weights = (own.temperature * advantages.detach()).exp().clamp(max=LARGEST_WEIGHT)
        of_value = (own.expectile - (advantages < 0).float()).abs() * advantages.square()
        of_critics = (_values(self.networks[CRITICS], pairs, tasks) - wanted).square().sum(0)
        errors = (policy(step.observations, tasks) - step.actions).square().mean(-1)
        losses = (of_value + of_critics + weights * errors) * step.known
        return losses.sum(1) / step.known.sum(1).clamp(min=1)


def _values(critics: nn.Module, pairs: Tensor, tasks: Tensor) -> Tensor:
    """Both critics' values of observations and actions [G, B, O + A] in tasks [G]: [2, G, B]."""
    assert isinstance(critics, nn.ModuleList)
    return torch.stack([critic(pairs, tasks)[..., 0] for critic in critics])
