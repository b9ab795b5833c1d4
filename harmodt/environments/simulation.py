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

EXIT_SECONDS = 30  # a worker that is to end may first have to finish a step and a video


class Simulation:
    """N environments, one per row, each on its own goal; use it as a context manager.

    Results do not depend on the number of workers.

    Args:
        family: the environments' family, by its name or spec.
        tasks: the task of each of the N rows; rows of one task are best adjacent, since each
            worker prepares the goals of its own tasks.
        goal_seed: seed of the goals, as in `EnvironmentFamily.make`.
        workers: number of processes; by default one per core (`count_cores`).
        videos: MP4 files to write, by row; the row's first episode is filmed.
        variables: environment variables to set for the workers, such as MUJOCO_GL.

    Raises:
        UserError, OSError, MemoryError: an environment raised it, here or in any method.
        WorkerError: a worker died, or an environment raised another error, here or in any method.
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
            goal_indices: [N] int, which of the task's goals each row gets.

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
            observations [N, observation_size] float64, rewards [N] float64, successes [N] bool (at
            this step; all False in a family without success).
        """
        self._send(_Environments.step, actions)
        observations, rewards, successes = zip(*self._receive(), strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(successes)

    def close(self) -> None:
        """End the workers; called on leaving the context."""
        end_workers(self._workers)
        self._workers = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, method: Callable[..., Any], values: np.ndarray) -> None:
        """Ask all workers for a call, each with its own rows of the values."""
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
    """In a worker: the environments of its rows."""

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
        """Make an environment for each row; those with a path are filmed."""
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
        """Throw films of unfinished episodes away."""
        for environment in self._environments:
            if isinstance(environment, RecordedEnvironment):
                environment.close()
