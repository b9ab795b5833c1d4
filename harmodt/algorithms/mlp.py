"""The base of the algorithms that train multilayer perceptrons on single steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar

from msgspec import Meta
from torch import nn

from harmodt_kernels.vector import ParameterVector

from ..config import AlgorithmSettings, ModelSize
from ..data.inputs import Inputs
from ..data.trajectories import Trajectories
from ..data.windows import WindowSampler
from ..networks.task_mlp import Actor, TaskInput
from ..policies.reactive import ReactivePolicy
from .learner import Learner, Setup

DEFAULTS = {"batch_per_task": 160}
"""160 steps per task have as many actions as a sequence model's 8 windows of 20 steps."""

POLICY = "policy"
"""The name of the policy's network."""


@dataclass(frozen=True)
class MLPSettings(AlgorithmSettings):
    """Sizes of the networks, and how they are conditioned on the task."""

    hidden_size: ModelSize = 912
    """Outputs of each hidden layer."""
    hidden_layers: Annotated[int, Meta(ge=1, le=1000)] = 3
    """Number of hidden layers."""
    task_conditioning: TaskInput = "one-hot"
    """The policy reads a one-hot vector of the task, or has a head for each task."""


MLPOwn = TypeVar("MLPOwn", bound=MLPSettings)


class MLPLearner(Learner[MLPOwn]):
    """Trains MLPs on windows of a few steps.

    A step clips the gradient of each network separately, and moves all networks at once.

    Attributes:
        window: steps of a window.
        networks: the trained networks by name; the actor has the name `POLICY`.
    """

    window = 1

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.actor = self._build_actor()
        self.networks: dict[str, nn.Module] = {}
        self.train_network(POLICY, self.actor)

    def train_network(self, name: str, network: nn.Module) -> None:
        """Add a network that training steps change."""
        self.networks[name] = network
        self.trained[name] = ParameterVector(network, self.execution.device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of tasks, and size and number of the hidden layers: arguments of `TaskMLP`."""
        return self.task_count, self.settings.hidden_size, self.settings.hidden_layers

    def _build_actor(self) -> Actor:
        """Build the policy's network; PyTorch's generator draws its weights."""
        spec, task_input = self.setup.environment, self.settings.task_conditioning
        return Actor(spec.observation_size, spec.action_size, *self.sizes, task_input)

    def make_sampler(self, episodes: Trajectories, inputs: Inputs) -> WindowSampler:
        """The sampler of windows of a few steps."""
        return WindowSampler(episodes, inputs, self.window, self.execution.device)

    def policy(self, step: int) -> ReactivePolicy:
        """The policy with the present weights."""
        spec = self.setup.environment
        return ReactivePolicy(self.actor, self.inputs(), spec, self.execution, step)
