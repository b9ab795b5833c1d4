"""MTIQL: implicit Q-learning on the data of all tasks with multilayer perceptrons.

IQL is from Kostrikov, Nair and Levine, "Offline Reinforcement Learning with Implicit Q-Learning",
ICLR 2022 (arXiv 2110.06169). Its policy is a Gaussian. Here the policy is the mean of a Gaussian
with a fixed deviation, and it ends in a tanh. The weighted likelihood then becomes a weighted
squared error; if all weights are 1, this is the loss of MTBC. The papers that list MTIQL state its
number of parameters, but not its architecture. This project chose one: the policy, the value and
the two critics, without the target critics, have 1.72 M parameters for Meta-World's 50 tasks (the
HarmoDT paper's Table 1: 1.74 M).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from harmodt_kernels.vector import ParameterVector

from ..batch import Batch
from ..config import ModelSize
from ..data.transitions import WINDOW, transitions_of
from ..networks.task_mlp import TaskInput, TaskMLP
from ..settings import ABOVE_ZERO, NotNegative, ShareBelowOne
from .learner import Setup
from .mlp import POLICY, MLPLearner, MLPSettings

VALUE, CRITICS, TARGETS = "value", "critics", "target_critics"

LARGEST_WEIGHT = 100.0
"""Largest weight of an action in the policy's loss, as in IQL's code."""


@dataclass(frozen=True)
class MTIQLSettings(MLPSettings):
    """MTIQL: MLPs that imitate the data's actions; actions better than expected count more."""

    hidden_size: ModelSize = 440
    """Outputs of each hidden layer of each network."""
    critic_conditioning: TaskInput = "multi-head"
    """The value and the critics read a one-hot vector of the task, or have a head for each task."""
    discount: ShareBelowOne = 0.99
    """γ, the discount for each step until a reward."""
    expectile: Annotated[float, Meta(ge=ABOVE_ZERO, lt=1)] = 0.7
    """τ: the value network learns this expectile of the critics' values. 0.5 is the mean, 1 the
    largest value."""
    temperature: NotNegative = 100.0
    """β in an action's weight exp(β A), which is at most 100. With 0 all actions count alike.
    Rewards, and therefore advantages A, are divided by --return-scale. With β = 100 and a scale of
    1000, an advantage of 5, about one step's reward in Meta-World, gives the weight exp(0.5)."""
    target_rate: Annotated[float, Meta(ge=ABOVE_ZERO, le=1)] = 0.02
    """In each step the target critics move towards the critics by this share of the distance. IQL's
    code uses 0.005. Short runs need a larger share, because a training step carries a reward back
    by only one time step."""


class MTIQLLearner(MLPLearner[MTIQLSettings]):
    """Trains a policy, a value network and two critics. The target critics rate actions.

    A step first computes the gradients of all networks, and then moves all networks.
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
        """Build a network with one output; PyTorch's generator draws its weights."""
        return TaskMLP(inputs, 1, *self.sizes, self.settings.critic_conditioning)

    def after_step(self, step: int) -> None:
        """Move the target critics towards the critics."""
        critics = self.trained[CRITICS].weights
        self.averages[TARGETS].weights.lerp_(critics, self.settings.target_rate)

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """The sum of the losses of value, critics and policy (Eq. 5, 6 and 7 of IQL), [G].

        Each loss is a mean over the known transitions (`Transitions.known`).
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
