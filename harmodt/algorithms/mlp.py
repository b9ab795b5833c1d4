"""What the algorithms share that train multilayer perceptrons on single steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from ..batch import Batch
from ..checkpoint import Checkpoint
from ..config import AlgorithmSettings, ModelSize
from ..data.feed import Feed
from ..data.inputs import Inputs
from ..data.order import TaskOrder
from ..data.store import TaskData
from ..data.trajectories import lay_out
from ..data.windows import WindowSampler
from ..masks.vector import ParameterVector
from ..networks.task_mlp import Actor, ToldBy
from ..policies.reactive import ReactivePolicy
from .learner import Setup, StepResult
from .optimiser import Optimiser

DEFAULTS = {"batch_per_task": 160}
"""Steps of each task: as many actions as 8 windows of 20 steps hold, which sequence models read."""

POLICY = "policy"
"""The name of the network that acts."""


@dataclass(frozen=True)
class MLPSettings(AlgorithmSettings):
    """Sizes of the networks, and how they are told the task."""

    hidden_size: ModelSize = 912
    """Outputs of each hidden layer."""
    hidden_layers: Annotated[int, Meta(ge=1, le=1000)] = 3
    """Number of hidden layers."""
    task_conditioning: ToldBy = "one-hot"
    """The policy is told the task by a one-hot vector among its inputs, or has a head for each."""


def mlp_settings(setup: Setup) -> MLPSettings:
    """The run's own settings, which are those of MLPs."""
    own = setup.config.own
    assert isinstance(own, MLPSettings)
    return own


def sizes_of(setup: Setup) -> tuple[int, int, int]:
    """Number of tasks, and size and number of the hidden layers, as `TaskMLP` takes them."""
    own = mlp_settings(setup)
    return len(setup.conditioning), own.hidden_size, own.hidden_layers


def build_actor(setup: Setup) -> Actor:
    """The network that acts, drawn from torch's generator."""
    spec, told_by = setup.environment, mlp_settings(setup).task_conditioning
    return Actor(spec.observation_size, spec.action_size, *sizes_of(setup), told_by)


def inputs_of(setup: Setup, place: torch.device | None = None) -> Inputs:
    """The rule by which the run's data and observations become what its networks read.

    Args:
        place: where data lie, as in `Trajectories`.
    """
    longest = setup.environment.episode_length
    return Inputs(setup.conditioning, setup.config.data, longest, place=place)


def reactive_policy(setup: Setup, actor: Actor, step: int) -> ReactivePolicy:
    """A network as a policy."""
    return ReactivePolicy(actor, inputs_of(setup), setup.environment, setup.execution, step)


def load_policy(setup: Setup, checkpoint: Checkpoint) -> ReactivePolicy:
    """The policy of a checkpoint.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    actor = build_actor(setup).to(setup.execution.device)
    checkpoint.copy_to(named(POLICY, actor))
    return reactive_policy(setup, actor, checkpoint.step)


def named(name: str, network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters as a checkpoint names them."""
    return {f"{name}.{key}": p.detach() for key, p in network.named_parameters()}


class MLPLearner:
    """Trains MLPs on windows of a few steps, of several tasks at a time; a `Learner`.

    Each network's gradient is clipped by itself, and all move at once.

    Args:
        setup: the run's settings, tasks and device.
        data: one entry per task; index = task id.
        networks: by name; one is `POLICY`.
        window: steps of a window.
    """

    def __init__(
        self,
        setup: Setup,
        data: Sequence[TaskData],
        networks: Mapping[str, nn.Module],
        window: int,
    ):
        self.setup = setup
        self.execution = setup.execution
        self.networks = networks
        run, device = setup.config.run, setup.execution.device
        optimisation, backend = setup.config.optimisation, setup.execution.backend
        self.vectors = {name: ParameterVector(net, device) for name, net in networks.items()}
        self.optimisers = {
            name: Optimiser(vector, optimisation, backend) for name, vector in self.vectors.items()
        }
        order = TaskOrder(setup.config.data, len(data), run.seed)
        episodes = lay_out(run.data_device, data, device)
        inputs = inputs_of(setup, episodes.place)
        sampler = WindowSampler(episodes, inputs, window, device)
        rates = self.optimisers[POLICY].rates  # the same for all
        self.feed = Feed(sampler, order, run.seed, lambda steps: [rates(steps)])
        self._step = setup.execution.repeated(self.compute)

    def losses(self, batch: Batch, actions: Tensor) -> Tensor:
        """What is to become small, the sum over the networks for each group of a batch, [G].

        Args:
            actions: float32 [G, B, window, A], those of the data.
        """
        raise NotImplementedError

    def train_step(self, step: int) -> StepResult:
        """One step of every network over some tasks."""
        task_ids = self.feed.load(step)
        result = self._step()
        return StepResult(task_ids, result[:-1], result[-1])

    def compute(self) -> Tensor:
        """The step whose inputs were loaded: losses [G] and the gradient's norm, as one tensor."""
        (batch, actions), (rates,) = self.feed.batch(), self.feed.more
        for vector in self.vectors.values():
            vector.gradient.zero_()
        with self.execution.computing():
            losses = self.losses(batch, actions)
            losses.mean().backward()
        norms = [o.step(None, batch.task_ids, rates) for o in self.optimisers.values()]
        return torch.cat((losses.detach(), torch.stack(norms).norm()[None]))

    def before_step(self, step: int) -> dict[str, float]:
        """Nothing is due."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        weights = [named(name, network) for name, network in self.networks.items()]
        moments = {
            f"optimizer.{name}.{key}": tensor
            for name, optimiser in self.optimisers.items()
            for key, tensor in optimiser.tensors().items()
        }
        return {key: tensor for part in weights for key, tensor in part.items()} | moments

    def policy(self, step: int) -> ReactivePolicy:
        """The network that acts as it is now, as a policy."""
        actor = self.networks[POLICY]
        assert isinstance(actor, Actor)
        return reactive_policy(self.setup, actor, step)

    def resume_training(self) -> None:
        """Nothing: acting changed nothing."""

    def describe(self) -> dict[str, int]:
        """The number of parameters that are trained."""
        networks = self.networks.values()
        return {"parameters": sum(p.numel() for net in networks for p in net.parameters())}
