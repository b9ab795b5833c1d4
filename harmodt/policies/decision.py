"""A decision transformer as a policy over many episodes at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch import Layout, Steps, move
from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..masks.bank import TaskMasks, voted_masks
from ..networks.decision_transformer import DecisionTransformer, PromptCache
from .trained import TrainedPolicy


class DecisionPolicy(TrainedPolicy):
    """Acts in N episodes in lock-step, one model call per time step; a `Policy`.

    An episode's history starts empty; its return-to-go starts at the task's target and falls by
    each reward. The prompt is encoded once per episode.

    Args:
        model: the model, on its device; it is put into evaluation mode.
        mask_bits: the tasks' masks as `MaskBank` has them, or None for a model without masks.
        inputs: of the tasks; index = task id.
        context_length: K, steps of history.
        environment: what the tasks are tasks of.
        execution: where and how the model computes.
        step: training steps of the weights.
        unseen_threshold: share of tasks of the voted mask.
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

    def use_voted_mask(self) -> None:
        """Put the mask for unseen tasks (Eq. 13) in the place of every task's own.

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

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: seed of the prompts.
            target_returns: float [N], unscaled; by default each task's.
        """
        self._task_ids = np.asarray(task_ids)
        self._tasks = torch.from_numpy(self._task_ids.astype(np.int64))
        self._rng = np.random.default_rng(seed)
        self._targets = (
            self.target_returns[self._task_ids] if target_returns is None else target_returns
        ).astype(np.float64)
        rows, length = len(self._task_ids), self._context_length
        self._returns_to_go = self._targets.copy()
        self._time = np.zeros(rows, np.int64)
        self._history = Steps(
            returns_to_go=torch.zeros(rows, length),
            observations=torch.zeros(rows, length, self.environment.observation_size),
            actions=torch.zeros(rows, length, self.environment.action_size),
            timesteps=torch.zeros(rows, length, dtype=torch.int64),
            valid=torch.zeros(rows, length, dtype=torch.bool),
        )
        self._groups = _Groups(self._task_ids)
        self._group_ids, self._masks = self._on_device(self._groups)
        self._prompt_cache: PromptCache | None = None
        if self._execution.repeats:
            self._prepare_graph()
        self.restart(np.ones(rows, bool))

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in the rows where `rows`, bool [N], is True."""
        self._returns_to_go[rows] = self._targets[rows]
        self._time[rows] = 0
        for part in self._history:  # all of it: a weight of 0 does not keep a NaN out
            part[torch.from_numpy(rows)] = 0
        if self._inputs.prompt is not None and rows.any():
            self._encode_prompts(np.flatnonzero(rows))

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float [N, O]."""
        present = self._append(observations)
        lengths = np.minimum(self._time, self._context_length)
        # What is the host's comes before the model, which takes the caches from it.
        hidden = self._inputs.hidden(self._words(len(lengths)))
        in_graph = self._execution.repeats and lengths.min() >= self._shortest_in_graph
        actions = self._actions_in_graph() if in_graph else self._actions(lengths)
        chosen = actions.cpu().flatten(0, 1)[self._groups.index]
        self._history.actions[present] = self._inputs.hide(chosen, hidden)
        return chosen.numpy()

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Lower each row's return-to-go by the reward of its last action, float [N]."""
        self._returns_to_go -= rewards

    def _actions(self, lengths: np.ndarray) -> Tensor:
        """The model's actions, [G, B, A], after histories of some lengths, int [N]."""
        begun = Steps(*(part[:, : lengths.max()] for part in self._history))
        history = Steps(*move(self._groups.lay_out(begun), self._execution.device))
        return self._computed(history, int(lengths.min()))

    def _computed(self, history: Steps, shortest: int) -> Tensor:
        with torch.inference_mode(), self._execution.computing():
            return self.model.act(
                history, self._group_ids, self._masks, self._prompt_cache, shortest
            )

    def _prepare_graph(self) -> None:
        """Find a place for whole histories, which is that of a graph's inputs.

        On a CPU they stay there, if their rows are laid out as they are.
        """
        device, history = self._execution.device, self._groups.lay_out(self._history)
        self._layout = Layout(history)
        self._place = self._layout.pack(history, device).to(device)
        steps = Steps(*self._layout.views(self._place))
        self._history_in_place = device.type == "cpu" and self._groups.in_order
        if self._history_in_place:
            self._history = Steps(*(part.flatten(0, 1) for part in steps))
        self._repeated = self._execution.repeated(
            lambda: self._computed(steps, self._shortest_in_graph)
        )

    @property
    def _shortest_in_graph(self) -> int:
        """Steps of the shortest history that is computed in a graph, with padding to the longest.

        A GPU hardly notices the padding; a CPU would, so its graph is of full histories.
        """
        return 1 if self._execution.device.type == "cuda" else self._context_length

    def _actions_in_graph(self) -> Tensor:
        """The same actions, from histories of which none is shorter than those in the graph."""
        if not self._history_in_place:
            packed = self._layout.pack(self._groups.lay_out(self._history), self._place.device)
            self._place.copy_(packed, non_blocking=True)
        return self._repeated()

    def _append(self, observations: np.ndarray) -> tuple[slice | Tensor, int | Tensor]:
        """Write the present step after each history's last one; a full one loses its first.

        Returns:
            Where the present step of every row is in the histories.
        """
        rows, last = len(self._time), self._context_length - 1
        full = self._time > last
        present = self._inputs.steps(
            self._tasks,
            torch.from_numpy(self._returns_to_go),
            torch.from_numpy(np.asarray(observations, np.float32)),
            torch.zeros(rows, self.environment.action_size),  # yet to be chosen
            torch.from_numpy(self._time),
            torch.ones(rows, dtype=torch.bool),
        )
        losing: slice | Tensor = slice(None)
        place: tuple[slice | Tensor, int | Tensor] = (slice(None), last)
        if not full.all():  # rows and places by number take longer
            losing = torch.from_numpy(full)
            place = torch.arange(rows), torch.from_numpy(np.minimum(self._time, last))
        for part, values in zip(self._history, present, strict=True):
            part[losing, :-1] = part[losing, 1:].clone()
            part[place] = values
        self._time += 1
        return place

    def _words(self, *shape: int) -> Tensor:
        """Random 32-bit words, int64 of a shape."""
        return torch.from_numpy(self._rng.integers(2**32, size=shape))

    def _encode_prompts(self, rows: np.ndarray) -> None:
        """Draw and encode new prompts for some rows, int [n]; the others' stay."""
        tasks, (episode, start) = self._tasks[rows], self._words(2, len(rows), 1)
        drawn = self._inputs.draw_prompts(tasks, episode, start, acting=True)
        prompts = Steps(*(part[:, 0] for part in self._inputs.prompts(tasks, *drawn)))
        groups = _Groups(self._task_ids[rows])
        steps = Steps(*move(groups.lay_out(prompts), self._execution.device))
        with torch.inference_mode(), self._execution.computing():
            encoded = self.model.encode_prompt(steps, *self._on_device(groups))
        if self._prompt_cache is None:  # all rows
            self._prompt_cache = encoded
            return
        there = self._groups.index[rows].to(self._execution.device)
        here = groups.index.to(self._execution.device)
        with torch.inference_mode():
            for of_block, new_of_block in zip(self._prompt_cache, encoded, strict=True):
                for kept, new in zip(of_block, new_of_block, strict=True):  # keys, values
                    kept[there] = new[here]

    def _on_device(self, groups: _Groups) -> tuple[Tensor, TaskMasks]:
        task_ids = torch.from_numpy(groups.task_ids).to(self._execution.device)
        return task_ids, TaskMasks(self.model.vector, self.mask_bits, task_ids)


class _Groups:
    """Rows of several tasks laid out as one group per task; short groups repeat their rows.

    Args:
        task_ids: int [N], the task of each row.

    Attributes:
        task_ids: int64 [G], the task of each group.
        index: int64 [N], where each row is in a layout [G B].
        in_order: whether that is the order of the rows, and none is repeated.
    """

    def __init__(self, task_ids: np.ndarray):
        self.task_ids = np.unique(task_ids).astype(np.int64)
        members = [np.flatnonzero(task_ids == task) for task in self.task_ids]
        width = max(map(len, members))
        self._rows = torch.from_numpy(np.stack([np.resize(m, width) for m in members]))  # [G, B]
        index = np.zeros(len(task_ids), np.int64)
        for group, rows in enumerate(members):
            index[rows] = group * width + np.arange(len(rows))
        self.index = torch.from_numpy(index)
        self.in_order = torch.equal(self._rows.flatten(), torch.arange(len(task_ids)))

    def lay_out(self, steps: Steps) -> list[Tensor]:
        """The parts of steps [N, ...] as [G, B, ...]."""
        return [part[self._rows] for part in steps]
