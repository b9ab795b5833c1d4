"""MTDiff-P: a diffusion model of action sequences, conditioned on a prompt or a one-hot task.

It follows He et al., "Diffusion Model is an Effective Planner and Data Synthesizer for Multi-Task
Reinforcement Learning", NeurIPS 2023 (arXiv 2305.18459). The HarmoDT paper calls it MTDIFF-P and
MTDIFF-P-ONEHOT. The model denoises a plan of actions. It is conditioned on the last observations,
the task and the return, with classifier-free guidance of the return.

The paper leaves some choices open. For them, this module follows the authors' code: sizes and
schedule, a Huber loss in which a plan's first action counts ten times, two observations, prompts of
20 steps, a return that is hidden in one window of five, a running mean of the weights at
evaluation, a guidance weight of 1.2, and half of the random noise when a plan is drawn.

The module differs from the authors' code in these points. Batches, normalisation and optimiser are
those of this project's sequence models. So observations are normalised by the statistics of the
data and not by a LayerNorm. The return is the undiscounted return-to-go, from which each reward is
subtracted at evaluation. A prompt stays the same for a whole episode. The authors' code has no
one-hot form. Here, a one-hot vector of the task replaces the prompt's steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from ..batch import Batch
from ..config import AlgorithmSettings, ModelSize, PromptSettings
from ..data.inputs import Inputs
from ..data.trajectories import Trajectories
from ..data.windows import Drawn, WindowSampler
from ..draws import NOISE, Draws, below, coin, normal
from ..errors import UserError
from ..networks.denoiser import Denoiser, DenoiserConfig, Situation
from ..networks.diffusion import Diffusion
from ..policies.plan import PlanPolicy, PlanSettings, tokens_of_task
from ..settings import Positive, Share, ShareBelowOne
from .learner import MODEL, Learner, Setup


@dataclass(frozen=True)
class DenoiserSettings:
    """Sizes of the denoiser and of the diffusion, and how it is trained."""

    embed_dim: ModelSize = 256
    """Embedding dimension d, an even number."""
    layers: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Number of transformer blocks."""
    heads: ModelSize = 2
    """Number of attention heads."""
    dropout: ShareBelowOne = 0.0
    """Dropout of attention and MLPs."""
    context_length: ModelSize = 2
    """Number of observations that the model reads; the present one is the last."""
    horizon: ModelSize = 32
    """Number of actions of a plan in training."""
    diffusion_steps: Annotated[int, Meta(ge=1, le=10_000)] = 200
    """T, the number of noise steps that turn a plan into pure noise."""
    return_dropout: Share = 0.2
    """Probability of hiding the return from the model in training."""
    first_action_weight: Positive = 10.0
    """Weight of a plan's first action in the loss; the other actions have the weight 1."""
    average_decay: ShareBelowOne = 0.995
    """Decay of the running mean of the weights; the policy uses this mean."""


@dataclass(frozen=True)
class MTDiffSettings(AlgorithmSettings):
    """MTDiff-P conditioned on a one-hot vector of the task."""

    model: DenoiserSettings = DenoiserSettings()
    plan: PlanSettings = PlanSettings()

    def check(self) -> None:
        """Refuse sizes that do not fit together.

        Raises:
            UserError: the embedding dimension is odd or not a multiple of the heads, there are more
                sampling steps than steps of the diffusion, or a plan has fewer actions than the
                policy executes.
        """
        model, plan = self.model, self.plan
        if model.embed_dim % 2 or model.embed_dim % model.heads:
            raise UserError(
                f"embed_dim {model.embed_dim} is odd or not a multiple of heads {model.heads}: "
                "change one of the two"
            )
        if plan.sampler == "ddim" and plan.sampling_steps > model.diffusion_steps:
            raise UserError(
                f"sampling_steps {plan.sampling_steps} is above diffusion_steps "
                f"{model.diffusion_steps}: lower it"
            )
        if plan.replan_every > model.horizon:
            raise UserError(
                f"replan_every {plan.replan_every} is above horizon {model.horizon}: lower it"
            )


@dataclass(frozen=True)
class PromptedMTDiffSettings(MTDiffSettings):
    """MTDiff-P conditioned on a prompt."""

    prompt: PromptSettings = PromptSettings(prompt_length=20)

    def prompts(self) -> PromptSettings:
        return self.prompt


class PlanSampler(WindowSampler):
    """Draws windows of h - 1 + H steps: those before the present step, and those of a plan.

    The plan begins at the present step, which is drawn like the first step of any window. If the
    episode has fewer than h - 1 earlier steps, copies of its first step replace the missing ones.

    Args:
        episodes: the training episodes of each task.
        inputs: the inputs of the same tasks.
        settings: the lengths H and h.
        device: batches go to this device.
    """

    def __init__(
        self,
        episodes: Trajectories,
        inputs: Inputs,
        settings: DenoiserSettings,
        device: torch.device | str = "cpu",
    ):
        super().__init__(episodes, inputs, settings.horizon, device)
        self._back = torch.arange(1 - settings.context_length, 0, device=self.episodes.device)

    def draw(self, task_ids: Tensor, draws: Draws) -> Drawn:
        """Draw the windows of a batch. The present step has the index h - 1 in its window."""
        drawn = super().draw(task_ids, draws)
        before = (drawn.times[..., :1] + self._back).clamp(min=0)
        there = torch.ones_like(before, dtype=torch.bool)
        return drawn._replace(
            times=torch.cat((before, drawn.times), -1),
            valid=torch.cat((there, drawn.valid), -1),
            hidden=torch.cat((there, drawn.hidden), -1),  # a denoiser reads no previous action
        )


class MTDiffLearner(Learner[MTDiffSettings]):
    """Trains a denoiser, and acts with a running mean of its weights.

    Attributes:
        model: the trained denoiser.
        average: a denoiser whose weights are the running mean.
    """

    records_steps = False  # dropout draws from PyTorch's generator
    draws_from_pytorch = True

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model, self.average = self._build_model(), self._build_model().eval()
        self.average.vector.weights.copy_(self.model.vector.weights)
        self.trained[MODEL] = self.model.vector
        self.averages["average"] = self.average.vector
        steps = self.settings.model.diffusion_steps
        self.diffusion = Diffusion(steps, self.execution.device)

    def _build_model(self) -> Denoiser:
        """Build a denoiser; PyTorch's generator draws its weights."""
        model, environment = self.settings.model, self.setup.environment
        prompt = self.settings.prompts()
        step_size = environment.observation_size + environment.action_size
        config = DenoiserConfig(
            observation_size=environment.observation_size,
            action_size=environment.action_size,
            task_size=self.task_count if prompt is None else step_size,
            task_length=1 if prompt is None else prompt.prompt_length,
            context_length=model.context_length,
            horizon=model.horizon,
            embed_dim=model.embed_dim,
            layers=model.layers,
            heads=model.heads,
            dropout=model.dropout,
        )
        return Denoiser(config, self.execution.device)

    def make_sampler(self, episodes: Trajectories, inputs: Inputs) -> PlanSampler:
        """The sampler of plans."""
        return PlanSampler(episodes, inputs, self.settings.model, self.execution.device)

    def extra_inputs(self, steps: range) -> list[Tensor]:
        """Learning rates and bias corrections; times of the diffusion, visible returns, noise.

        The CPU draws the noise, so that all devices get the same noise.
        """
        model, data = self.settings.model, self.setup.config.data
        size = self.setup.environment.action_size
        numbers = model.horizon * size
        windows, groups = torch.arange(data.batch_per_task), torch.arange(data.tasks_per_step)
        # Block 0 draws time and visible return. Each further block draws four numbers of noise.
        blocks = torch.arange(1 - (-numbers // 4))
        step = torch.arange(steps.start - 1, steps.stop - 1)[:, None, None, None]
        draws = Draws(self.setup.config.run.seed, NOISE, step)
        words = draws.words(windows[:, None], groups[:, None, None], blocks)  # [4, S, G, B, blocks]
        time, hidden, *_ = words[..., 0]
        noise = normal(words[..., 1:]).movedim(0, -1).flatten(-2)[..., :numbers]
        return [
            *super().extra_inputs(steps),
            below(time, model.diffusion_steps),
            ~coin(hidden, model.return_dropout),
            noise.unflatten(-1, (-1, size)),
        ]

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """Weighted Huber loss of the predicted noise, over the valid steps of the plans, [G].

        Args:
            batch: G groups of B windows of h - 1 + H steps.
            targets: [G, B, h - 1 + H, A], the actions.
            extra: int64 [G, B], times of the diffusion; bool [G, B], whether the model reads the
                return; standard normal noise [G, B, H, A].
        """
        times, visible, noise = extra
        present = self.settings.model.context_length - 1
        plans = self.diffusion.noised(targets[:, :, present:], times, noise)
        predicted = self.model(
            plans.flatten(0, 1),
            times.flatten(),
            self._situation(batch),
            visible.flatten(),
        )
        errors = torch.nn.functional.smooth_l1_loss(
            predicted.view_as(noise), noise, reduction="none"
        ).mean(-1)
        weights = batch.history.valid[:, :, present:].float()
        weights[:, :, 0] *= self.settings.model.first_action_weight
        return (errors * weights).sum((1, 2)) / weights.sum((1, 2))

    def after_step(self, step: int) -> None:
        """Move the running mean towards the weights."""
        share = 1 - self.decay(step)
        self.average.vector.weights.lerp_(self.model.vector.weights, share)

    def decay(self, step: int) -> float:
        """The decay of the running mean at a step. At first it gives the mean over all steps."""
        return min(self.settings.model.average_decay, 1 - 1 / step)

    def _situation(self, batch: Batch) -> Situation:
        """The inputs that the plans of a batch are conditioned on, [G B, ...]."""
        present = self.settings.model.context_length - 1
        history, tasks = batch.history, batch.task_ids[:, None]
        tasks = tasks.expand(-1, history.valid.shape[1])
        task = tokens_of_task(tasks, self.task_count, batch.prompt)
        return Situation(
            history.returns_to_go[:, :, present].flatten(),
            task.flatten(0, 1),
            history.observations[:, :, : present + 1].flatten(0, 1),
        )

    def policy(self, step: int) -> PlanPolicy:
        """The policy with the running mean of the weights."""
        return PlanPolicy(
            self.average,
            self.diffusion,
            self.inputs(),
            self.setup.environment,
            self.execution,
            settings=self.settings.plan,
            step=step,
        )
