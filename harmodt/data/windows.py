"""Random windows of offline episodes as batches of a sequence model.

A window that goes beyond its episode's end is padded there, also that of a shorter episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, batch_of, move, tensors_of
from ..draws import Draws, below
from .inputs import Inputs
from .trajectories import Trajectories

_WORDS = 4  # that a draw has for each place


class Drawn(NamedTuple):
    """What is drawn for a batch, all of it in integers: places of steps, in episodes of all tasks.

    Attributes:
        episodes: int64 [G, B].
        times: int64 [G, B, K], steps from the episode's beginning; padding repeats the last one.
        valid: bool [G, B, K], False for padding.
        hidden: bool [G, B, K], the actions that the model does not see.
        prompt_episodes, prompt_times: int64 [G, B], of the prompt pools, and [G, B, K*]; None
            without prompts.
    """

    episodes: Tensor
    times: Tensor
    valid: Tensor
    hidden: Tensor
    prompt_episodes: Tensor | None = None
    prompt_times: Tensor | None = None


class WindowSampler:
    """Draws batches of windows from the training episodes of several tasks.

    A task's windows depend on the draws that are passed and on its id alone: not on the other tasks
    of the batch, and a window not on their number.

    Args:
        episodes: those to train on, of each task.
        inputs: of the same tasks, with its prompts where the episodes lie.
        context_length: K, steps of a window.
        device: where the batches go.
    """

    def __init__(
        self,
        episodes: Trajectories,
        inputs: Inputs,
        context_length: int,
        device: torch.device | str = "cpu",
    ):
        self.inputs = inputs
        self.context_length = context_length
        self.device = torch.device(device)
        self.episodes = episodes
        self._starts = _Starts(self.episodes, inputs.settings.window_start_bias)
        place = self.episodes.device
        self._windows = torch.arange(inputs.settings.batch_per_task, device=place)
        self._blocks = torch.arange(1 - (-context_length // _WORDS), device=place)
        self._times = torch.arange(context_length, device=place)

    def sample(self, task_ids: Sequence[int] | Tensor, draws: Draws) -> tuple[Batch, Tensor]:
        """Draw `batch_per_task` windows of each task.

        Returns:
            The batch of G = len(task_ids) groups, and the actions to predict, float32
            [G, B, K, A] in [-1, 1]; a prediction counts where the history is valid.
        """
        tasks = torch.as_tensor(task_ids, device=self.episodes.device)
        batch, targets = self.gather(tasks, self.draw(tasks, draws))
        if self.device == self.episodes.device:
            return batch, targets
        return batch_of(move(tensors_of(batch, targets), self.device))

    def gather(self, tasks: Tensor, drawn: Drawn) -> tuple[Batch, Tensor]:
        """What `sample` returns, from the places that were drawn, on the episodes' device.

        Args:
            tasks: int64 [G], there.
        """
        history = self.inputs.of_episodes(
            self.episodes, tasks, drawn.episodes, drawn.times, drawn.valid
        )
        visible = history._replace(actions=self.inputs.hide(history.actions, drawn.hidden))
        prompt = None
        if drawn.prompt_episodes is not None and drawn.prompt_times is not None:
            prompt = self.inputs.prompts(tasks, drawn.prompt_episodes, drawn.prompt_times)
        terminated = self.episodes.terminated[drawn.episodes]
        return Batch(tasks, prompt, visible, terminated), history.actions

    def draw(self, task_ids: Tensor, draws: Draws) -> Drawn:
        """The places of a batch's steps, or of those of several batches.

        Args:
            task_ids: int64 [..., G] on the device of the episodes; what is returned has the same
                dimensions in front.
            draws: with a step for each of several batches, [..., 1, 1, 1].
        """
        groups = task_ids[..., None, None]
        words = draws.words(self._windows, groups, self._blocks[:, None])  # [4, ..., G, blocks, B]
        step, start, *prompt = words[..., 0, :]
        first, count = (part[..., None] for part in self.episodes.step_range(task_ids))
        # Drawing a step draws its episode in proportion to the length.
        episodes = self.episodes.episode_of(first + below(step, count))
        starts = self._starts.draw(episodes, start)
        present = (self.episodes.lengths[episodes] - starts).clamp_(max=self.context_length)
        present = present[..., None]
        times = starts[..., None] + torch.minimum(self._times, present - 1)
        coins = words[..., 1:, :].movedim(0, -1).transpose(-3, -2).flatten(-2)
        return Drawn(
            episodes,
            times,
            self._times < present,
            self.inputs.hidden(coins[..., : self.context_length]),
            *(self.inputs.draw_prompts(task_ids, *prompt) if self.inputs.prompt else ()),
        )


class _Starts:
    """Draws a window's start at u^bias of its episode's length, u uniform.

    For each length n that there is, a table has the word at which the start becomes k, which is
    where u = (k / n)^(1 / bias). It is made once, on the CPU: a power in floating point may come
    out differently on another device. All tables together have no more entries than there are
    steps.
    """

    def __init__(self, episodes: Trajectories, bias: float):
        lengths, table_of = np.unique(episodes.lengths.cpu().numpy(), return_inverse=True)
        # Table i is for words that i was put in front of: all are one rising table.
        tables = [
            (i << 32) + np.rint((np.arange(n) / n) ** (1 / bias) * 2.0**32).astype(np.int64)
            for i, n in enumerate(lengths.tolist())
        ]
        first = np.cumsum([0, *lengths])[:-1]
        self._table = torch.from_numpy(np.concatenate(tables)).to(episodes.device)
        self._prefix = torch.from_numpy(table_of << 32).to(episodes.device)
        self._before = torch.from_numpy(first[table_of] + 1).to(episodes.device)

    def draw(self, episodes: Tensor, words: Tensor) -> Tensor:
        """Starts in some episodes, int64 [...], from a random word each."""
        found = torch.searchsorted(self._table, self._prefix[episodes] + words, right=True)
        return found - self._before[episodes]
