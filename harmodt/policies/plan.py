"""A denoiser as a policy over many episodes at once: it plans, acts, and plans again."""

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
    """How plans are drawn at evaluation; training does not depend on it."""

    sampler: Sampler = "ddim"
    """Through all steps of the diffusion with noise in each, or some of them without."""
    sampling_steps: Count = 10
    """Steps of ddim."""
    guidance: NotNegative = 1.2
    """Weight of the prediction that is told the return, against 1 - guidance of the other's."""
    temperature: Share = 0.5
    """What noise is multiplied by: that of each step of ddpm, or that which ddim begins with."""
    replan_every: Count = 1
    """Actions of a plan that are executed before the next one."""


class PlanPolicy(TrainedPolicy):
    """Acts in N episodes in lock-step by plans of actions; a `Policy`.

    What is asked for in an episode starts at the task's target return and falls by each reward.
    Before an episode's first step lies that step again. Of a plan only the actions that are
    executed are drawn, which no later one can change.

    Args:
        model: the denoiser, on its device; it is put into evaluation mode.
        diffusion: the process that it was trained on.
        inputs: of the tasks; index = task id.
        environment: what the tasks are tasks of.
        execution: where and how the model computes.
        settings: how plans are drawn.
        step: training steps of the weights.
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
        """How plans are drawn, by the names of `PlanSettings`."""
        steps = {"sampling_steps": self._diffusion.steps} if self.settings.sampler == "ddpm" else {}
        return asdict(self.settings) | steps

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: seed of the prompts and of the noise.
            target_returns: float [N], unscaled; by default each task's.
        """
        rows, config = len(task_ids), self.model.config
        self._tasks = torch.from_numpy(np.asarray(task_ids).astype(np.int64))
        self._targets = (
            self.target_returns[task_ids] if target_returns is None else target_returns
        ).astype(np.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._returns_to_go = self._targets.copy()
        self._time = np.zeros(rows, np.int64)
        self._observations = torch.zeros(rows, config.context_length, config.observation_size)
        self._task_tokens = torch.zeros(rows, config.task_length, config.task_size)
        self._plans = torch.zeros(rows, self.settings.replan_every, config.action_size)
        self.restart(np.ones(rows, bool))

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in the rows where `rows`, bool [N], is True."""
        self._returns_to_go[rows] = self._targets[rows]
        self._time[rows] = 0
        begun = torch.from_numpy(np.flatnonzero(rows))
        tasks = self._tasks[begun]
        prompts = None
        if self._inputs.prompt is not None:
            episode, start = torch.randint(2**32, (2, len(begun), 1), generator=self._generator)
            drawn = self._inputs.draw_prompts(tasks, episode, start, acting=True)
            prompts = self._inputs.prompts(tasks, *drawn)
        self._task_tokens[begun] = tokens_of_task(tasks[:, None], len(self.tasks), prompts)[:, 0]

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float [N, O]."""
        present = self._present(observations)
        begun = torch.from_numpy(self._time == 0)
        self._observations = self._observations.roll(-1, dims=1)
        self._observations[:, -1] = present.observations
        self._observations[begun] = present.observations[begun][:, None]
        places = self._time % self.settings.replan_every
        if due := np.flatnonzero(places == 0).tolist():
            of_rows = (present.returns_to_go, self._task_tokens, self._observations)
            self._plans[due] = self._draw(Situation(*(part[due] for part in of_rows)))
        self._time += 1
        return self._plans[torch.arange(len(places)), torch.from_numpy(places)].numpy()

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Lower each row's return-to-go by the reward of its last action, float [N]."""
        self._returns_to_go -= rewards

    def _present(self, observations: np.ndarray) -> Steps:
        """The present step of every row, [N, ...], as the model reads it."""
        rows = len(self._time)
        return self._inputs.steps(
            self._tasks,
            torch.from_numpy(self._returns_to_go),
            torch.from_numpy(np.asarray(observations, np.float32)),
            torch.zeros(rows, self.environment.action_size),  # yet to be chosen
            torch.from_numpy(self._time),
            torch.ones(rows, dtype=torch.bool),
        )

    def _draw(self, situation: Situation) -> Tensor:
        """The beginnings of plans, [n, replan_every, A]."""
        settings, diffusion = self.settings, self._diffusion
        device = self._execution.device
        shape = len(situation.task), settings.replan_every, self.environment.action_size

        def draw() -> Tensor:
            return torch.randn(shape, generator=self._generator).to(device)

        def cooled() -> Tensor:
            return settings.temperature * draw()

        with torch.inference_mode(), self._execution.computing():
            predict = _Guided(self.model, Situation(*move(situation, device)), settings.guidance)
            if settings.sampler == "ddpm":
                times = diffusion.times(diffusion.steps)
                return diffusion.denoised(predict, draw(), times, cooled).cpu()
            times = diffusion.times(settings.sampling_steps)
            # From full noise a lightly trained model now and then ends at a bound.
            return diffusion.denoised(predict, cooled(), times).cpu()


class _Guided:
    """Predicts noise by classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Args:
        guidance: w; the noise is (1 - w) of what is predicted without the return and w with it.
    """

    def __init__(self, model: Denoiser, situation: Situation, guidance: float):
        told = torch.ones_like(situation.returns_to_go, dtype=torch.bool)
        self._model = model
        self._parts = [
            (weight, model.embed(situation, told if tells else ~told))
            for weight, tells in ((guidance, True), (1 - guidance, False))
            if weight
        ]

    def __call__(self, plans: Tensor, time: int) -> Tensor:
        """The noise in plans [n, ..., A] at a time."""
        times = torch.full((len(plans),), time, device=plans.device)
        found = [weight * self._model.predict(plans, times, part) for weight, part in self._parts]
        return torch.stack(found).sum(0)


def tokens_of_task(task_ids: Tensor, tasks: int, prompts: Steps | None) -> Tensor:
    """What tells a denoiser the task: a prompt's observations and actions, or a one-hot task.

    Args:
        task_ids: int64 [G, B].
        tasks: number of tasks T.
        prompts: [G, B, K*, ...], or None.

    Returns:
        float32 [G, B, K*, O + A], or [G, B, 1, T].
    """
    if prompts is None:
        return torch.nn.functional.one_hot(task_ids, tasks).float()[..., None, :]
    return torch.cat((prompts.observations, prompts.actions), dim=-1)
