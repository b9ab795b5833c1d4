"""Many environments that advance in lock-step, spread over worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cores import count_cores
from ..workers import Served, Worker, end_workers
from . import Environment, EnvironmentFamily, EnvironmentSpec
from . import family as family_named
from .video import RecordedEnvironment

EXIT_SECONDS = 30  # before a worker ends, it may have to finish a step and a video


class Simulation:
    """N environments, each with its own goal. It is a context manager.

    Row i of every array belongs to environment i. Results do not depend on the number of workers.

    Args:
        family: name or description of the environments' family. A description also gives the length
            of the filmed episodes.
        tasks: the task of each of the N rows. Put rows of one task next to each other, because each
            worker prepares the goals of all its tasks.
        goal_seed: seed of the goals, as in `EnvironmentFamily.make`.
        workers: number of processes; by default one per core (`count_cores`).
        videos: the MP4 file to write for a row; it shows the row's first episode.
        variables: environment variables to set for the workers, such as MUJOCO_GL.

    Raises:
        UserError, OSError, MemoryError: an environment raised it. Every method can raise these
            errors.
        WorkerError: a worker died, or an environment raised another error. Every method can raise
            it.
    """

    def __init__(
        self,
        family: str | EnvironmentSpec,
        tasks: Sequence[str],
        goal_seed: int,
        workers: int | None = None,
        videos: Mapping[int, Path] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        count = min(workers or count_cores(), len(tasks))
        videos = videos or {}
        found = family_named(family if isinstance(family, str) else family.family)
        length = (found.spec if isinstance(family, str) else family).episode_length
        self._rows: list[np.ndarray] = np.array_split(np.arange(len(tasks)), count)
        self._workers: list[Worker] = []
        try:
            for rows in self._rows:
                self._workers.append(_start_worker([tasks[row] for row in rows], variables))
            for worker, rows in zip(self._workers, self._rows, strict=True):
                paths = [videos.get(row) for row in rows]
                chosen = [tasks[row] for row in rows]
                worker.send(_Environments.build, found, chosen, goal_seed, paths, length)
            self._receive()
        except BaseException:
            self.close()
            raise

    def reset(self, goal_indices: np.ndarray) -> np.ndarray:
        """Begin a new episode in every row.

        Args:
            goal_indices: [N] int, the index of each row's goal among the goals of its task.

        Returns:
            observations [N, observation_size] float64.
        """
        self._send(_Environments.reset, goal_indices)
        return np.concatenate(self._receive())

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advance every row by one step.

        Args:
            actions: [N, action_size]; clipped to [-1, 1].

        Returns:
            observations [N, observation_size] float64, rewards [N] float64, and successes [N] bool:
            whether the task is solved at this step, always False in a family without success.
        """
        self._send(_Environments.step, actions)
        observations, rewards, successes = zip(*self._receive(), strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(successes)

    def close(self) -> None:
        """End the workers. Leaving the context calls this."""
        end_workers(self._workers)
        self._workers = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, method: Callable[..., Any], values: np.ndarray) -> None:
        """Send a call to all workers, to each with its own rows of the values."""
        for worker, rows in zip(self._workers, self._rows, strict=True):
            worker.send(method, values[rows])

    def _receive(self) -> list[Any]:
        return [worker.receive() for worker in self._workers]


def _start_worker(tasks: Sequence[str], variables: Mapping[str, str] | None) -> Worker:
    names = ", ".join(dict.fromkeys(tasks))
    return Worker(
        _Environments,
        name=f"a simulation worker ({names})",
        relief="simulate fewer environments at once",
        patience=EXIT_SECONDS,
        variables=variables,
    )


class _Environments(Served):
    """The environments of one worker's rows, in that worker."""

    def __init__(self) -> None:
        self._environments: list[Environment] = []

    def build(
        self,
        family: EnvironmentFamily,
        tasks: Sequence[str],
        goal_seed: int,
        videos: Sequence[Path | None],
        episode_length: int,
    ) -> None:
        """Make an environment for each row, and film it if the row has a path."""
        for task, video in zip(tasks, videos, strict=True):
            environment = family.make(task, goal_seed)
            if video is not None:
                environment = RecordedEnvironment(environment, episode_length, video)
            self._environments.append(environment)

    def reset(self, goal_indices: np.ndarray) -> np.ndarray:
        """As `Simulation.reset`, for the worker's rows."""
        pairs = zip(self._environments, goal_indices.tolist(), strict=True)
        return np.stack([environment.reset(goal_index) for environment, goal_index in pairs])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Simulation.step`, for the worker's rows."""
        pairs = zip(self._environments, actions, strict=True)
        results = [environment.step(action) for environment, action in pairs]
        observations, rewards, successes = zip(*results, strict=True)
        return np.stack(observations), np.array(rewards, np.float64), np.array(successes, bool)

    def close(self) -> None:
        """Delete the films of unfinished episodes."""
        for environment in self._environments:
            if isinstance(environment, RecordedEnvironment):
                environment.close()
