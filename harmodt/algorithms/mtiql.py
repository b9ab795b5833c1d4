"""MTIQL: implicit Q-learning on all tasks' data with multilayer perceptrons.

Kostrikov, Nair and Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022
(arXiv 2110.06169), called IQL. Its policy is a Gaussian; here it is the mean of one, behind a tanh,
whose deviation is fixed, so that the weighted likelihood is a weighted squared error, and with all
weights at 1 that of MTBC. The papers that list MTIQL give a number of parameters and no
architecture: what is here is chosen, and the policy, the value and the two critics, without the
critics' targets, have 1.72 M parameters for Meta-World's 50 tasks (the HarmoDT paper's Table 1:
1.74 M).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from ..batch import Batch
from ..config import ModelSize
from ..data.store import TaskData
from ..data.transitions import WINDOW, transitions_of
from ..masks.vector import ParameterVector
from ..networks.task_mlp import TaskMLP, ToldBy
from ..settings import NotNegative, ShareBelowOne
from .learner import Setup
from .mlp import POLICY, MLPLearner, MLPSettings, build_actor, mlp_settings, named, sizes_of

VALUE, CRITICS, TARGETS = "value", "critics", "target_critics"

LARGEST_WEIGHT = 100.0
"""Of an action in the policy's loss, as in IQL's code."""


@dataclass(frozen=True)
class MTIQLSettings(MLPSettings):
    """MTIQL: MLPs that imitate the data's actions, the more the better these are than expected."""

    hidden_size: ModelSize = 440
    """Outputs of each hidden layer of each network."""
    critic_conditioning: ToldBy = "multi-head"
    """The value and the critics are told the task by a one-hot vector, or have a head for each."""
    discount: ShareBelowOne = 0.99
    """γ, what a reward one step later is worth."""
    expectile: Annotated[float, Meta(gt=0, lt=1)] = 0.7
    """τ, which expectile of the critics' values the value is: 0.5 is the mean, 1 the largest."""
    temperature: NotNegative = 100.0
    """β, by which an advantage is multiplied in an action's weight exp(β A), which is at most 100:
    0 imitates all actions alike. Advantages are divided by --return-scale, as rewards are: at 1000
    and Meta-World's rewards of about 5 a step, one step's reward makes exp(0.5)."""
    target_rate: Annotated[float, Meta(gt=0, le=1)] = 0.02
    """Share of the way that the critics' targets go to the critics in each step. After n steps of
    training rewards are known from about n times as many steps ahead; IQL's is 0.005."""


def mtiql_settings(setup: Setup) -> MTIQLSettings:
    """The run's own settings, which are MTIQL's."""
    own = mlp_settings(setup)
    assert isinstance(own, MTIQLSettings)
    return own


def build_networks(setup: Setup) -> dict[str, nn.Module]:
    """The policy, the value and the two critics, drawn from torch's generator."""
    spec, told_by = setup.environment, mtiql_settings(setup).critic_conditioning
    observation, action = spec.observation_size, spec.action_size

    def critic(inputs: int) -> TaskMLP:
        return TaskMLP(inputs, 1, *sizes_of(setup), told_by)

    return {
        POLICY: build_actor(setup),
        VALUE: critic(observation),
        CRITICS: nn.ModuleList(critic(observation + action) for _ in range(2)),
    }


class MTIQLLearner(MLPLearner):
    """Trains a policy, a value and two critics, of which a slow copy says what actions are worth.

    All move at once, by gradients at the weights before the step.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        self.settings = mtiql_settings(setup)
        super().__init__(setup, data, build_networks(setup), WINDOW)
        self.targets = copy.deepcopy(self.networks[CRITICS]).requires_grad_(False)
        self._targets = ParameterVector(self.targets, setup.execution.device)

    def compute(self) -> Tensor:
        """The step whose inputs were loaded, after which the targets follow the critics."""
        result = super().compute()
        self._targets.weights.lerp_(self.vectors[CRITICS].weights, self.settings.target_rate)
        return result

    def losses(self, batch: Batch, actions: Tensor) -> Tensor:
        """The losses of value, critics and policy (Eq. 5, 6 and 7 of IQL), summed, [G].

        Each is a mean over the transitions whose next observation is known or not needed.
        """
        own, tasks = self.settings, batch.task_ids
        step = transitions_of(batch, actions, self.setup.environment)
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

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        return super().tensors() | named(TARGETS, self.targets)


def _values(critics: nn.Module, pairs: Tensor, tasks: Tensor) -> Tensor:
    """What each critic says of observations and actions [G, B, O + A] of tasks [G]: [2, G, B]."""
    assert isinstance(critics, nn.ModuleList)
    return torch.stack([critic(pairs, tasks)[..., 0] for critic in critics])
