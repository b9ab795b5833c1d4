"""A decision transformer as a policy that acts in many episodes at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch import Steps, move
from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..masks.bank import TaskMasks, voted_masks
from ..networks.decision_transformer import DecisionTransformer, PromptCache
from .trained import TrainedPolicy


class DecisionPolicy(TrainedPolicy):
    """Acts in N episodes in lock-step, with one model call per time step; a `Policy`.

    An episode begins with an empty history. The policy encodes a prompt once per episode.
    Histories stay on the model's device: a step uploads the present observation, not the history.

    Args:
        model: the model, on its device; the policy puts it into evaluation mode.
        mask_bits: the tasks' masks in the form of `MaskBank.bits`; None for a model without masks.
        context_length: K, steps of history.
        inputs, environment, execution, step: as in `TrainedPolicy`.
        unseen_threshold: a weight is active in the voted mask if it is active in more than this
            share of the tasks' masks.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        mask_bits: Tensor | None,
        inputs: Inputs,
        context_length: int,
        environment: EnvironmentSpec,
        execution: Execution,
        step: int = 0,
        unseen_threshold: float = 0.5,
    ):
        super().__init__(inputs, environment, execution, step)
        self.model = model.eval()
        self.mask_bits = mask_bits
        if mask_bits is not None:
            self.mask = "task"
        self._context_length = context_length
        self._unseen_threshold = unseen_threshold
        self._prepared_for: tuple[np.ndarray, Tensor | None] | None = None

    def copy(self) -> DecisionPolicy:
        """A policy with the same model and masks, and its own histories and graph."""
        other = super().copy()
        other._prepared_for = None
        return other

    def use_voted_mask(self) -> None:
        """Replace every task's mask by the mask for unseen tasks (Eq. 13).

        Raises:
            UserError: the run has no masks.
        """
        if self.mask_bits is None:
            super().use_voted_mask()
            return
        tasks = len(self.tasks)
        levels = len(self.mask_bits) // tasks
        self.mask_bits = voted_masks(self.mask_bits, self._unseen_threshold, levels, tasks)
        self.mask = "voted"

    def _begin(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        if not self._is_prepared():
            self._prepare()

    def _restart(self, rows: np.ndarray) -> None:
        restarted = self._on_device(np.flatnonzero(rows))
        # Attention gives invalid steps the weight 0, but 0 times NaN is NaN. So clear their values.
        for part in self._history:
            part[restarted] = 0
        if self._inputs.prompt is not None:
            self._encode_prompts(rows)

    def _act(self, observations: np.ndarray) -> np.ndarray:
        present = self._append(observations)
        lengths = np.minimum(self._time + 1, self._context_length)
        # Draw before the model runs, because the model evicts the generator's data from the caches.
        hidden = self._draw_hidden()
        in_graph = self._execution.repeats and lengths.min() >= self._shortest_in_graph
        actions = self._actions_in_graph() if in_graph else self._actions(lengths)
        chosen = actions.flatten(0, 1)[self._groups.index]
        self._history.actions[present] = self._inputs.hide(chosen, hidden)
        return chosen.cpu().numpy()

    def _actions(self, lengths: np.ndarray) -> Tensor:
        """The model's actions, [G, B, A], after histories of the given lengths, int [N]."""
        begun = Steps(*(part[:, : lengths.max()] for part in self._history))
        return self._computed(Steps(*self._groups.lay_out(begun)), int(lengths.min()))

    def _actions_in_graph(self) -> Tensor:
        """As `_actions`, from the graph; each history must have `_shortest_in_graph` steps."""
        if not self._groups.in_order:
            torch._foreach_copy_(list(self._graph_inputs), self._groups.lay_out(self._history))
        return self._graph()

    def _computed(self, history: Steps, shortest: int) -> Tensor:
        with torch.inference_mode(), self._execution.computing():
            return self.model.act(
                history, self._group_ids, self._masks, self._prompt_cache, shortest
            )

    def _is_prepared(self) -> bool:
        """Whether `_prepare` was called for the same rows under the same masks."""
        if self._prepared_for is None:
            return False
        task_ids, mask_bits = self._prepared_for
        return mask_bits is self.mask_bits and np.array_equal(task_ids, self._task_ids)

    def _prepare(self) -> None:
        """Make histories, masks and the graph, which depend only on the rows' tasks and masks.

        A later `start` with the same tasks and masks uses them again, because a capture takes long.
        """
        self._prepared_for = None
        self._groups = _Groups(self._task_ids, self._execution.device)
        self._group_ids, self._masks = self._masks_of(self._groups)
        self._prompt_cache: PromptCache | None = None
        self._history = self._empty_history()
        self._graph_inputs = Steps(*self._groups.lay_out(self._history))
        if self._groups.in_order:  # the history itself can be the graph's input
            self._history = Steps(*(part.flatten(0, 1) for part in self._graph_inputs))
        self._graph = self._execution.repeated(
            lambda: self._computed(self._graph_inputs, self._shortest_in_graph)
        )
        self._prepared_for = self._task_ids, self.mask_bits

    def _empty_history(self) -> Steps:
        """Histories without a valid step, [N, K, ...], on the model's device."""
        shape, device = (len(self._task_ids), self._context_length), self._execution.device
        return Steps(
            returns_to_go=torch.zeros(shape, device=device),
            observations=torch.zeros(*shape, self.environment.observation_size, device=device),
            actions=torch.zeros(*shape, self.environment.action_size, device=device),
            timesteps=torch.zeros(shape, dtype=torch.int64, device=device),
            valid=torch.zeros(shape, dtype=torch.bool, device=device),
        )

    @property
    def _shortest_in_graph(self) -> int:
        """The fewest steps that every history must have before the graph is used.

        The graph always computes K steps; a shorter history is padded. Padding costs little time on
        a GPU. On a CPU it costs much, so there the graph computes only full histories.
        """
        return 1 if self._execution.device.type == "cuda" else self._context_length

    def _append(self, observations: np.ndarray) -> tuple[slice | Tensor, int | Tensor]:
        """Append the present step to each history; a full history first drops its oldest step.

        Returns:
            The index of each row's present step in the histories.
        """
        step = self._present(observations)
        if self._execution.device.type != "cpu":
            step = Steps(*move(step, self._execution.device))
        last = self._context_length - 1
        places, full = np.minimum(self._time, last), self._time > last
        # Use slices if all rows have the same index, because tensors of indices are slower.
        losing = slice(None) if full.all() else self._on_device(np.flatnonzero(full))
        present: tuple[slice | Tensor, int | Tensor] = (slice(None), int(places[0]))
        if (places != places[0]).any():
            present = self._on_device(np.arange(len(places))), self._on_device(places)
        any_full = full.any()
        for part, values in zip(self._history, step, strict=True):
            if any_full:
                part[losing, :-1] = part[losing, 1:].clone()
            part[present] = values
        return present

    def _draw_hidden(self) -> Tensor:
        """Draw whether the present action of each row is hidden from later steps, bool [N]."""
        rows, probability = len(self._task_ids), self._inputs.settings.action_dropout
        if probability in (0, 1):
            return torch.full((rows,), probability == 1, device=self._execution.device)
        words = self._draw_for(np.ones(rows, bool), self._words)
        return self._inputs.hidden(words).to(self._execution.device)

    def _words(self, *shape: int) -> Tensor:
        """Draw random 32-bit words, int64 of a shape."""
        return torch.from_numpy(self._rng.integers(2**32, size=shape))

    def _encode_prompts(self, restarted: np.ndarray) -> None:
        """Draw and encode new prompts where `restarted`, bool [N]; the other rows keep theirs."""
        rows = np.flatnonzero(restarted)
        tasks = self._tasks[rows]
        words = self._draw_for(restarted, lambda count: self._words(2, count, 1).movedim(1, 0))
        episode, start = words.unbind(1)
        drawn = self._inputs.draw_prompts(tasks, episode, start, acting=True)
        prompts = Steps(*(part[:, 0] for part in self._inputs.prompts(tasks, *drawn)))
        groups = _Groups(self._task_ids[rows], self._execution.device)
        steps = Steps(*groups.lay_out(Steps(*move(prompts, self._execution.device))))
        with torch.inference_mode(), self._execution.computing():
            encoded = self.model.encode_prompt(steps, *self._masks_of(groups))
        if self._prompt_cache is None:
            self._prompt_cache = encoded
            return
        # The graph reads these tensors, so write the new values into them.
        kept_rows, new_rows = self._groups.index[self._on_device(rows)], groups.index
        with torch.inference_mode():
            for kept_block, new_block in zip(self._prompt_cache, encoded, strict=True):
                for kept, new in zip(kept_block, new_block, strict=True):  # keys, values
                    kept[kept_rows] = new[new_rows]

    def _masks_of(self, groups: _Groups) -> tuple[Tensor, TaskMasks]:
        """The groups' task ids, int64 [G] on the model's device, and the masks of these tasks."""
        task_ids = self._on_device(groups.task_ids)
        return task_ids, TaskMasks(self.model.vector, self.mask_bits, task_ids)

    def _on_device(self, array: np.ndarray) -> Tensor:
        """An array as a tensor on the model's device."""
        return torch.from_numpy(array).to(self._execution.device)


class _Groups:
    """Lays out rows of several tasks in one group per task; a short group repeats its rows until
    all groups have the same size.

    Args:
        task_ids: int64 [N], the task of each row.
        device: device of the rows.

    Attributes:
        task_ids: int64 [G], the task of each group.
        index: int64 [N] on the device, the index of each row in a flattened layout [G B].
        in_order: whether the layout has each row once and in the original order.
    """

    def __init__(self, task_ids: np.ndarray, device: torch.device):
        self.task_ids = np.unique(task_ids)
        members = [np.flatnonzero(task_ids == task) for task in self.task_ids]
        width = max(map(len, members))
        rows = np.stack([np.resize(m, width) for m in members])  # [G, B]
        index = np.zeros(len(task_ids), np.int64)
        for group, own in enumerate(members):
            index[own] = group * width + np.arange(len(own))
        self.index = torch.from_numpy(index).to(device)
        self._rows = torch.from_numpy(rows).to(device)
        self.in_order = np.array_equal(rows.flatten(), np.arange(len(task_ids)))

    def lay_out(self, steps: Steps) -> list[Tensor]:
        """Copies of tensors [N, ...] as [G, B, ...]."""
        return [part[self._rows] for part in steps]
