"""Draws random windows of offline episodes, and gathers them as batches.

If a window reaches beyond the end of its episode, padding fills the rest.
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

_WORDS = 4  # random words per draw


class Drawn(NamedTuple):
    """The draws of a batch: they say which steps of which episodes its windows hold.

    Episodes are numbered over all tasks, as in `Trajectories`.

    Attributes:
        episodes: int64 [G, B], the episode of each window.
        times: int64 [G, B, K], time steps of the episode, from 0; padding repeats the last one.
        valid: bool [G, B, K], False for padding.
        hidden: bool [G, B, K], True for an action that the model does not see.
        prompt_episodes: int64 [G, B], the prompts' episodes; None for a model without prompts.
        prompt_times: int64 [G, B, K*], the prompts' time steps; None for a model without prompts.
    """

    episodes: Tensor
    times: Tensor
    valid: Tensor
    hidden: Tensor
    prompt_episodes: Tensor | None = None
    prompt_times: Tensor | None = None


class WindowSampler:
    """Draws batches of windows from the training episodes of several tasks.

    A task's windows depend only on the draws and on its task id, not on the other tasks of the
    batch. A window does not depend on how many windows are drawn with it.

    Args:
        episodes: the training episodes of each task.
        inputs: turns steps of the same tasks into network inputs, on the device of the episodes.
        context_length: K, the number of steps of a window.
        device: `sample` returns batches on this device.
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
        device_of_draws = self.episodes.device
        self._windows = torch.arange(inputs.settings.batch_per_task, device=device_of_draws)
        # Each step of a window needs a coin, unless the result of every coin is certain.
        coins = context_length if 0 < inputs.settings.action_dropout < 1 else 0
        # The words of block 0 draw the window and its prompt. The words of the others are coins.
        self._blocks = torch.arange(1 - (-coins // _WORDS), device=device_of_draws)
        self._times = torch.arange(context_length, device=device_of_draws)

    def sample(self, task_ids: Sequence[int] | Tensor, draws: Draws) -> tuple[Batch, Tensor]:
        """Draw `batch_per_task` windows of each task.

        Returns:
            The batch of G = len(task_ids) groups, and the actions to predict, float32
            [G, B, K, A] in [-1, 1]. Only predictions at valid steps of the history count.
        """
        tasks = torch.as_tensor(task_ids, device=self.episodes.device)
        batch, targets = self.gather(tasks, self.draw(tasks, draws))
        if self.device == self.episodes.device:
            return batch, targets
        return batch_of(move(tensors_of(batch, targets), self.device))

    def gather(self, tasks: Tensor, drawn: Drawn) -> tuple[Batch, Tensor]:
        """Gather the drawn windows; return the same as `sample`, but on the episodes' device.

        Args:
            tasks: int64 [G], the task of each group, on the episodes' device.
            drawn: the draws of the windows.
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
        """Draw the windows of a batch, or of several batches.

        Args:
            task_ids: int64 [..., G] on the device of the episodes; the tensors of the result have
                the same leading dimensions.
            draws: the random numbers. For several batches, `draws.step` is a tensor [..., 1, 1, 1]
                with the step of each batch.
        """
        groups = task_ids[..., None, None]
        words = draws.words(self._windows, groups, self._blocks[:, None])  # [4, ..., G, blocks, B]
        step, start, *prompt = words[..., 0, :]
        first, count = (part[..., None] for part in self.episodes.step_range(task_ids))
        # Take the episode of a random step: a longer episode is drawn more often.
        episodes = self.episodes.episode_of(first + below(step, count))
        starts = self._starts.draw(episodes, start)
        present = (self.episodes.lengths[episodes] - starts).clamp_(max=self.context_length)
        present = present[..., None]
        times = starts[..., None] + torch.minimum(self._times, present - 1)
        if len(self._blocks) > 1:
            # From [4, ..., G, blocks - 1, B] to [..., G, B, 4 * (blocks - 1)].
            coins = words[..., 1:, :].movedim(0, -1).transpose(-3, -2).flatten(-2)
            hidden = self.inputs.hidden(coins[..., : self.context_length])
        else:
            certain = self.inputs.settings.action_dropout == 1
            hidden = torch.full_like(times, certain, dtype=torch.bool)
        return Drawn(
            episodes,
            times,
            self._times < present,
            hidden,
            *(self.inputs.draw_prompts(task_ids, *prompt) if self.inputs.prompt else ()),
        )


class _Starts:
    """Draws the start of a window, floor(n u^bias), in an episode of n steps; u is uniform.

    Each length n has a table. Its entry k is the smallest random word 2^32 u that gives the start
    k, so u = (k / n)^(1 / bias). The CPU makes the tables once, because another device may round a
    power differently. All tables together have at most as many entries as the data have steps.
    """

    def __init__(self, episodes: Trajectories, bias: float):
        lengths, table_of = np.unique(episodes.lengths.cpu().numpy(), return_inverse=True)
        # Entries of table i have i as their upper 32 bits, so the tables together form one rising
        # table.
        tables = [
            (i << 32) + np.rint((np.arange(n) / n) ** (1 / bias) * 2.0**32).astype(np.int64)
            for i, n in enumerate(lengths.tolist())
        ]
        first = np.cumsum([0, *lengths])[:-1]
        self._table = torch.from_numpy(np.concatenate(tables)).to(episodes.device)
        self._prefix = torch.from_numpy(table_of << 32).to(episodes.device)
        # The index of a table's first entry; plus 1, because `searchsorted` returns the index after
        # the found entry.
        self._before = torch.from_numpy(first[table_of] + 1).to(episodes.device)

    def draw(self, episodes: Tensor, words: Tensor) -> Tensor:
        """Draw a start in each given episode, int64 [...], from one random word each."""
        found = torch.searchsorted(self._table, self._prefix[episodes] + words, right=True)
        return found - self._before[episodes]
