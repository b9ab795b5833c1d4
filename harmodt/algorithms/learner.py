"""The base class of all learners, and the rows of the table of algorithms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from harmodt_kernels.vector import ParameterVector

from ..batch import Batch
from ..checkpoint import Checkpoint
from ..config import AlgorithmSettings, PromptSettings, TrainConfig
from ..data.feed import Feed
from ..data.inputs import Inputs, TaskConditioning
from ..data.order import TaskOrder
from ..data.store import TaskData
from ..data.trajectories import Trajectories, open_trajectories
from ..data.windows import WindowSampler
from ..devices import Execution
from ..draws import TRAIN, Seeds
from ..environments import EnvironmentSpec
from ..policies import Policy
from ..settings import settings
from .optimiser import Optimiser

MODEL = "model"
"""The name of the network in a learner that trains only one network."""

Own = TypeVar("Own", bound=AlgorithmSettings)
"""The settings of one algorithm."""


@dataclass(frozen=True)
class Setup:
    """Everything that determines a learner, except the data.

    Attributes:
        config: the run's settings.
        environment: the environments of the tasks.
        conditioning: one entry per task; index = task id.
        execution: the device, kernels and precision of the networks.
    """

    config: TrainConfig
    environment: EnvironmentSpec
    conditioning: tuple[TaskConditioning, ...]
    execution: Execution


@dataclass(frozen=True)
class StepResult:
    """A training step's task ids, its losses [G], and its gradient norm before clipping."""

    task_ids: Sequence[int]
    losses: Tensor
    gradient_norm: Tensor


class Learner(Generic[Own]):
    """Trains the networks of one algorithm on several tasks, and makes a policy from them.

    Each algorithm is a subclass. It builds the networks, and implements the losses of a batch and
    the policy. It overrides other methods if it needs to. A new learner has no data. It can load a
    checkpoint and act. Before it can train, `prepare_training` adds the data.

    A learner does not count steps. The caller passes the number of each step. This number and the
    run's seed determine all random draws of the step.

    Args:
        setup: the run's settings, tasks and device.

    Attributes:
        settings: the settings that only this algorithm has.
        trained: the parameters of each trained network, by the network's name.
        averages: the parameters of each moving average of a trained network, by the average's name.
    """

    records_steps = True
    """Whether a step can be captured as a graph and replayed."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.settings = cast(Own, setup.config.own)
        self.execution = setup.execution
        self.trained: dict[str, ParameterVector] = {}
        self.averages: dict[str, ParameterVector] = {}
        self.optimisers: dict[str, Optimiser] = {}
        self._seeds = Seeds(setup.config.run.seed)

    # An algorithm implements or overrides these.

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """The loss of each group of a batch, [G].

        Args:
            targets: float32 [G, B, L, A], the actions of the data.
            extra: the step's extra inputs: the tensors of `extra_inputs` after the first one.
        """
        raise NotImplementedError

    def policy(self, step: int) -> Policy:
        """The policy with the present weights, after `step` steps.

        It shares the learner's tensors. Call `resume_training` before the next training step.
        """
        raise NotImplementedError

    def make_sampler(self, episodes: Trajectories, inputs: Inputs) -> WindowSampler:
        """The sampler of the algorithm's windows."""
        raise NotImplementedError

    def extra_inputs(self, steps: range) -> list[Tensor]:
        """The inputs of consecutive steps besides their windows: tensors [S, ...] on the CPU.

        The first tensor has the learning rates and bias corrections.
        """
        optimiser = next(iter(self.optimisers.values()))  # all networks have the same rates
        return [optimiser.rates(steps)]

    def before_step(self, step: int) -> dict[str, float]:
        """Do the work that is due after `step` steps, such as mask updates.

        Returns:
            The values to log.

        Raises:
            NotFinite: a gradient or a loss is NaN or infinite.
            UserError: the gradients are finite, but the work cannot be done with them.
        """
        return {}

    def after_step(self, step: int) -> None:
        """Do the work that follows the optimiser's step, such as moving averages of weights."""

    @property
    def max_timesteps(self) -> int:
        """Number of time steps that the networks distinguish; later ones count as the last one."""
        return self.setup.environment.episode_length

    @property
    def draws_from_pytorch(self) -> bool:
        """Whether a step draws from PyTorch's generator, which is then seeded before each step."""
        return False

    @property
    def mask_bits(self) -> Tensor | None:
        """The masks of all tasks, in the form of `MaskBank.bits`; None without masks."""
        return None

    # All algorithms share these.

    @property
    def task_count(self) -> int:
        """Number of tasks."""
        return len(self.setup.conditioning)

    def inputs(self, device: torch.device | None = None) -> Inputs:
        """The `Inputs` object that makes the networks' inputs from time steps.

        Args:
            device: device of the prompts, as in `Inputs`.
        """
        prompts: PromptSettings | None = self.settings.prompts()
        data = self.setup.config.data
        return Inputs(self.setup.conditioning, data, self.max_timesteps, prompts, device)

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """Get ready to train on data: optimisers, and the feed of training steps.

        Args:
            data: one entry per task; index = task id.

        Raises:
            UserError: a setting does not fit the data or the model.
        """
        config, execution = self.setup.config, self.execution
        self.optimisers = {
            name: Optimiser(vector, config.optimisation, execution.backend, execution.rounded_to)
            for name, vector in self.trained.items()
        }
        order = TaskOrder(config.data, len(data), config.run.seed)
        episodes = open_trajectories(config.run.data_device, data, execution.device)
        self.sampler = self.make_sampler(episodes, self.inputs(episodes.copied_to))
        self.feed = Feed(self.sampler, order, config.run.seed, self.extra_inputs)
        self._step = execution.repeated(self._compute) if self.records_steps else self._compute

    def train_step(self, step: int) -> StepResult:
        """Train every network by one step on several tasks (Eq. 11). The first step is step 1."""
        if self.draws_from_pytorch:
            self._seeds.begin(TRAIN, step - 1)
        task_ids = self.feed.load(step)
        result = self._step()
        self.after_step(step)
        return StepResult(task_ids, result[:-1], result[-1])

    def _compute(self) -> Tensor:
        """Compute the loaded step. Return its losses [G] and gradient norm as one tensor.

        A graph replays this method. So the method works only on the device, on tensors with fixed
        addresses.
        """
        batch, targets = self.feed.batch()
        rates, *extra = self.feed.extra
        self.clear_gradients()
        with self.execution.computing():
            losses = self.losses(batch, targets, *extra)
            self.backward(losses)
        self.combine_gradients(batch.task_ids, *extra)
        norms = [o.step(self.mask_bits, batch.task_ids, rates) for o in self.optimisers.values()]
        norm = functools.reduce(torch.hypot, norms)  # the norm over all networks
        return torch.cat((losses.detach(), norm[None]))

    def clear_gradients(self) -> None:
        """Set the gradients to 0, because autograd adds to them."""
        for vector in self.trained.values():
            vector.gradient.zero_()

    def backward(self, losses: Tensor) -> None:
        """Compute the gradient of the mean of losses [G]."""
        losses.mean().backward()

    def combine_gradients(self, task_ids: Tensor, *extra: Tensor) -> None:
        """Combine per-task gradients into the step's gradient, if `backward` wrote any.

        Args:
            task_ids: int64 [G], the tasks of the step.
            extra: the extra inputs that `losses` gets.
        """

    def weights(self) -> dict[str, Tensor]:
        """All parameters of all networks, by name."""
        networks = self.trained | self.averages
        return {
            f"{name}.{parameter}": tensor
            for name, vector in networks.items()
            for parameter, tensor in vector.tensors().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name. AdamW's moments exist after `prepare_training`."""
        moments = {
            # The moments of the network "model" have names without the network's name.
            ".".join(("optimizer", *([] if name == MODEL else [name]), key)): tensor
            for name, optimiser in self.optimisers.items()
            for key, tensor in optimiser.tensors().items()
        }
        return self.weights() | moments

    def load(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors of a checkpoint into this learner.

        Raises:
            UserError: the checkpoint has another model size.
        """
        checkpoint.copy_to(self.tensors())
        self.resume_training()

    def resume_training(self) -> None:
        """Prepare for a training step after the policy acted or other code changed tensors."""
        for optimiser in self.optimisers.values():
            optimiser.round_weights()

    def describe(self) -> dict[str, Any]:
        """Numbers for the run's description: `parameters`, and numbers of the masks if any."""
        return {"parameters": sum(vector.count() for vector in self.trained.values())}


@dataclass(frozen=True)
class Algorithm:
    """A row of the table of algorithms.

    Attributes:
        settings: the class of the settings that only this algorithm has.
        learner: builds the learner.
        defaults: this algorithm's own defaults of shared settings, by the setting's name.
        unread: names of the shared settings that this algorithm does not read. A command refuses
            them.
    """

    settings: type[AlgorithmSettings]
    learner: Callable[[Setup], Learner[Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        """Whether the algorithm reads the setting with this name."""
        return name in dict(settings(self.settings())) or (
            name in dict(settings(TrainConfig())) and name not in self.unread
        )
