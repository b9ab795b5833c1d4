"""Random windows of offline episodes as batches of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Steps
from ..config import TrainConfig
from .inputs import TaskConditioning
from .store import Episodes, TaskData


@dataclass
class WindowArrays:
    """The steps of some windows as arrays [B, L, ...], before they are joined to a batch."""

    returns_to_go: np.ndarray
    observations: np.ndarray
    actions: np.ndarray
    timesteps: np.ndarray
    valid: np.ndarray


class WindowSampler:
    """Draws batches of windows from the training episodes of several tasks.

    A draw depends on the random generator that is passed alone: nothing is remembered between
    draws, so the position in the data is the generator's seed.

    Args:
        data, conditioning: one entry per task; index = task id.
        config: the run's settings.
        device: where the batches go.
    """

    def __init__(
        self,
        data: Sequence[TaskData],
        conditioning: Sequence[TaskConditioning],
        config: TrainConfig,
        device: torch.device | str = "cpu",
    ):
        self.data = data
        self.conditioning = conditioning
        self.config = config
        self.device = device

    def sample(self, task_ids: Sequence[int], rng: np.random.Generator) -> tuple[Batch, Tensor]:
        """Draw `batch_per_task` windows of each task.

        Returns:
            The batch of G = len(task_ids) groups, and the actions to predict, float32
            [G, B, K, 4] in [-1, 1]; a prediction counts where the history is valid.
        """
        count, config = self.config.batch_per_task, self.config
        histories, prompts = [], []
        for task in task_ids:
            windows = self._windows(task, rng, count)
            histories.append(self._gather(task, self.data[task].train, *windows))
            if config.model().prompt_length:
                prompts.append(self.prompt_windows(task, rng, count))
        history = self.to_steps(histories)
        hidden = rng.random(history.valid.shape) < config.action_dropout
        shown = history.actions * torch.from_numpy(~hidden[..., None]).to(self.device)
        visible = Steps(
            history.returns_to_go, history.observations, shown, history.timesteps, history.valid
        )
        ids = torch.tensor(list(task_ids), device=self.device)
        prompt = self.to_steps(prompts) if prompts else None
        return Batch(ids, prompt, visible), history.actions

    def prompt_windows(self, task: int, rng: np.random.Generator, count: int) -> WindowArrays:
        """Draw prompts [count, K*, ...] of a task from its held-apart episodes."""
        conditioning = self.conditioning[task]
        indices = conditioning.draw_prompts(rng, count, self.config.prompt_length)
        return self._gather(task, conditioning.prompts, indices, np.ones(indices.shape, bool))

    def to_steps(self, groups: Sequence[WindowArrays]) -> Steps:
        """Join the windows of several groups to tensors [G, B, L, ...] on the device."""
        names = ("returns_to_go", "observations", "actions", "timesteps", "valid")
        tensors = {n: torch.from_numpy(np.stack([getattr(g, n) for g in groups])) for n in names}
        return Steps(**{name: tensor.to(self.device) for name, tensor in tensors.items()})

    def _windows(
        self, task: int, rng: np.random.Generator, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step indices and validity of `count` random windows, both [count, K].

        An episode is drawn in proportion to its length; a window that begins less than K steps
        before the episode's end is padded on the left.
        """
        episodes, length = self.data[task].train, self.config.context_length
        chosen = (
            np.searchsorted(
                episodes.episode_starts,
                rng.integers(episodes.episode_starts[-1], size=count),
                "right",
            )
            - 1
        )
        lengths = episodes.lengths[chosen]
        starts = (rng.random(count) ** self.config.window_start_bias * lengths).astype(np.int64)
        missing = np.maximum(starts + length - lengths, 0)
        offsets = np.arange(length)[None] - missing[:, None]
        indices = (episodes.episode_starts[chosen] + starts)[:, None] + np.maximum(offsets, 0)
        return indices, offsets >= 0

    def _gather(
        self, task: int, episodes: Episodes, indices: np.ndarray, valid: np.ndarray
    ) -> WindowArrays:
        first_steps = episodes.episode_starts[
            np.searchsorted(episodes.episode_starts, indices, "right") - 1
        ]
        timesteps = np.minimum(indices - first_steps, self.config.max_timesteps - 1)
        returns_to_go = episodes.returns_to_go[indices] / np.float32(self.config.return_scale)
        return WindowArrays(
            returns_to_go=returns_to_go,
            observations=self.conditioning[task].normalise(episodes.observations[indices]),
            # Data may hold unclipped actions; the environments execute them clipped.
            actions=np.clip(episodes.actions[indices], -1.0, 1.0),
            timesteps=timesteps,
            valid=valid,
        )
