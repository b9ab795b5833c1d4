"""Prompt-DT and MTDT: a decision transformer without masks.

The learner here is also what HarmoDT adds its masks to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from harmodt_kernels.soft_masks import soft_masks

from ..batch import Batch, batch_of, move, tensors_of
from ..checkpoint import Checkpoint
from ..config import AlgorithmSettings, PromptSettings, TransformerSettings
from ..data.feed import Feed
from ..data.inputs import Inputs
from ..data.order import TaskOrder
from ..data.store import TaskData
from ..data.trajectories import lay_out
from ..data.windows import WindowSampler
from ..draws import MASKS, SURGERY, TRAIN, Draws, Seeds, dropout_seeds
from ..errors import UserError
from ..masks.bank import TaskMasks
from ..masks.gradients import Draw, GradientPass, TaskGradients, averaged_harmony
from ..networks.decision_transformer import DecisionTransformer, TransformerConfig
from ..policies.decision import DecisionPolicy
from ..settings import Count, Whole
from .learner import Setup, StepResult
from .optimiser import Optimiser
from .surgery import SurgerySettings, combine


@dataclass(frozen=True)
class SequenceSettings(AlgorithmSettings):
    """What every algorithm has that trains a decision transformer."""

    model: TransformerSettings = TransformerSettings()
    task_embedding_dim: Whole = 0
    """Size of a learned task embedding that is told beside the observations; 0 for none."""
    harmony_every: Whole = 0
    """Steps between logs of the averaged harmony score; 0: at mask updates alone."""
    gradients: SurgerySettings = SurgerySettings()

    @property
    def mask_levels(self) -> int:
        """L, of soft masks; 1 for masks of bits and where there are none."""
        return 1


@dataclass(frozen=True)
class PromptDTSettings(SequenceSettings):
    """Prompt-DT: told the task by a prompt."""

    prompt: PromptSettings = PromptSettings()

    def prompts(self) -> PromptSettings:
        return self.prompt


@dataclass(frozen=True)
class MTDTSettings(SequenceSettings):
    """MTDT: told the task by a learned embedding."""

    task_embedding_dim: Count = 16
    """Size of the learned task embedding."""


def sequence_settings(setup: Setup) -> SequenceSettings:
    """The run's own settings, which are a sequence model's."""
    own = setup.config.own
    assert isinstance(own, SequenceSettings)
    return own


def build_model(setup: Setup) -> DecisionTransformer:
    """A decision transformer of the run's sizes, drawn from torch's generator."""
    own, environment = sequence_settings(setup), setup.environment
    prompt = own.prompts()
    embed_dim, layers, heads = own.model.shape
    config = TransformerConfig(
        observation_size=environment.observation_size,
        action_size=environment.action_size,
        embed_dim=embed_dim,
        layers=layers,
        heads=heads,
        max_timesteps=own.model.max_timesteps,
        prompt_length=0 if prompt is None else prompt.prompt_length,
        task_embedding_dim=own.task_embedding_dim,
        dropout=own.model.dropout,
        embedding_dropout=own.model.embedding_dropout,
        initialisation=own.model.initialisation,
    )
    backend, device = setup.execution.backend, setup.execution.device
    if own.mask_levels > 1:
        backend = soft_masks(backend, own.mask_levels)
    return DecisionTransformer(config, len(setup.conditioning), backend, device)


def inputs_of(setup: Setup, place: torch.device | None = None) -> Inputs:
    """The rule by which the run's data and observations become what its model reads.

    Args:
        place: where data and prompts lie, as in `Trajectories`.
    """
    own = sequence_settings(setup)
    return Inputs(
        setup.conditioning, setup.config.data, own.model.max_timesteps, own.prompts(), place
    )


def decision_policy(
    setup: Setup, model: DecisionTransformer, mask_bits: Tensor | None, step: int, **more: float
) -> DecisionPolicy:
    """A model and its masks, as `MaskBank` has them, as a policy."""
    return DecisionPolicy(
        model,
        mask_bits,
        inputs_of(setup),
        sequence_settings(setup).model.context_length,
        setup.environment,
        setup.execution,
        step,
        **more,
    )


def model_tensors(model: DecisionTransformer) -> dict[str, Tensor]:
    """A model's parameters as a checkpoint names them."""
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def load_model(setup: Setup, checkpoint: Checkpoint) -> DecisionTransformer:
    """The model of a checkpoint.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    model = build_model(setup)
    checkpoint.copy_to(model_tensors(model))
    return model


def load_policy(setup: Setup, checkpoint: Checkpoint) -> DecisionPolicy:
    """The policy of a checkpoint.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    return decision_policy(setup, load_model(setup, checkpoint), None, checkpoint.step)


class SequenceLearner:
    """Trains a decision transformer on several tasks at a time; a `Learner`.

    Args:
        setup: the run's settings, tasks and device.
        data: one entry per task; index = task id.

    Raises:
        UserError: there is nothing to operate on, for a step has one task alone.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        self.setup = setup
        self.execution = setup.execution
        self.settings = sequence_settings(setup)
        self.model = build_model(setup)
        self.vector = self.model.vector
        self.optimiser = Optimiser(
            self.vector,
            setup.config.optimisation,
            setup.execution.backend,
            setup.execution.rounded_to,
        )
        run, device = setup.config.run, setup.execution.device
        order = TaskOrder(setup.config.data, len(data), run.seed)
        episodes = lay_out(run.data_device, data, device)
        inputs = inputs_of(setup, episodes.place)
        self.sampler = WindowSampler(episodes, inputs, self.settings.model.context_length, device)
        self._seeds = Seeds(run.seed)
        self.feed = Feed(self.sampler, order, run.seed, self._of_steps)
        self._of_tasks = self._places_of_tasks()
        self._masks: TaskMasks | None = None
        # CAGrad computes on the host, which no graph can hold.
        repeats = self.settings.gradients.surgery != "cagrad"
        self._step = setup.execution.repeated(self._compute) if repeats else self._compute

    def _places_of_tasks(self) -> Tensor | None:
        """Where a step with surgery has its tasks' gradients, float32 [G, P]; None without."""
        surgery, tasks = self.settings.gradients.surgery, self.setup.config.data.tasks_per_step
        if surgery == "none":
            return None
        if tasks == 1:
            raise UserError(
                f"surgery {surgery} operates on the gradients of several tasks, and tasks_per_step "
                "is 1: give --tasks-per-step 2 or more, or --surgery none"
            )
        # zeros, because nothing is written to the padding
        return self.vector.weights.new_zeros(tasks, len(self.vector.weights))

    def train_step(self, step: int) -> StepResult:
        """One optimiser step (Eq. 11) over some tasks."""
        if not self.setup.config.run.fused:  # dropout in plain PyTorch draws from its generator
            self._seeds.begin(TRAIN, step - 1)
        task_ids = self.feed.load(step)
        result = self._step()
        return StepResult(task_ids, result[:-1], result[-1])

    def _of_steps(self, steps: range) -> list[Tensor]:
        """What steps read beside their windows: the optimiser's rates, seeds of dropout, number."""
        numbers = torch.arange(steps.start - 1, steps.stop - 1)
        seeds = dropout_seeds(self.setup.config.run.seed, TRAIN, numbers, self.model.dropout_places)
        # Each seed twice, so that all lie at multiples of 16 bytes.
        return [self.optimiser.rates(steps), seeds[..., None].expand(-1, -1, 2), numbers]

    def _compute(self) -> Tensor:
        """The step whose inputs were loaded: losses [G] and the gradient's norm, as one tensor.

        All of it is computed on the device, from tensors that stay where they are.
        """
        (batch, targets), (rates, seeds, number) = self.feed.batch(), self.feed.more
        self._clear_gradient()
        masks = self._masks_of_step(batch.task_ids)
        with self.execution.computing():
            losses = self.losses(batch, targets, masks, seeds[:, 0])
            (losses.mean() if self._of_tasks is None else losses.sum()).backward()
            masks.queue.finish()
        if self._of_tasks is not None:  # in float32 whatever the precision of the products
            self._operate(self._of_tasks, batch.task_ids, number)
        norm = self.optimiser.step(masks.bits, batch.task_ids, rates)
        return torch.cat((losses.detach(), norm[None]))

    def _clear_gradient(self) -> None:
        """Zero what autograd will add to: layers that write their gradients write over the last."""
        if self._of_tasks is None and not self.setup.config.run.fused:
            self.vector.gradient.zero_()
        elif self.model.config.task_embedding_dim:
            self.vector.slots["task_embedding.weight"].view(self.vector.gradient).zero_()

    def _masks_of_step(self, task_ids: Tensor) -> TaskMasks:
        """Those of some tasks, int64 [G], with the place where the step has its gradients."""
        if self._masks is None:
            places = self._of_tasks
            if places is None and self.setup.config.run.fused:
                # The layers write their gradients here; autograd would add them.
                places = self.vector.gradient[None]
            masks = self.masks_of(task_ids, places)
            self._masks = replace(masks, bf16_copy=self.optimiser.bf16_copy)
        return self._masks.with_tasks(task_ids)

    def _operate(self, gradients: Tensor, task_ids: Tensor, step: Tensor) -> None:
        """Make the step's gradient of its tasks', [G, P]."""
        if self.model.config.task_embedding_dim:
            # Autograd has brought its gradient, whose rows are of one task each.
            slot = self.vector.slots["task_embedding.weight"]
            own = torch.arange(self.task_count, device=task_ids.device) == task_ids[:, None]
            of_rows = slot.view(self.vector.gradient)
            slot.of_groups(gradients).copy_(torch.where(own[..., None], of_rows, 0.0))
        draws = Draws(self.setup.config.run.seed, SURGERY, step)
        self.vector.gradient.copy_(combine(gradients, self.settings.gradients, draws))

    def losses(
        self, batch: Batch, targets: Tensor, masks: TaskMasks, seeds: Tensor | None = None
    ) -> Tensor:
        """Mean squared error on the actions of each group's valid history steps (Eq. 2), [G].

        Args:
            seeds: of dropout, as the model takes them.
        """
        valid = batch.history.valid
        shares = valid / (valid.sum((1, 2), keepdim=True) * targets.shape[-1])
        errors = F.mse_loss(self.model(batch, masks, seeds), targets, reduction="none")
        return (errors * shares[..., None]).sum((1, 2, 3))

    def masks_of(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """What a batch of these tasks, int64 [G], is computed under: all weights."""
        return TaskMasks(self.vector, None, task_ids, group_gradients)

    def before_step(self, step: int) -> dict[str, float]:
        """Measure how far the tasks' gradients agree, where that is due."""
        if not self.settings.harmony_every or step % self.settings.harmony_every:
            return {}
        return {"harmony": self.averaged_harmony(step)}

    def averaged_harmony(self, step: int) -> float:
        """Definition 3.2 on a fresh batch of every task, in [-1, 1]."""
        task_ids, at_once = range(self.task_count), self.setup.config.data.tasks_per_step
        parts = [task_ids[i : i + at_once] for i in task_ids[::at_once]]
        compute = GradientPass(self.vector, self.losses_of, self.masks_of)
        with self.execution.computing():
            return averaged_harmony(TaskGradients(compute, self.draw_of(step), parts))

    def draw_of(self, step: int) -> Draw:
        """Draws batches of tasks that depend on the step and the tasks alone, for `losses_of`."""

        def draw(task_ids: Sequence[int]) -> list[Tensor]:
            draws = self._seeds.begin(MASKS, step, *task_ids)
            batch = self.sampler.sample(task_ids, draws)
            number, places = torch.tensor([step]), self.model.dropout_places
            (drops,) = dropout_seeds(draws.seed, MASKS, number, places, task_ids[0])
            return [*tensors_of(*batch), *move([drops], self.execution.device)]

        return draw

    def losses_of(self, drawn: list[Tensor], masks: TaskMasks) -> Tensor:
        """The losses [G] of tasks on a batch that was drawn of them."""
        *batch, drops = drawn
        return self.losses(*batch_of(batch), masks, drops)

    @property
    def task_count(self) -> int:
        """Number of tasks."""
        return len(self.setup.conditioning)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        return model_tensors(self.model) | {
            f"optimizer.{n}": t for n, t in self.optimiser.tensors().items()
        }

    def policy(self, step: int) -> DecisionPolicy:
        """The model as it is now, as a policy; it is put into evaluation mode."""
        return decision_policy(self.setup, self.model, None, step)

    def resume_training(self) -> None:
        """Put the model into training mode again, with its weights as they are now."""
        self.model.train()
        self.optimiser.round_weights()

    def describe(self) -> dict[str, int]:
        """The number of parameters."""
        return {"parameters": sum(p.numel() for p in self.model.parameters())}
