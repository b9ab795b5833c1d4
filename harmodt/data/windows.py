"""Random windows of offline episodes as batches of a sequence model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, join
from ..errors import UserError
from .inputs import Inputs
from .store import TaskData


class WindowSampler:
    """Draws batches of windows from the training episodes of several tasks.

    A draw depends on the random generator that is passed alone: nothing is remembered between
    draws, so the position in the data is the generator's seed.

    Args:
        data: one entry per task; index = task id.
        inputs: of the same tasks.
        context_length: K, steps of a window.
        device: where the batches go.

    Raises:
        UserError: an episode is shorter than a window.
    """

    def __init__(
        self,
        data: Sequence[TaskData],
        inputs: Inputs,
        context_length: int,
        device: torch.device | str = "cpu",
    ):
        self.data = data
        self.inputs = inputs
        self.context_length = context_length
        self.device = torch.device(device)
        for task in data:
            lengths = task.train.lengths
            if lengths.min() < context_length:
                raise UserError(
                    f"task {task.name}: episode {lengths.argmin()} has {lengths.min()} steps, "
                    f"fewer than context_length {context_length}: lower it, or make the store "
                    "again without that episode"
                )

    def sample(self, task_ids: Sequence[int], rng: np.random.Generator) -> tuple[Batch, Tensor]:
        """Draw `batch_per_task` windows of each task.

        Returns:
            The batch of G = len(task_ids) groups, and the actions to predict, float32
            [G, B, K, A] in [-1, 1]; a prediction counts where the history is valid.
        """
        histories, prompts, count = [], [], self.inputs.settings.batch_per_task
        for task in task_ids:
            windows = self._windows(task, rng, count)
            histories.append(self.inputs.of_episodes(task, self.data[task].train, *windows))
            if self.inputs.prompt is not None:
                prompts.append(self.inputs.prompts(task, rng, count))
        targets = torch.from_numpy(np.stack([history.actions for history in histories]))
        visible = [h._replace(actions=self.inputs.hide_actions(h.actions, rng)) for h in histories]
        batch = Batch(
            task_ids=torch.tensor(list(task_ids), device=self.device),
            prompt=join(prompts, self.device) if prompts else None,
            history=join(visible, self.device),
        )
        return batch, targets.to(self.device)

    def _windows(
        self, task: int, rng: np.random.Generator, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step indices and validity of `count` random windows, both [count, K].

        An episode is drawn in proportion to its length; a window that begins less than K steps
        before the episode's end is padded by repeating its last step.
        """
        episodes, length = self.data[task].train, self.context_length
        steps = rng.integers(episodes.episode_starts[-1], size=count)
        chosen = np.searchsorted(episodes.episode_starts, steps, "right") - 1
        lengths = episodes.lengths[chosen]
        bias = self.inputs.settings.window_start_bias
        starts = (rng.random(count) ** bias * lengths).astype(np.int64)
        present = np.minimum(lengths - starts, length)[:, None]
        places = np.arange(length)
        first = (episodes.episode_starts[chosen] + starts)[:, None]
        return first + np.minimum(places, present - 1), places < present
