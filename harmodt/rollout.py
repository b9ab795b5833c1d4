"""Plays any policy in the environments of its tasks.

Episodes are played in rounds. The episodes of a round are played in two halves: while one half
simulates, the policy acts for the other half. Episode e of a task has the goal number e mod the
family's number of goals. The goal seed has a fixed default, so that all runs play the same goals
and can be compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from msgspec import Meta
from rich.console import Console
from rich.progress import Progress

from .environments import EnvironmentSpec, family
from .environments.simulation import Simulation
from .environments.video import find_backend
from .errors import UserError
from .policies import Policy
from .progress import progress_bar
from .results import EvaluationResult, Measure, Protocol, versions
from .settings import Count, check

GOAL_SEED = 240518080
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]


@dataclass(frozen=True)
class Request:
    """The episodes to play, and how to play them.

    Raises:
        UserError: a number is outside its bounds.
    """

    episodes: Count = 50
    """Episodes per task."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, or of sets such as mt5; by default all tasks of the run."""
    success_rule: Annotated[Literal["any", "last"], tyro.conf.arg(name="success")] = "any"
    """Count an episode as solved if any of its steps succeeds (any), or if its last step succeeds
    (last)."""
    seed: Seed = 0
    """Seed from which prompts and a random mask are drawn."""
    goal_seed: Seed = GOAL_SEED
    """Seed from which goals are drawn; only results with the same goal seed can be compared."""
    target_return: float | None = None
    """Return that the policy aims at; by default the best return in each task's data."""
    environments: Count = 128
    """Environments in memory at once, about 25 MB each; further episodes are played in further
    rounds."""
    workers: Count | None = None
    """Number of processes that simulate; by default one per core."""
    episode_length: Count | None = None
    """Steps of an episode; by default the length of the longest episode in the run's data."""

    def __post_init__(self) -> None:
        check(self)

    def environment(self, name: str) -> EnvironmentSpec:
        """Return the environments of a family with the requested episode length.

        Args:
            name: the name of the family.

        Raises:
            UserError: the family's episodes are shorter than the requested length.
        """
        spec = family(name).spec
        length = self.episode_length or spec.episode_length
        if length > spec.episode_length:
            raise UserError(f"episode_length is {length}: give 1 to {spec.episode_length}")
        return replace(spec, episode_length=length)

    def measure(self, name: str) -> Measure:
        """Return the measure of the results on the run's own tasks.

        Args:
            name: the name of the tasks' family.
        """
        environment = self.environment(name)
        return Measure(
            episodes=self.episodes,
            success_rule=self.success_rule if environment.success else None,
            goal_seed=self.goal_seed,
            seed=self.seed,
            target_returns=None if self.target_return is None else (self.target_return,),
            unseen=None,
            environment=environment,
        )


def play(
    policy: Policy,
    request: Request | None = None,
    *,
    video_directory: Path | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Play the episodes of every task.

    In each time step, one call of the policy gives the actions of half the episodes of the round.
    Meanwhile the other half simulates.

    Args:
        policy: the policy; it forgets the episodes that it was playing, and begins new ones.
        request: the episodes to play; by default the same as `python -m harmodt.evaluate`.
        video_directory: the folder for a video of each task's first episode; the file is
            NAME/TASK.mp4, where NAME is the protocol's name; None for no videos.
        console: draws a progress bar; None for no bar.

    Raises:
        UserError: the policy lacks a task; no video can be made here; a simulation process was
            killed.
        OSError, MemoryError, WorkerError: as `Simulation` raises them.
    """
    began = time.perf_counter()
    request = request or Request()
    protocol = make_protocol(policy, request)
    with progress_bar("steps", "so_far", enabled=console is not None, console=console) as progress:
        bar = _Bar(progress, protocol)
        parts = _halves(len(protocol.tasks), protocol.episodes_per_round)
        policies = [policy, *(policy.copy() for _ in parts[1:])]
        halves = list(zip(policies, parts, strict=True))
        with _simulate(protocol, parts, request.workers, video_directory) as simulation:
            played = [
                _play_round(halves, simulation, protocol, number, bar.show)
                for number in range(protocol.rounds)
            ]
    # All rounds have the same size, so the last round may play more episodes than were requested.
    successes, returns = (
        np.concatenate(parts, axis=1)[:, : protocol.episodes] for parts in zip(*played, strict=True)
    )
    return EvaluationResult(
        protocol=protocol,
        successes=successes if protocol.environment.success else None,
        returns=returns,
        seconds=time.perf_counter() - began,
        versions=versions(family(protocol.environment.family).packages),
    )


def make_protocol(policy: Policy, request: Request) -> Protocol:
    """Return the protocol that `play` follows. The policy gives the values that the request lacks.

    Raises:
        UserError: the policy lacks a task.
    """
    played = family(policy.environment.family)
    tasks = played.resolve_tasks(request.tasks) if request.tasks else policy.tasks
    unknown = [task for task in tasks if task not in policy.tasks]
    if unknown:
        raise UserError(
            f"the run was not trained on {', '.join(unknown)}: choose among "
            f"{', '.join(policy.tasks)}"
        )
    targets = policy.target_returns[[policy.tasks.index(task) for task in tasks]]
    if request.target_return is not None:
        targets = np.full(len(tasks), request.target_return)
    return Protocol(
        tasks=tasks,
        episodes=request.episodes,
        success_rule=request.success_rule if played.spec.success else None,
        goal_seed=request.goal_seed,
        seed=request.seed,
        target_returns=tuple(map(float, targets)),
        checkpoint=policy.step,
        rounds=math.ceil(request.episodes / max(1, request.environments // len(tasks))),
        mask=policy.mask,
        unseen=policy.unseen,
        # Not `policy.environment`: it may have the reward version of the run's data.
        environment=request.environment(policy.environment.family),
        precision=policy.precision,
        backend=policy.backend,
        device=policy.device,
        plans=policy.plans,
    )


def _halves(tasks: int, size: int) -> list[range]:
    """The rows of the two halves of a round; a single row is a half of its own.

    With several tasks, the cut is between two tasks. So the policy's calls have as many rows of
    each task as one call for all rows.

    Args:
        tasks: the number of tasks.
        size: the number of rows of each task.
    """
    rows = range(tasks * size)
    cut = tasks // 2 * size if tasks > 1 else size // 2
    return [half for half in (rows[:cut], rows[cut:]) if half]


def _simulate(
    protocol: Protocol,
    parts: Sequence[range],
    workers: int | None,
    video_directory: Path | None,
) -> Simulation:
    """Start the environments of one round; the environments of a task are adjacent rows."""
    size = protocol.episodes_per_round
    rows = [task for task in protocol.tasks for _ in range(size)]
    videos: dict[int, Path] = {}
    variables: dict[str, str] = {}
    if video_directory is not None:
        variables["MUJOCO_GL"] = find_backend()
        folder = video_directory / protocol.name
        folder.mkdir(parents=True, exist_ok=True)
        videos = {i * size: folder / f"{task}.mp4" for i, task in enumerate(protocol.tasks)}
    return Simulation(
        protocol.environment, rows, protocol.goal_seed, workers, videos, variables, parts
    )


def _play_round(
    halves: Sequence[tuple[Policy, range]],
    simulation: Simulation,
    protocol: Protocol,
    number: int,
    show: Callable[[np.ndarray, np.ndarray], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Play one episode in every row.

    Args:
        halves: for each part of the simulation, the policy that plays it, and its rows.
        simulation, protocol: the environments, and the protocol to follow.
        number: the number of the round, from 0.
        show: a function that is called after each step with the successes and the returns so far,
            [N] each.

    Returns:
        successes bool and returns float64, both [tasks, episodes_per_round].
    """
    tasks, size = len(protocol.tasks), protocol.episodes_per_round
    first = number * size
    targets = np.array(protocol.target_returns).repeat(size)
    for policy, rows in halves:
        task_ids = np.array([policy.tasks.index(task) for task in protocol.tasks]).repeat(size)
        policy.start(task_ids, protocol.seed + first, targets, rows)
    goals = (first + np.arange(size)) % family(protocol.environment.family).goals
    observations = simulation.reset(np.tile(goals, tasks))
    for part, (policy, rows) in enumerate(halves):
        simulation.begin_step(policy.act(observations[rows.start : rows.stop]), part)
    successes, returns = np.zeros(tasks * size, bool), np.zeros(tasks * size)
    length = protocol.environment.episode_length
    for step in range(1, length + 1):
        for part, (policy, rows) in enumerate(halves):
            seen, rewards, solved = simulation.finish_step(part)
            policy.record_rewards(rewards)
            if step < length:  # the other half simulates while this policy acts
                simulation.begin_step(policy.act(seen), part)
            own = slice(rows.start, rows.stop)
            returns[own] += rewards
            earlier = successes[own] if protocol.success_rule == "any" else False
            successes[own] = solved | earlier
        show(successes, returns)
    return successes.reshape(tasks, size), returns.reshape(tasks, size)


class _Bar:
    """Draws the progress of an evaluation: its steps, and the number of solved episodes."""

    def __init__(self, progress: Progress, protocol: Protocol) -> None:
        self._progress = progress
        self._length = protocol.environment.episode_length
        self._rule = protocol.success_rule
        self._steps = self._solved_before = 0
        self._episodes = protocol.rounds * len(protocol.tasks) * protocol.episodes_per_round
        total = protocol.rounds * self._length
        self._bar = progress.add_task("starting environments", total=total)

    def show(self, successes: np.ndarray, returns: np.ndarray) -> None:
        """Draw the next step.

        Args:
            successes: bool [N], whether each row's episode is solved.
            returns: float64 [N], each row's return so far.
        """
        self._steps += 1
        solved = self._solved_before + int(successes.sum())
        if self._steps % self._length == 0:
            self._solved_before = solved
        text = f"{solved}/{self._episodes} solved" if self._rule else f"return {returns.mean():.0f}"
        self._progress.update(self._bar, description="evaluating", advance=1, so_far=text)
