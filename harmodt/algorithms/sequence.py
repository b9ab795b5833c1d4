"""Prompt-DT and MTDT: a decision transformer without masks.

HarmoDT's learner is a subclass that adds masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from harmodt_kernels.soft_masks import soft_masks

from ..batch import Batch, batch_of, move, tensors_of
from ..config import AlgorithmSettings, PromptSettings, TransformerSettings
from ..data.inputs import Inputs
from ..data.store import TaskData
from ..data.trajectories import Trajectories
from ..data.windows import WindowSampler
from ..draws import MASKS, SURGERY, TRAIN, Draws, dropout_seeds
from ..errors import UserError
from ..masks.bank import TaskMasks
from ..masks.gradients import GradientPass, TaskGradients, averaged_harmony, backward, chunks_of
from ..networks.decision_transformer import DecisionTransformer, TransformerConfig
from ..policies.decision import DecisionPolicy
from ..settings import Count, Whole
from .learner import MODEL, Learner, Setup
from .surgery import SurgerySettings, combine


@dataclass(frozen=True)
class SequenceSettings(AlgorithmSettings):
    """The settings of every algorithm that trains a decision transformer."""

    model: TransformerSettings = TransformerSettings()
    task_embedding_dim: Whole = 0
    """Size of a learned task embedding that the model reads with each observation; 0: none."""
    harmony_every: Whole = 0
    """Steps between logs of the averaged harmony score; 0: only mask updates log it."""
    gradients: SurgerySettings = SurgerySettings()

    @property
    def mask_levels(self) -> int:
        """The number of levels L of soft masks; 1 for masks of bits and without masks."""
        return 1


@dataclass(frozen=True)
class PromptDTSettings(SequenceSettings):
    """Prompt-DT: conditioned on a prompt."""

    prompt: PromptSettings = PromptSettings()

    def prompts(self) -> PromptSettings:
        return self.prompt


@dataclass(frozen=True)
class MTDTSettings(SequenceSettings):
    """MTDT: conditioned on a learned task embedding."""

    task_embedding_dim: Count = 16
    """Size of the learned task embedding."""


SequenceOwn = TypeVar("SequenceOwn", bound=SequenceSettings)


class SequenceLearner(Learner[SequenceOwn]):
    """Trains a decision transformer.

    The model's layers overwrite a buffer of gradients [R, P]. With R = 1 they write the gradient of
    the mean loss. With R = G they write one gradient for each task, for gradient surgery.

    Attributes:
        model: the decision transformer.
        vector: its parameters.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = self._build_model()
        self.vector = self.trained[MODEL] = self.model.vector

    def _build_model(self) -> DecisionTransformer:
        """Build the decision transformer; PyTorch's generator draws its weights."""
        own, environment = self.settings, self.setup.environment
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
        backend = self.execution.backend
        if own.mask_levels > 1:
            backend = soft_masks(backend, own.mask_levels)
        return DecisionTransformer(config, self.task_count, backend, self.execution.device)

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """As `Learner.prepare_training`.

        Raises:
            UserError: also if gradient surgery has only one task in a step.
        """
        surgery, tasks = self.settings.gradients.surgery, self.setup.config.data.tasks_per_step
        if surgery != "none" and tasks == 1:
            raise UserError(
                f"surgery {surgery} combines the gradients of several tasks, but tasks_per_step is "
                "1: give --tasks-per-step 2 or more, or --surgery none"
            )
        # CAGrad computes on the host, and a graph cannot capture that.
        self.records_steps = surgery != "cagrad"
        super().prepare_training(data)
        gradients = self.vector.gradient[None]
        if surgery != "none":  # zeros: no layer writes to the padding, and it must be 0
            gradients = gradients.new_zeros(tasks, gradients.shape[1])
        bf16_copy = self.optimisers[MODEL].bf16_copy
        self._masks = TaskMasks(
            self.vector, self.mask_bits, self.feed.task_ids, gradients, bf16_copy
        )

    @property
    def max_timesteps(self) -> int:
        """Size of the time-step embedding."""
        return self.settings.model.max_timesteps

    @property
    def draws_from_pytorch(self) -> bool:
        """True in plain PyTorch, which draws dropout itself; the kernels' dropout takes seeds."""
        return not self.setup.config.run.fused

    def make_sampler(self, episodes: Trajectories, inputs: Inputs) -> WindowSampler:
        """The sampler of windows of K steps."""
        length = self.settings.model.context_length
        return WindowSampler(episodes, inputs, length, self.execution.device)

    def extra_inputs(self, steps: range) -> list[Tensor]:
        """Learning rates and bias corrections; seeds of dropout; the steps' numbers, from 0."""
        numbers = torch.arange(steps.start - 1, steps.stop - 1)
        seeds = dropout_seeds(self.setup.config.run.seed, TRAIN, numbers, self.model.dropout_places)
        # Store each seed twice, so that each pair begins at a multiple of 16 bytes.
        return [*super().extra_inputs(steps), seeds[..., None].expand(-1, -1, 2), numbers]

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """The losses of a training step's groups, [G]; `extra` has the step's seeds and number."""
        seeds, _ = extra
        return self.losses_under(self._masks, batch, targets, seeds[:, 0])

    def losses_under(
        self, masks: TaskMasks, batch: Batch, targets: Tensor, seeds: Tensor | None = None
    ) -> Tensor:
        """Mean squared error on the actions of each group's valid history steps (Eq. 2), [G].

        Args:
            masks: the masks of the groups' tasks.
            targets: float32 [G, B, K, A], the actions of the data.
            seeds: the seeds of dropout, as in `DecisionTransformer.forward`.
        """
        valid = batch.history.valid
        shares = valid / (valid.sum((1, 2), keepdim=True) * targets.shape[-1])
        errors = F.mse_loss(self.model(batch, masks, seeds), targets, reduction="none")
        return (errors * shares[..., None]).sum((1, 2, 3))

    def clear_gradients(self) -> None:
        """Do nothing, because the layers overwrite the gradients of the last step."""

    def backward(self, losses: Tensor) -> None:
        """Write the gradients to the step's buffer."""
        backward(losses, self._masks)

    def combine_gradients(self, task_ids: Tensor, *extra: Tensor) -> None:
        """Combine per-task gradients by surgery, in float32 at every precision of products."""
        gradients, own = self._masks.group_gradients, self.settings.gradients
        if gradients is not None and own.surgery != "none":
            _, number = extra
            draws = Draws(self.setup.config.run.seed, SURGERY, number)
            self.vector.gradient.copy_(combine(gradients, own, draws))

    def masks_for(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """The masks of a batch of tasks, int64 [G]; without masks, every weight is active."""
        return TaskMasks(self.vector, self.mask_bits, task_ids, group_gradients)

    def before_step(self, step: int) -> dict[str, float]:
        """Measure how far the tasks' gradients agree, every `harmony_every` steps."""
        if not self.settings.harmony_every or step % self.settings.harmony_every:
            return {}
        return {"harmony": self.averaged_harmony(step)}

    def averaged_harmony(self, step: int) -> float:
        """The averaged harmony score (Definition 3.2) on a new batch of each task, in [-1, 1]."""
        chunks = chunks_of(self.task_count, self.setup.config.data.tasks_per_step)
        compute = GradientPass(self.vector, self.losses_of_drawn, self.masks_for)
        with self.execution.computing():
            return averaged_harmony(TaskGradients(compute, self.draw_for(step), chunks))

    def draw_for(self, step: int) -> Callable[[Sequence[int]], list[Tensor]]:
        """Return a function that draws a batch of some tasks, for `losses_of_drawn`.

        The batch depends only on the step and the tasks. The function keeps the last batch, because
        masked and dense gradients use the same batch.
        """
        last: tuple[Sequence[int], list[Tensor]] = (), []

        def draw(task_ids: Sequence[int]) -> list[Tensor]:
            nonlocal last
            if self.draws_from_pytorch:  # masked and dense passes have the same dropout
                self._seeds.begin(MASKS, step, *task_ids)
            if last[0] != task_ids:
                last = task_ids, self._draw(step, task_ids)
            return last[1]

        return draw

    def _draw(self, step: int, task_ids: Sequence[int]) -> list[Tensor]:
        seed, numbers = self.setup.config.run.seed, torch.tensor([step])
        batch = self.sampler.sample(task_ids, Draws(seed, MASKS, step))
        count = self.model.dropout_places
        (seeds,) = dropout_seeds(seed, MASKS, numbers, count, task_ids[0])
        return [*tensors_of(*batch), *move([seeds], self.execution.device)]

    def losses_of_drawn(self, drawn: list[Tensor], masks: TaskMasks) -> Tensor:
        """The losses [G] of a batch that `draw_for` drew."""
        *batch, seeds = drawn
        return self.losses_under(masks, *batch_of(batch), seeds)

    def policy(self, step: int) -> DecisionPolicy:
        """The policy of the model and its masks. It puts the model into evaluation mode."""
        return self.policy_under(self.mask_bits, step)

    def policy_under(self, mask_bits: Tensor | None, step: int) -> DecisionPolicy:
        """The policy of the model under masks in the form of `MaskBank.bits`."""
        return DecisionPolicy(
            self.model,
            mask_bits,
            self.inputs(),
            self.settings.model.context_length,
            self.setup.environment,
            self.execution,
            step,
            self.unseen_threshold,
        )

    @property
    def unseen_threshold(self) -> float:
        """The share of tasks above which a weight is active in the voted mask (Eq. 13)."""
        return 0.5

    def resume_training(self) -> None:
        """Put the model into training mode again, with its present weights."""
        self.model.train()
        super().resume_training()
