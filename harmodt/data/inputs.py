"""Turns time steps, stored or observed, into network inputs; draws prompts; sets target returns.

Each task has a conditioning for this: normalisation, prompts and target return. A run computes it
from the data once and saves it. A trained policy therefore needs no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from .. import sealed
from ..batch import Steps
from ..config import DataSettings, PromptSettings, TrainConfig
from ..draws import below, coin
from ..environments import EnvironmentSpec
from ..errors import UserError
from ..files import checksum, write_bytes
from ..rundir import RunDirectory
from ..settings import from_json
from .store import EPISODE_ARRAYS, Episodes, TaskData, array_types
from .trajectories import Trajectories

_PROMPT_ARRAYS = tuple(name for name in EPISODE_ARRAYS if name != "terminated")
"""The arrays of prompt episodes that a run keeps. Nothing reads how a prompt's episode ended."""


@dataclass(frozen=True)
class TaskConditioning:
    """Normalisation, prompt episodes and target return of one task.

    Attributes:
        name: task name.
        mean, deviation: float32 [O]. The deviation is at least the run's `deviation_floor`. Many
            of Meta-World's dimensions are constant within a task's data, and without the floor a
            tiny shift at evaluation would become an enormous input.
        prompts: the prompt episodes of highest return, the best first; none for a model without
            prompts.
        target_return: the return that evaluation asks for. By default it is the best return of all
            the task's episodes, training episodes and prompts (the paper's G*_i).
    """

    name: str
    mean: np.ndarray
    deviation: np.ndarray
    prompts: Episodes
    target_return: float

    @classmethod
    def from_data(cls, data: TaskData, config: TrainConfig) -> TaskConditioning:
        """Make a task's conditioning from its data.

        Raises:
            UserError: the model has prompts, and every prompt episode is shorter than a prompt.
        """
        target = config.evaluation.target_return
        best = max([data.best_return, *data.prompts.returns.tolist()])
        return cls(
            name=data.name,
            mean=data.observation_mean,
            deviation=np.maximum(data.observation_std, np.float32(config.data.deviation_floor)),
            prompts=_select(data.prompts, _choose_prompts(data, config.own.prompts())),
            target_return=best if target is None else target,
        )

    @classmethod
    def of_unseen(
        cls, data: TaskData, trained: Sequence[TaskConditioning], config: TrainConfig
    ) -> TaskConditioning:
        """Make the conditioning of a task that the run was not trained on.

        It uses only the task's prompt episodes, no other data of the task. The mean and the
        deviation are averages over the training tasks. The target is the best return of the
        prompts, unless the run's settings give one.

        Raises:
            UserError: there is no prompt episode, or every one is shorter than a prompt.
        """
        if not len(data.prompts):
            raise UserError(
                f"task {data.name} has no prompt episodes, and a policy may see only the prompts "
                "of an unseen task: make the store again with --prompt-episodes 10"
            )
        return cls(
            name=data.name,
            mean=np.mean([task.mean for task in trained], axis=0),
            deviation=np.mean([task.deviation for task in trained], axis=0),
            prompts=_select(data.prompts, _choose_prompts(data, config.own.prompts())),
            target_return=unseen_target(data, config),
        )


def unseen_target(data: TaskData, config: TrainConfig) -> float:
    """The target return of a task that the run was not trained on."""
    target = config.evaluation.target_return
    return float(data.prompts.returns.max()) if target is None else target


class Inputs:
    """Turns time steps of some tasks into network inputs.

    Args:
        conditioning: one entry per task; index = task id.
        settings: gives the scale of returns and the share of hidden actions.
        max_timesteps: number of time steps that the model distinguishes; all later time steps
            count as the last one.
        prompt: how prompts are drawn; None for a model without prompts.
        device: prompts are copied to this device, and everything is computed there. With None the
            prompts stay in their arrays, and the CPU computes.
    """

    def __init__(
        self,
        conditioning: Sequence[TaskConditioning],
        settings: DataSettings,
        max_timesteps: int,
        prompt: PromptSettings | None = None,
        device: torch.device | None = None,
    ):
        self.conditioning = tuple(conditioning)
        self.settings = settings
        self.max_timesteps = max_timesteps
        self.prompt = prompt
        statistics = np.array([(task.mean, task.deviation) for task in conditioning])
        self._statistics = torch.from_numpy(statistics).to(device)  # [T, 2, O]
        # A GPU divides by a tensor. But by a Python number it does not divide: it multiplies by the
        # number's reciprocal, and the result is rounded differently.
        self._return_scale = torch.tensor(settings.return_scale, device=device)
        if prompt is not None:
            self._prompts = Trajectories([task.prompts for task in conditioning], device)
            self._prompt_times = torch.arange(prompt.prompt_length, device=device)

    def steps(
        self,
        task_ids: Tensor,
        returns_to_go: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        valid: Tensor,
    ) -> Steps:
        """Normalise, scale and clip time steps; all inputs begin with the same shape [G, ...].

        Args:
            task_ids: int64 [G].
            returns_to_go: [G, ...], unscaled.
            observations: [G, ..., O], unnormalised.
            actions: [G, ..., A]; they are clipped to [-1, 1], as the environments clip them.
            timesteps: int64 [G, ...], from 0.
            valid: bool [G, ...], False for padding.
        """
        return Steps(
            returns_to_go=returns_to_go.float() / self._return_scale,
            observations=self.normalise(task_ids, observations),
            actions=actions.clamp(-1, 1),
            timesteps=timesteps.clamp(max=self.max_timesteps - 1),
            valid=valid,
        )

    def normalise(self, task_ids: Tensor, observations: Tensor) -> Tensor:
        """Normalise observations with their tasks' statistics.

        Args:
            task_ids: int64 [G].
            observations: [G, ..., O], unnormalised.
        """
        mean, deviation = (
            part.view(len(task_ids), *[1] * (observations.dim() - 2), -1)
            for part in self._statistics[task_ids].unbind(1)
        )
        return (observations.float() - mean) / deviation

    def of_episodes(
        self,
        trajectories: Trajectories,
        task_ids: Tensor,
        episodes: Tensor,
        times: Tensor,
        valid: Tensor,
    ) -> Steps:
        """Read stored steps as network inputs.

        Args:
            trajectories: the stored episodes of the same tasks.
            task_ids: int64 [G].
            episodes: int64 [G, B], episodes of these tasks.
            times: int64 [G, B, L], time steps of the episodes.
            valid: bool [G, B, L], False for padding.
        """
        returns_to_go, observations, actions = trajectories.gather(task_ids, episodes, times)
        return self.steps(task_ids, returns_to_go, observations, actions, times, valid)

    def hidden(self, words: Tensor) -> Tensor:
        """Draw which actions are hidden from the model, bool [...], from one random word each."""
        return coin(words, self.settings.action_dropout)

    def hide(self, actions: Tensor, hidden: Tensor) -> Tensor:
        """Set the hidden actions to 0; `actions` is [..., A] and `hidden` is bool [...]."""
        return actions.masked_fill(hidden[..., None], 0)

    def draw_prompts(
        self, task_ids: Tensor, episode: Tensor, start: Tensor, acting: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw prompts from the tasks' prompt episodes.

        Args:
            task_ids: int64 [..., G].
            episode, start: random words, int64 [..., G, B]. They choose each prompt's episode and
                its first step.
            acting: True at evaluation. If the run takes prompts from the end of episodes, every
                prompt is then from the best prompt episode.

        Returns:
            The episodes, int64 [..., G, B], numbered over all tasks, and each prompt's time steps,
            int64 [..., G, B, K*]. If prompts come from the end of episodes, a prompt from an
            episode of T steps begins at max(T - K* - 1, 0).
        """
        assert self.prompt is not None
        at_end = self.prompt.prompt_position == "end"
        first, count = (part[..., None] for part in self._prompts.episode_range(task_ids))
        episodes = first + below(episode, 1 if at_end and acting else count)
        room = self._prompts.lengths[episodes] - self.prompt.prompt_length
        # A prompt at the end leaves out the episode's last step, as in the authors' code.
        starts = (room - 1).clamp(min=0) if at_end else below(start, room + 1)
        return episodes, starts[..., None] + self._prompt_times

    def prompts(self, task_ids: Tensor, episodes: Tensor, times: Tensor) -> Steps:
        """Read the prompts that `draw_prompts` drew, as steps [G, B, K*]."""
        valid = torch.ones_like(times, dtype=torch.bool)
        return self.of_episodes(self._prompts, task_ids, episodes, times, valid)


def save_conditioning(path: Path, tasks: Sequence[TaskConditioning], run: str) -> str:
    """Write the conditioning of a run's tasks to a safetensors file, atomically.

    Args:
        path: the file.
        tasks: the conditioning of each task.
        run: the run's id.

    Returns:
        The file's checksum.
    """
    arrays = {}
    for task in tasks:
        arrays[f"{task.name}/mean"] = task.mean
        arrays[f"{task.name}/deviation"] = task.deviation
        arrays[f"{task.name}/target_return"] = np.array([task.target_return])
        for name in _PROMPT_ARRAYS:
            arrays[f"{task.name}/prompts/{name}"] = getattr(task.prompts, name)
    contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    content = save(contiguous, {"run": run})
    write_bytes(path, content)
    return checksum(content)


def own_targets(run: RunDirectory) -> dict[str, float]:
    """The target return of each of a run's tasks.

    Raises:
        UserError: there is no run, or the run is damaged.
    """
    description = run.read()
    where = f"environment in {run.description}"
    environment = from_json(EnvironmentSpec, description.environment, where)
    conditioning = load_conditioning(
        run.conditioning, description.tasks, environment, description.conditioning
    )
    return {task.name: task.target_return for task in conditioning}


def load_conditioning(
    path: Path, tasks: Sequence[str], environment: EnvironmentSpec, recorded: str
) -> list[TaskConditioning]:
    """Read the conditioning that `save_conditioning` wrote, in the order of `tasks`.

    Args:
        path: the file.
        tasks: names of tasks.
        environment: gives the sizes that the arrays must have.
        recorded: the checksum that the run recorded for the file.

    Raises:
        UserError: the file is missing, damaged or from another run.
    """
    remedy = f"{sealed.RESTORE}, or train the run again"
    content = sealed.read_binary(path, recorded, remedy)
    try:
        arrays = load(content)
        return [_task_conditioning(task, arrays, environment) for task in tasks]
    except (SafetensorError, KeyError, ValueError) as error:
        raise sealed.damaged(path, error, remedy) from None


def _task_conditioning(
    task: str, arrays: Mapping[str, np.ndarray], environment: EnvironmentSpec
) -> TaskConditioning:
    """Read one task's conditioning from the arrays of a file.

    Raises:
        KeyError: an array is missing.
        ValueError: an array has a wrong dtype, shape or value.
    """
    types = array_types(environment)
    sizes = (environment.observation_size,)

    def take(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        array = arrays[f"{task}/{name}"]
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            found, needed = f"{array.dtype} {list(array.shape)}", f"{np.dtype(dtype)} {list(shape)}"
            raise ValueError(f"{task}/{name} is {found}, but {needed} is needed")
        if not np.isfinite(array).all():
            raise ValueError(f"{task}/{name} contains NaN or infinity")
        return array

    count = arrays[f"{task}/prompts/episode_starts"].size
    starts = take("prompts/episode_starts", "<i8", (count,))
    if starts[:1].tolist() != [0] or (starts[1:] <= starts[:-1]).any():
        raise ValueError(f"{task}/prompts/episode_starts does not begin with 0 and rise")
    counts = dict.fromkeys(_PROMPT_ARRAYS, int(starts[-1]))
    counts |= {"episode_starts": count, "successes": count - 1}
    prompts = {
        name: take(f"prompts/{name}", types[name][0], (counts[name], *types[name][1]))
        for name in _PROMPT_ARRAYS
    }
    deviation = take("deviation", "<f4", sizes)
    if (deviation <= 0).any():
        raise ValueError(f"{task}/deviation is not positive")
    return TaskConditioning(
        name=task,
        mean=take("mean", "<f4", sizes),
        deviation=deviation,
        prompts=Episodes(**prompts),
        target_return=float(take("target_return", "<f8", (1,))[0]),
    )


def _choose_prompts(data: TaskData, prompt: PromptSettings | None) -> np.ndarray:
    """Choose the episodes that prompts are drawn from, int64 [n], the best first."""
    if prompt is None:
        return np.zeros(0, np.int64)
    best = np.argsort(-data.prompts.returns, kind="stable")
    usable = best[data.prompts.lengths[best] >= prompt.prompt_length]
    if not len(usable):
        otherwise = "lower --prompt-length" if len(best) else "train with --algorithm mtdt"
        raise UserError(
            f"task {data.name} has no prompt episode of at least {prompt.prompt_length} steps: "
            f"make the store again with --prompt-episodes 10, or {otherwise}"
        )
    return usable[: prompt.prompt_pool]


def _select(episodes: Episodes, chosen: np.ndarray) -> Episodes:
    """Copy some episodes into memory; `chosen` are their numbers, int64 [n]."""
    starts = episodes.episode_starts
    steps = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(starts[e], starts[e + 1]) for e in chosen)]
    )
    arrays = {
        name: getattr(episodes, name)[steps]
        for name in _PROMPT_ARRAYS
        if name not in ("episode_starts", "successes")
    }
    return Episodes(
        **arrays,
        episode_starts=np.append(0, np.cumsum(episodes.lengths[chosen])),
        successes=episodes.successes[chosen],
    )
