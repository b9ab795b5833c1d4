"""MTDiff-P: a diffusion model of action sequences, told the task by a prompt or a one-hot vector.

After He et al., "Diffusion Model is an Effective Planner and Data Synthesizer for Multi-Task
Reinforcement Learning", NeurIPS 2023 (arXiv 2305.18459), which the HarmoDT paper quotes as MTDIFF-P
and MTDIFF-P-ONEHOT. A plan of actions is drawn out of noise, given the last observations, the
task and the return, whose prediction is guided free of a classifier. What the paper leaves open is
as in the authors' code: sizes and schedule, a Huber loss in which a plan's first action counts ten
times, two observations, prompts of 20 steps, returns hidden from every fifth window, a running mean
of the weights at evaluation, and a guidance of 1.2 with half of DDPM's noise.

What departs from that code: data are normalised, drawn and optimised as for the sequence models
here, so that observations take no LayerNorm and the return is the undiscounted one to go, which
falls by the rewards at evaluation; a prompt stays for an episode. The one-hot form is not in that
code: here a one-hot task stands in the place of the prompt's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from ..batch import Batch
from ..checkpoint import Checkpoint
from ..config import AlgorithmSettings, ModelSize, PromptSettings
from ..data.feed import Feed
from ..data.inputs import Inputs
from ..data.order import TaskOrder
from ..data.store import TaskData
from ..data.trajectories import Trajectories, lay_out
from ..data.windows import Drawn, WindowSampler
from ..draws import NOISE, TRAIN, Draws, Seeds, below, coin, normal
from ..errors import UserError
from ..networks.denoiser import Denoiser, DenoiserConfig, Situation
from ..networks.diffusion import Diffusion
from ..policies.plan import PlanPolicy, PlanSettings, tokens_of_task
from ..settings import Positive, Share, ShareBelowOne
from .learner import Setup, StepResult
from .optimiser import Optimiser


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
    """Observations that a plan is made from, the present one last."""
    horizon: ModelSize = 32
    """Actions of a plan in training."""
    diffusion_steps: Annotated[int, Meta(ge=1, le=10_000)] = 200
    """T, steps in which a plan becomes noise."""
    return_dropout: Share = 0.2
    """Probability of hiding the return from the model in training."""
    first_action_weight: Positive = 10.0
    """What a plan's first action counts in the loss, the others 1."""
    average_decay: ShareBelowOne = 0.995
    """Decay of the running mean of the weights, with which the policy acts."""


@dataclass(frozen=True)
class MTDiffSettings(AlgorithmSettings):
    """MTDiff-P told the task by a one-hot vector."""

    model: DenoiserSettings = DenoiserSettings()
    plan: PlanSettings = PlanSettings()

    def check(self) -> None:
        """Refuse sizes that do not fit together.

        Raises:
            UserError: the embedding dimension is odd or not a multiple of the heads, there are more
                sampling steps than steps of the diffusion, or more actions are executed than
                planned.
        """
        model, plan = self.model, self.plan
        if model.embed_dim % 2 or model.embed_dim % model.heads:
            raise UserError(
                f"embed_dim {model.embed_dim} is odd or not a multiple of heads {model.heads}: "
                "change one of the two"
            )
        if plan.sampling_steps > model.diffusion_steps:
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
    """MTDiff-P told the task by a prompt."""

    prompt: PromptSettings = PromptSettings(prompt_length=20)

    def prompts(self) -> PromptSettings:
        return self.prompt


def mtdiff_settings(setup: Setup) -> MTDiffSettings:
    """The run's own settings, which are MTDiff's."""
    own = setup.config.own
    assert isinstance(own, MTDiffSettings)
    return own


def build_model(setup: Setup) -> Denoiser:
    """A denoiser of the run's sizes, drawn from torch's generator."""
    own, environment = mtdiff_settings(setup), setup.environment
    prompt, observed = own.prompts(), environment.observation_size
    of_step, tasks = observed + environment.action_size, len(setup.conditioning)
    config = DenoiserConfig(
        observation_size=observed,
        action_size=environment.action_size,
        task_size=tasks if prompt is None else of_step,
        task_length=1 if prompt is None else prompt.prompt_length,
        context_length=own.model.context_length,
        horizon=own.model.horizon,
        embed_dim=own.model.embed_dim,
        layers=own.model.layers,
        heads=own.model.heads,
        dropout=own.model.dropout,
    )
    return Denoiser(config, setup.execution.device)


def inputs_of(setup: Setup, place: torch.device | None = None) -> Inputs:
    """The rule by which the run's data and observations become what its model reads.

    Args:
        place: where data and prompts lie, as in `Trajectories`.
    """
    length, prompts = setup.environment.episode_length, mtdiff_settings(setup).prompts()
    return Inputs(setup.conditioning, setup.config.data, length, prompts, place)


def load_policy(setup: Setup, checkpoint: Checkpoint) -> PlanPolicy:
    """The policy of a checkpoint.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    model = build_model(setup)
    checkpoint.copy_to(_tensors("average", model))
    return _policy(setup, model, checkpoint.step)


def _policy(setup: Setup, model: Denoiser, step: int) -> PlanPolicy:
    own = mtdiff_settings(setup)
    diffusion = Diffusion(own.model.diffusion_steps, setup.execution.device)
    return PlanPolicy(
        *(model, diffusion, inputs_of(setup), setup.environment, setup.execution),
        settings=own.plan,
        step=step,
    )


def _tensors(name: str, model: Denoiser) -> dict[str, Tensor]:
    """A model's parameters as a checkpoint names them."""
    return {f"{name}.{key}": p.detach() for key, p in model.named_parameters()}


class PlanSampler(WindowSampler):
    """Draws windows of H actions to plan, with the observations that come before them.

    A window begins at the present as other windows do at their first step. What is further back
    than the episode's first step is that step again.

    Args:
        episodes: those to train on, of each task.
        inputs: of the same tasks.
        settings: lengths of plans and of what comes before.
        device: where the batches go.
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
        """The places of a batch's steps; the present is step h - 1 of h - 1 + H."""
        drawn = super().draw(task_ids, draws)
        before = (drawn.times[..., :1] + self._back).clamp(min=0)
        there = torch.ones_like(before, dtype=torch.bool)
        return drawn._replace(
            times=torch.cat((before, drawn.times), -1),
            valid=torch.cat((there, drawn.valid), -1),
            hidden=torch.cat((there, drawn.hidden), -1),  # a denoiser reads no previous action
        )


class MTDiffLearner:
    """Trains a denoiser on several tasks at a time; a `Learner`.

    Args:
        setup: the run's settings, tasks and device.
        data: one entry per task; index = task id.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        self.setup = setup
        self.settings = mtdiff_settings(setup).model
        self.model, self.average = build_model(setup), build_model(setup).eval()
        self.average.vector.weights.copy_(self.model.vector.weights)
        run, device = setup.config.run, setup.execution.device
        self.diffusion = Diffusion(self.settings.diffusion_steps, device)
        self.optimiser = Optimiser(
            self.model.vector, setup.config.optimisation, setup.execution.backend
        )
        order = TaskOrder(setup.config.data, len(data), run.seed)
        episodes = lay_out(run.data_device, data, device)
        inputs = inputs_of(setup, episodes.place)
        self.sampler = PlanSampler(episodes, inputs, self.settings, device)
        self._seeds = Seeds(run.seed)
        self.feed = Feed(self.sampler, order, run.seed, self._of_steps)

    def train_step(self, step: int) -> StepResult:
        """One optimiser step over some tasks."""
        self._seeds.begin(TRAIN, step - 1)  # for dropout, which draws from PyTorch's generator
        task_ids = self.feed.load(step)
        (batch, actions), (rates, *drawn) = self.feed.batch(), self.feed.more
        vector = self.model.vector
        vector.gradient.zero_()
        with self.setup.execution.computing():
            losses = self.losses(batch, actions, *drawn)
            losses.mean().backward()
            norm = self.optimiser.step(None, batch.task_ids, rates)
        self.average.vector.weights.lerp_(vector.weights, 1 - self.decay(step))
        return StepResult(task_ids, losses.detach(), norm)

    def losses(
        self, batch: Batch, actions: Tensor, times: Tensor, told: Tensor, noise: Tensor
    ) -> Tensor:
        """Huber loss of the noise in each group's plans, weighted over their valid steps, [G].

        Args:
            batch: G groups of B windows of h - 1 + H steps.
            actions: [G, B, h - 1 + H, A].
            times: int64 [G, B], of the diffusion.
            told: bool [G, B], whether the model is told the return.
            noise: standard normal, [G, B, H, A].
        """
        present = self.settings.context_length - 1
        plans = self.diffusion.noised(actions[:, :, present:], times, noise)
        predicted = self.model(
            plans.flatten(0, 1),
            times.flatten(),
            self._situation(batch),
            told.flatten(),
        )
        errors = torch.nn.functional.smooth_l1_loss(
            predicted.view_as(noise), noise, reduction="none"
        ).mean(-1)
        weights = batch.history.valid[:, :, present:].float()
        weights[:, :, 0] *= self.settings.first_action_weight
        return (errors * weights).sum((1, 2)) / weights.sum((1, 2))

    def decay(self, step: int) -> float:
        """Of the running mean at a step: at first it is that of all steps so far."""
        return min(self.settings.average_decay, 1 - 1 / step)

    def _situation(self, batch: Batch) -> Situation:
        """What the plans of a batch are for, [G B, ...]."""
        present = self.settings.context_length - 1
        history, tasks = batch.history, batch.task_ids[:, None]
        tasks = tasks.expand(-1, history.valid.shape[1])
        task = tokens_of_task(tasks, len(self.setup.conditioning), batch.prompt)
        return Situation(
            history.returns_to_go[:, :, present].flatten(),
            task.flatten(0, 1),
            history.observations[:, :, : present + 1].flatten(0, 1),
        )

    def _of_steps(self, steps: range) -> list[Tensor]:
        """What steps read beside their windows: the optimiser's rates; times, tellings and noise.

        Noise comes from the CPU, so that it is the same wherever it is added.
        """
        data, size = self.setup.config.data, self.setup.environment.action_size
        numbers = self.settings.horizon * size
        windows, groups = torch.arange(data.batch_per_task), torch.arange(data.tasks_per_step)
        blocks = torch.arange(1 - (-numbers // 4))
        step = torch.arange(steps.start - 1, steps.stop - 1)[:, None, None, None]
        draws = Draws(self.setup.config.run.seed, NOISE, step)
        words = draws.words(windows[:, None], groups[:, None, None], blocks)  # [4, S, G, B, blocks]
        time, hidden, *_ = words[..., 0]
        noise = normal(words[..., 1:]).movedim(0, -1).flatten(-2)[..., :numbers]
        return [
            self.optimiser.rates(steps),
            below(time, self.settings.diffusion_steps),
            ~coin(hidden, self.settings.return_dropout),
            noise.unflatten(-1, (-1, size)),
        ]

    def before_step(self, step: int) -> dict[str, float]:
        """Nothing is due between steps."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        moments = {f"optimizer.{n}": t for n, t in self.optimiser.tensors().items()}
        return _tensors("model", self.model) | _tensors("average", self.average) | moments

    def policy(self, step: int) -> PlanPolicy:
        """The running mean of the weights as it is now, as a policy."""
        return _policy(self.setup, self.average, step)

    def resume_training(self) -> None:
        """The policy has its own model: there is nothing to take up."""

    def describe(self) -> dict[str, int]:
        """The number of parameters."""
        return {"parameters": sum(p.numel() for p in self.model.parameters())}
