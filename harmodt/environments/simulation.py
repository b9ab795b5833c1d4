"""Many environments, spread over worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
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

    Row i of every array belongs to environment i. The rows are cut into parts, and all rows of a
    part advance together. Every worker simulates rows of every part that has enough rows, so all
    workers are busy while a single part is simulated. Results depend neither on the number of
    workers nor on the parts.

    Args:
        family: name or description of the environments' family. A description also gives the length
            of the filmed episodes.
        tasks: the task of each of the N rows. Put rows of one task next to each other, because each
            worker prepares the goals of all its tasks.
        goal_seed: seed of the goals, as in `EnvironmentFamily.make`.
        workers: number of processes; by default one per core (`count_cores`).
        videos: the MP4 file to write for a row; it shows the row's first episode.
        variables: environment variables to set for the workers, such as MUJOCO_GL.
        parts: the rows of each part, in their order; by default one part has all rows.

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
        parts: Sequence[range] | None = None,
    ) -> None:
        count = min(workers or count_cores(), len(tasks))
        videos = videos or {}
        found = family_named(family if isinstance(family, str) else family.family)
        length = (found.spec if isinstance(family, str) else family).episode_length
        self._parts = parts or [range(len(tasks))]
        self._shares = [_share_out(part, count) for part in self._parts]
        self._workers: list[Worker] = []
        try:
            rows = [[own.get(i, ()) for own in self._shares] for i in range(count)]
            for of_worker in rows:
                names = [tasks[row] for row in chain(*of_worker)]
                self._workers.append(_start_worker(names, variables))
            for worker, of_worker in zip(self._workers, rows, strict=True):
                chosen = [[(tasks[row], videos.get(row)) for row in part] for part in of_worker]
                worker.send(_Environments.build, found, chosen, goal_seed, length)
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self.close()
            raise

    def reset(self, goal_indices: np.ndarray) -> np.ndarray:
        """Begin a new episode in every row, when no step is being simulated.

        Args:
            goal_indices: [N] int, the index of each row's goal among the goals of its task.

        Returns:
            observations [N, observation_size] float64.
        """
        parts = range(len(self._parts))
        for part, rows in enumerate(self._parts):
            self._send(_Environments.reset, goal_indices[rows.start : rows.stop], part)
        return np.concatenate([answer for part in parts for answer in self._receive(part)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advance every row by one step: `begin_step` and `finish_step` of all parts.

        Args:
            actions: [N, action_size].
        """
        for part, rows in enumerate(self._parts):
            self.begin_step(actions[rows.start : rows.stop], part)
        answers = [self.finish_step(part) for part in range(len(self._parts))]
        observations, rewards, successes = zip(*answers, strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(successes)

    def begin_step(self, actions: np.ndarray, part: int = 0) -> None:
        """Have the workers advance every row of a part by one step, and do not wait for them.

        Call `finish_step` for the parts in the order in which their steps began.

        Args:
            actions: [rows of the part, action_size]; clipped to [-1, 1].
            part: the number of the part, from 0.
        """
        self._send(_Environments.step, actions, part)

    def finish_step(self, part: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wait for the step of a part that `begin_step` began.

        Returns:
            observations [rows of the part, observation_size] float64, rewards [rows] float64, and
            successes [rows] bool: whether the task is solved at this step, always False in a family
            without success.
        """
        observations, rewards, successes = zip(*self._receive(part), strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(successes)

    def close(self) -> None:
        """End the workers. Leaving the context calls this."""
        end_workers(self._workers)
        self._workers = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, method: Callable[..., Any], values: np.ndarray, part: int) -> None:
        """Send a call for a part to its workers, to each with its own rows of the part's values."""
        first = self._parts[part].start
        for number, rows in self._shares[part].items():
            self._workers[number].send(method, part, values[rows - first])

    def _receive(self, part: int) -> list[Any]:
        """Wait for the workers' answers for a part; return them in the order of the rows."""
        return [self._workers[number].receive() for number in self._shares[part]]


def _share_out(part: range, workers: int) -> dict[int, np.ndarray]:
    """Share out the rows of a part among workers, as equally as possible.

    The workers after those that got one row more in the parts before come first.

    Returns:
        The rows of each worker that gets any, by the worker's number, in the order of the rows.
    """
    shares = np.array_split(np.arange(part.start, part.stop), workers)
    return {(part.start + i) % workers: rows for i, rows in enumerate(shares) if len(rows)}


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
    """The environments of one worker's rows, in that worker, by the parts of the rows."""

    def __init__(self) -> None:
        self._parts: list[list[Environment]] = []

    def build(
        self,
        family: EnvironmentFamily,
        parts: Sequence[Sequence[tuple[str, Path | None]]],
        goal_seed: int,
        episode_length: int,
    ) -> None:
        """Make an environment for each row.

        Args:
            parts: for each part, the task of each of the worker's rows, and the path of its film.
        """
        for rows in parts:
            self._parts.append([])
            for task, video in rows:
                environment = family.make(task, goal_seed)
                if video is not None:
                    environment = RecordedEnvironment(environment, episode_length, video)
                self._parts[-1].append(environment)

    def reset(self, part: int, goal_indices: np.ndarray) -> np.ndarray:
        """As `Simulation.reset`, for the worker's rows of a part."""
        pairs = zip(self._parts[part], goal_indices.tolist(), strict=True)
        return np.stack([environment.reset(goal_index) for environment, goal_index in pairs])

    def step(self, part: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advance the worker's rows of a part by one step, as `Simulation.finish_step` says."""
        pairs = zip(self._parts[part], actions, strict=True)
        results = [environment.step(action) for environment, action in pairs]
        observations, rewards, successes = zip(*results, strict=True)
        return np.stack(observations), np.array(rewards, np.float64), np.array(successes, bool)

    def close(self) -> None:
        """Delete the films of unfinished episodes."""
        for environment in chain(*self._parts):
            if isinstance(environment, RecordedEnvironment):
                environment.close()
