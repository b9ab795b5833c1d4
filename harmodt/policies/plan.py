"""A denoiser as a policy for many episodes at once: it plans, acts, and plans again."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Steps, move
from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..networks.denoiser import Denoiser, Situation
from ..networks.diffusion import Diffusion
from ..settings import Count, NotNegative, Share
from . import Sampler
from .trained import TrainedPolicy


@dataclass(frozen=True)
class PlanSettings:
    """How plans are drawn at evaluation; this does not affect training."""

    sampler: Sampler = "ddim"
    """ddpm takes all steps of the diffusion and adds noise in each; ddim takes only some steps and
    adds no noise."""
    sampling_steps: Count = 10
    """Steps of ddim."""
    guidance: NotNegative = 1.2
    """w: the noise is w times the prediction conditioned on the return, plus 1 - w times the
    prediction without the return."""
    temperature: Share = 0.5
    """Factor of the random noise. ddpm scales the noise of each step, ddim the first noise."""
    replan_every: Count = 1
    """Number of actions that the policy executes before it makes a new plan."""


class PlanPolicy(TrainedPolicy):
    """Acts in N episodes in lock-step by plans of actions; a `Policy`.

    At the beginning of an episode, copies of the first observation take the place of earlier
    observations. The policy draws only the actions of a plan that it will execute, because later
    actions do not affect them.

    Args:
        model: the denoiser, on its device; the policy puts it into evaluation mode.
        diffusion: the diffusion process that the denoiser was trained on.
        settings: how plans are drawn.
        inputs, environment, execution, step: as in `TrainedPolicy`.
    """

    def __init__(
        self,
        model: Denoiser,
        diffusion: Diffusion,
        inputs: Inputs,
        environment: EnvironmentSpec,
        execution: Execution,
        settings: PlanSettings,
        step: int = 0,
    ):
        super().__init__(inputs, environment, execution, step)
        self.model = model.eval()
        self.settings = settings
        self._diffusion = diffusion

    @property
    def plans(self) -> dict[str, str | int | float]:
        """The settings of the policy's plans, by their names in `PlanSettings`."""
        steps = {"sampling_steps": self._diffusion.steps} if self.settings.sampler == "ddpm" else {}
        return asdict(self.settings) | steps

    def _begin(self, seed: int) -> None:
        rows, config = len(self._tasks), self.model.config
        self._generator = torch.Generator().manual_seed(seed)
        self._observations = torch.zeros(rows, config.context_length, config.observation_size)
        self._task_tokens = torch.zeros(rows, config.task_length, config.task_size)
        self._plans = torch.zeros(rows, self.settings.replan_every, config.action_size)

    def _restart(self, rows: np.ndarray) -> None:
        begun = torch.from_numpy(np.flatnonzero(rows))
        tasks = self._tasks[begun]
        prompts = None
        if self._inputs.prompt is not None:
            episode, start = self._draw_for(rows, self._words).unbind(1)
            drawn = self._inputs.draw_prompts(tasks, episode, start, acting=True)
            prompts = self._inputs.prompts(tasks, *drawn)
        self._task_tokens[begun] = tokens_of_task(tasks[:, None], len(self.tasks), prompts)[:, 0]

    def _act(self, observations: np.ndarray) -> np.ndarray:
        present = self._present(observations)
        begun = torch.from_numpy(self._time == 0)
        self._observations = self._observations.roll(-1, dims=1)
        self._observations[:, -1] = present.observations
        self._observations[begun] = present.observations[begun][:, None]
        places = self._time % self.settings.replan_every
        due = places == 0
        if due.any():
            chosen = torch.from_numpy(due)
            rows = Situation(present.returns_to_go, self._task_tokens, self._observations)
            self._plans[chosen] = self._draw(Situation(*(part[chosen] for part in rows)), due)
        return self._plans[torch.arange(len(places)), torch.from_numpy(places)].numpy()

    def _words(self, rows: int) -> Tensor:
        """Draw two random 32-bit words for each row, int64 [rows, 2, 1]."""
        return torch.randint(2**32, (2, rows, 1), generator=self._generator).movedim(1, 0)

    def _draw(self, situation: Situation, rows: np.ndarray) -> Tensor:
        """Draw the actions that some rows will execute, [n, replan_every, A], on the CPU.

        Args:
            situation: the situations of these rows, [n, ...].
            rows: bool [N], True in these rows.
        """
        settings, diffusion = self.settings, self._diffusion
        device = self._execution.device
        shape = settings.replan_every, self.environment.action_size

        def noise(count: int) -> Tensor:
            return torch.randn((count, *shape), generator=self._generator)

        def draw() -> Tensor:
            return self._draw_for(rows, noise).to(device)

        def cooled() -> Tensor:
            return settings.temperature * draw()

        with torch.inference_mode(), self._execution.computing():
            predict = _Guided(self.model, Situation(*move(situation, device)), settings.guidance)
            if settings.sampler == "ddpm":
                times = diffusion.times(diffusion.steps)
                return diffusion.denoised(predict, draw(), times, cooled).cpu()
            times = diffusion.times(settings.sampling_steps)
            # With unscaled noise, a barely trained model sometimes plans actions that saturate at
            # -1 or 1.
            return diffusion.denoised(predict, cooled(), times).cpu()


class _Guided:
    """Predicts noise by classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Args:
        guidance: w; the noise is w times the prediction conditioned on the return, plus 1 - w times
            the prediction without the return.
    """

    def __init__(self, model: Denoiser, situation: Situation, guidance: float):
        every = torch.ones_like(situation.returns_to_go, dtype=torch.bool)
        self._model = model
        self._parts = [
            (weight, model.embed(situation, conditioned))
            for weight, conditioned in ((guidance, every), (1 - guidance, ~every))
            if weight
        ]

    def __call__(self, plans: Tensor, time: int) -> Tensor:
        """Predict the noise in plans [n, ..., A] at a time."""
        times = torch.full((len(plans),), time, device=plans.device)
        found = [weight * self._model.predict(plans, times, part) for weight, part in self._parts]
        return torch.stack(found).sum(0)


def tokens_of_task(task_ids: Tensor, tasks: int, prompts: Steps | None) -> Tensor:
    """The tokens that condition a denoiser on the task: the prompt's steps, or a one-hot vector.

    Args:
        task_ids: int64 [G, B].
        tasks: number of tasks T.
        prompts: [G, B, K*, ...], or None for a one-hot vector.

    Returns:
        float32 [G, B, K*, O + A], or [G, B, 1, T].
    """
    if prompts is None:
        return torch.nn.functional.one_hot(task_ids, tasks).float()[..., None, :]
    return torch.cat((prompts.observations, prompts.actions), dim=-1)
