"""Many environments advancing in lock-step, spread over worker processes.

The workers are fresh interpreters rather than forks or `multiprocessing` children: a fork is
unsafe beside PyTorch's threads, and a `multiprocessing` child imports the parent's main module
(and PyTorch with it) again. A worker reads from a socket that only its parent holds the other end
of, so when the parent goes away, however it dies, the worker sees the end of the stream and exits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import Environment, EnvironmentFamily, EnvironmentSpec
from . import family as family_named
from .video import RecordedEnvironment

EXIT_SECONDS = 30  # a worker that is told to end may first have to finish a step and a video

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_PROGRAM = """
import sys
sys.path[:] = sys.argv[2:]
from harmodt.environments.simulation import work
work(int(sys.argv[1]))
"""


class SimulationError(RuntimeError):
    """A worker process failed or died; the message holds its tasks and what it reported."""


class WorkerDied(SimulationError, UserError):
    """A worker process was killed or ended, which is the machine's doing."""


class Simulation:
    """N environments, one per row, each on its own goal; use it as a context manager.

    Results do not depend on the number of workers.

    Args:
        family: the environments' family, by its name or spec.
        tasks: the task of each of the N rows; rows of one task are best adjacent, since each
            worker prepares the goals of its own tasks.
        goal_seed: seed of the goals, as in `EnvironmentFamily.make`.
        workers: number of processes; by default one per core that this process may use.
        videos: MP4 files to write, by row; the row's first episode is filmed.
        variables: environment variables to set for the workers, such as MUJOCO_GL.

    Raises:
        SimulationError: a worker failed; every method may raise it, and every UserError or
            OSError that a worker meets.
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
        count = min(workers or available_cores(), len(tasks))
        videos = videos or {}
        found = family_named(family if isinstance(family, str) else family.family)
        length = (found.spec if isinstance(family, str) else family).episode_length
        self._workers: list[_Worker] = []
        try:
            for rows in np.array_split(np.arange(len(tasks)), count):
                self._workers.append(_Worker(rows, [tasks[row] for row in rows], variables or {}))
            for worker in self._workers:
                paths = [videos.get(row) for row in worker.rows]
                worker.send("build", (found, worker.tasks, goal_seed, paths, length))
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
        self._send("reset", goal_indices)
        return np.concatenate(self._receive())

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advance every row by one step.

        Args:
            actions: [N, action_size]; clipped to [-1, 1].

        Returns:
            observations [N, observation_size] float64, rewards [N] float64, successes [N] bool (at
            this step; all False in a family without success).
        """
        self._send("step", actions)
        observations, rewards, successes = zip(*self._receive(), strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(successes)

    def close(self) -> None:
        """End the workers; called on leaving the context."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.wait()
        self._workers = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, command: str, values: np.ndarray) -> None:
        for worker in self._workers:
            worker.send(command, values[worker.rows])

    def _receive(self) -> list[Any]:
        return [worker.receive() for worker in self._workers]


class _Worker:
    """The parent's view of a worker process: its rows, and the socket to it."""

    def __init__(self, rows: np.ndarray, tasks: list[str], variables: Mapping[str, str]) -> None:
        self.rows = rows
        self.tasks = tasks
        self.connection, child = Pipe()
        self.process = subprocess.Popen(
            # -I: the worker looks for modules where its parent does, and nowhere else.
            [sys.executable, "-I", "-c", _PROGRAM, str(child.fileno()), *map(str, sys.path)],
            env={**os.environ, **_ONE_THREAD, **variables},
            stdin=subprocess.DEVNULL,
            pass_fds=[child.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        child.close()  # so that the worker's death is seen as the end of the stream

    def send(self, command: str, values: Any) -> None:
        try:
            self.connection.send((command, values))
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        try:
            report, values = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if report == "error":
            raise SimulationError(f"a simulation worker failed ({self._tasks()}):\n{values}")
        if report == "refused":
            raise values
        return values

    def wait(self) -> None:
        try:
            self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _death(self) -> WorkerDied:
        self.wait()
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return WorkerDied(
            f"a simulation worker {how} ({self._tasks()}): if the machine ran out of memory, "
            "simulate fewer environments at once; else give the same command again"
        )

    def _tasks(self) -> str:
        return ", ".join(dict.fromkeys(self.tasks))


def work(descriptor: int) -> None:
    """The worker process: obey the parent's commands until its end of the socket is closed."""
    connection = Connection(descriptor)
    environments: list[Environment] = []
    try:
        while True:
            command, values = connection.recv()
            if command == "build":
                environments = _build(*values)
                reply: Any = None
            elif command == "reset":
                reply = _reset(environments, values)
            else:
                reply = _step(environments, values)
            connection.send(("done", reply))
    except (EOFError, ConnectionError):
        pass  # the parent has closed the simulation, or died
    except (UserError, OSError) as error:
        connection.send(("refused", error))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
    finally:
        for environment in environments:
            if isinstance(environment, RecordedEnvironment):
                environment.close()


def available_cores() -> int:
    """The number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _build(
    family: EnvironmentFamily,
    tasks: list[str],
    goal_seed: int,
    videos: list[Path | None],
    episode_length: int,
) -> list[Environment]:
    environments: list[Environment] = [family.make(task, goal_seed) for task in tasks]
    return [
        RecordedEnvironment(environment, episode_length, video) if video else environment
        for environment, video in zip(environments, videos, strict=True)
    ]


def _reset(environments: list[Environment], goal_indices: np.ndarray) -> np.ndarray:
    pairs = zip(environments, goal_indices.tolist(), strict=True)
    return np.stack([environment.reset(goal_index) for environment, goal_index in pairs])


def _step(
    environments: list[Environment], actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = zip(environments, actions, strict=True)
    results = [environment.step(action) for environment, action in pairs]
    observations, rewards, successes = zip(*results, strict=True)
    return np.stack(observations), np.array(rewards, np.float64), np.array(successes, bool)
