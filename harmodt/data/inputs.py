"""What a policy must know of each task besides its weights: scales, prompts, target return.

It is taken from the data once and saved with the run, so that a trained policy needs no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ..config import TrainConfig
from ..errors import UserError
from ..files import write_bytes
from .store import Episodes, TaskData

PROMPT_EPISODES = 5
"""How many of a task's held-apart episodes, the best by return, prompts are drawn from."""

_ARRAYS = ("observations", "actions", "rewards", "returns_to_go", "episode_starts", "successes")


@dataclass(frozen=True)
class TaskConditioning:
    """Normalisation, prompt episodes and target return of one task.

    Attributes:
        name: task name.
        mean, deviation: float32 [39]; the deviation is floored by the run's `deviation_floor`,
            because many of Meta-World's dimensions are constant within a task's data and a tiny
            shift at evaluation would otherwise become an enormous input.
        prompts: the held-apart episodes of highest return; none for a model without prompt.
        target_return: the return asked for at evaluation, the best of the task's data (the
            paper's G*_i) unless the run gives one.
    """

    name: str
    mean: np.ndarray
    deviation: np.ndarray
    prompts: Episodes
    target_return: float

    @classmethod
    def from_data(cls, data: TaskData, config: TrainConfig) -> TaskConditioning:
        """Take a task's conditioning from its data.

        Raises:
            UserError: no held-apart episode is as long as a prompt.
        """
        length = config.model().prompt_length
        best = np.argsort(-data.prompts.returns, kind="stable")
        usable = [e for e in best if length and data.prompts.lengths[e] >= length]
        if length and not usable:
            raise UserError(
                f"task {data.name} has no prompt episode of at least {length} steps: "
                "make the store again with prompt episodes, or lower prompt_length"
            )
        return cls(
            name=data.name,
            mean=data.observation_mean,
            deviation=np.maximum(data.observation_std, np.float32(config.deviation_floor)),
            prompts=_select(data.prompts, np.array(usable[:PROMPT_EPISODES], np.int64)),
            target_return=(
                data.best_return if config.target_return is None else config.target_return
            ),
        )

    def normalise(self, observations: np.ndarray) -> np.ndarray:
        """Observations [..., 39] in units of the task's deviation from its mean, float32."""
        return ((observations - self.mean) / self.deviation).astype(np.float32)

    def draw_prompts(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Step indices into the prompt episodes, int64 [count, length], at random places."""
        episodes = rng.integers(len(self.prompts), size=count)
        room = self.prompts.lengths[episodes] - length
        starts = self.prompts.episode_starts[episodes] + rng.integers(room + 1)
        return starts[:, None] + np.arange(length)


def save_conditioning(path: Path, tasks: Sequence[TaskConditioning]) -> None:
    """Write the conditioning of a run's tasks to a safetensors file, atomically."""
    arrays = {}
    for task in tasks:
        arrays[f"{task.name}/mean"] = task.mean
        arrays[f"{task.name}/deviation"] = task.deviation
        arrays[f"{task.name}/target_return"] = np.array([task.target_return])
        for name in _ARRAYS:
            arrays[f"{task.name}/prompts/{name}"] = getattr(task.prompts, name)
    content = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    write_bytes(path, content)


def load_conditioning(path: Path, tasks: Sequence[str]) -> list[TaskConditioning]:
    """Read what `save_conditioning` wrote, in the order of `tasks`."""
    with safe_open(path, framework="numpy") as file:
        return [
            TaskConditioning(
                name=task,
                mean=file.get_tensor(f"{task}/mean"),
                deviation=file.get_tensor(f"{task}/deviation"),
                prompts=Episodes(
                    **{name: file.get_tensor(f"{task}/prompts/{name}") for name in _ARRAYS}
                ),
                target_return=float(file.get_tensor(f"{task}/target_return")[0]),
            )
            for task in tasks
        ]


def _select(episodes: Episodes, chosen: np.ndarray) -> Episodes:
    """A copy of some episodes, int64 [n], in memory."""
    starts = episodes.episode_starts
    spans = [slice(0), *(slice(starts[e], starts[e + 1]) for e in chosen)]
    return Episodes(
        observations=np.concatenate([episodes.observations[s] for s in spans]),
        actions=np.concatenate([episodes.actions[s] for s in spans]),
        rewards=np.concatenate([episodes.rewards[s] for s in spans]),
        returns_to_go=np.concatenate([episodes.returns_to_go[s] for s in spans]),
        episode_starts=np.append(0, np.cumsum(episodes.lengths[chosen])),
        successes=episodes.successes[chosen],
    )
