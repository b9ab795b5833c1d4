"""Success of a trained policy in Meta-World: `python -m harmodt.evaluate RUN`.

Episode e of a task is played on goal e mod 50 of `metaworld.MT1(task, seed=goal_seed)`. The goal
seed is fixed unless it is given, so that every run that is compared meets the same goals.
"""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from .devices import prepare_cpu
from .environments import METAWORLD
from .environments.metaworld import MetaWorld
from .environments.metaworld_names import resolve_tasks
from .environments.simulation import Simulation
from .environments.video import find_backend
from .errors import UserError, run_command
from .files import write_atomic, write_json
from .policies.decision import Policy
from .progress import progress_bar

GOAL_SEED = 240518080
GOALS = 50  # that Meta-World's MT1 benchmark holds for a seed
ENVIRONMENTS_AT_ONCE = 128  # about 25 MB each
RECORDED_VERSIONS = ("harmodt", "torch", "numpy", "metaworld", "mujoco", "gymnasium")

SuccessRule = Literal["any", "last"]


@dataclass(frozen=True)
class Protocol:
    """Everything that a success rate depends on besides the weights.

    Attributes:
        tasks: Meta-World task names, in the order of the results' rows.
        episodes: per task.
        success: solved at any step of the episode, or at its last.
        goal_seed: of the tasks' goals.
        seed: of the prompts that are drawn.
        target_returns: what is asked of the policy at the start of an episode, by task, unscaled.
        checkpoint: the training step of the weights.
        rounds: that the episodes are divided into; each draws its prompts anew.
        mask: each task's own, the one voted for unseen tasks (Eq. 13), or none.
        episode_length: steps; an episode goes on after a success.
    """

    tasks: tuple[str, ...]
    episodes: int
    success: SuccessRule
    goal_seed: int
    seed: int
    target_returns: tuple[float, ...]
    checkpoint: int
    rounds: int = 1
    mask: str = "task"
    episode_length: int = MetaWorld.spec.episode_length

    @property
    def name(self) -> str:
        """For file names: equal for equal protocols alone."""
        digest = zlib.crc32(json.dumps(asdict(self)).encode())
        size = f"{len(self.tasks)}x{self.episodes}"
        return f"step-{self.checkpoint}-{self.success}-{size}-{digest:08x}"


@dataclass(frozen=True)
class EvaluationResult:
    """What every episode of an evaluation came to.

    Attributes:
        protocol: how it was measured.
        successes: bool [tasks, episodes].
        returns: float64 [tasks, episodes], undiscounted sums of rewards.
        seconds: wall-clock time, starting the environments included.
        backend: name of the kernels that applied the masks.
    """

    protocol: Protocol
    successes: np.ndarray
    returns: np.ndarray
    seconds: float
    backend: str

    @property
    def success(self) -> float:
        """Average success over the tasks, in [0, 1]."""
        return float(self.successes.mean())

    @property
    def mean_return(self) -> float:
        """Average return over the tasks."""
        return float(self.returns.mean())

    def summary(self) -> list[dict[str, Any]]:
        """One row per task, then their average, whose interval is of all episodes pooled."""
        names = [*self.protocol.tasks, "average"]
        successes = [*self.successes, self.successes.ravel()]
        returns = [*self.returns, self.returns.ravel()]
        return [_summarise(*row) for row in zip(names, successes, returns, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The whole result, episodes included, for `json.dump`."""
        *tasks, average = self.summary()
        for task, successes, returns in zip(tasks, self.successes, self.returns, strict=True):
            task["episode_successes"] = successes.tolist()
            task["episode_returns"] = returns.tolist()
        return {
            "format": "harmodt-evaluation",
            "version": 1,
            "protocol": asdict(self.protocol),
            "versions": versions(),
            "backend": self.backend,
            "seconds": round(self.seconds, 2),
            "average": average,
            "tasks": tasks,
        }

    def to_csv(self) -> str:
        """The summary, with the protocol's numbers repeated in every row."""
        protocol = {
            "success_rule": self.protocol.success,
            "checkpoint": self.protocol.checkpoint,
            "goal_seed": self.protocol.goal_seed,
            "seed": self.protocol.seed,
        }
        rows = [row | protocol for row in self.summary()]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def table(self) -> Table:
        """The summary for the terminal."""
        rule = {"any": "at any step", "last": "at the last step"}[self.protocol.success]
        table = Table(
            title=f"Success {rule}, checkpoint {self.protocol.checkpoint}", show_footer=True
        )
        *tasks, average = (_cells(row) for row in self.summary())
        headings = ("task", "solved", "success", "95 % interval", "mean return")
        for heading, footer in zip(headings, average, strict=True):
            table.add_column(heading, footer, justify="left" if heading == "task" else "right")
        for cells in tasks:
            table.add_row(*cells)
        return table

    def save(self, directory: Path) -> Path:
        """Write NAME.json and NAME.csv, each whole or not at all; returns the JSON's path.

        The name tells the protocol, so repeating an evaluation replaces its files and no others.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.protocol.name}.json"
        content = self.to_csv().encode()
        write_atomic(path.with_suffix(".csv"), lambda file: file.write(content) and None)
        write_json(path, self.to_json())
        return path


def evaluate(
    policy: Policy,
    tasks: Sequence[str] | None = None,
    episodes: int = 50,
    *,
    success: SuccessRule = "any",
    seed: int = 0,
    goal_seed: int = GOAL_SEED,
    target_return: float | None = None,
    workers: int | None = None,
    environments: int = ENVIRONMENTS_AT_ONCE,
    video_directory: Path | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Play `episodes` episodes of every task in lock-step, one policy call per time step.

    Where tasks times episodes is more than `environments`, the episodes are played in several
    rounds of equal size.

    Args:
        policy: the policy; its histories are cleared.
        tasks: v3 task names, all of the policy's by default.
        episodes: per task.
        success: solved at any step of an episode, or at its last.
        seed: of the prompts that the policy draws.
        goal_seed: of the goals.
        target_return: instead of each task's own, unscaled.
        workers: processes that simulate; by default one per core.
        environments: that are held in memory at once, but one per task at least.
        video_directory: where films of each task's first episode go, as NAME/TASK.mp4 with the
            protocol's name.
        console: where to draw a progress bar; none by default.

    Raises:
        UserError: a task is not among the policy's; no video can be made here.
        SimulationError: a simulation process failed.
    """
    began = time.perf_counter()
    tasks = policy.tasks if tasks is None else tuple(tasks)
    task_ids = np.array([_task_id(policy, task) for task in tasks])
    targets = policy.target_returns[task_ids]
    if target_return is not None:
        targets = np.full(len(tasks), target_return)
    rounds = math.ceil(episodes / max(1, environments // len(tasks)))
    per_round = math.ceil(episodes / rounds)
    protocol = Protocol(
        tasks=tasks,
        episodes=episodes,
        success=success,
        goal_seed=goal_seed,
        seed=seed,
        target_returns=tuple(map(float, targets)),
        checkpoint=policy.step,
        rounds=rounds,
        mask=policy.mask,
    )

    row_tasks = [task for task in tasks for _ in range(per_round)]
    videos: dict[int, Path] = {}
    variables: dict[str, str] = {}
    if video_directory is not None:
        variables["MUJOCO_GL"] = find_backend()
        folder = video_directory / protocol.name
        folder.mkdir(parents=True, exist_ok=True)
        videos = {i * per_round: folder / f"{task}.mp4" for i, task in enumerate(tasks)}

    played: list[tuple[np.ndarray, np.ndarray]] = []
    with progress_bar("steps", "solved", enabled=console is not None, console=console) as progress:
        bar = progress.add_task(
            "starting environments", total=rounds * MetaWorld.spec.episode_length
        )
        with Simulation(METAWORLD, row_tasks, goal_seed, workers, videos, variables) as simulation:
            progress.update(bar, description="evaluating")
            for first in range(0, rounds * per_round, per_round):
                goal_indices = np.tile((first + np.arange(per_round)) % GOALS, len(tasks))
                policy.start(task_ids.repeat(per_round), seed + first, targets.repeat(per_round))
                before = int(np.sum([successes for successes, _ in played]))

                def show(solved: int, before: int = before) -> None:
                    text = f"{before + solved}/{rounds * len(row_tasks)} solved"
                    progress.update(bar, advance=1, solved=text)

                played.append(_play(policy, simulation, goal_indices, success, show))

    successes, returns = (
        np.concatenate([part.reshape(len(tasks), per_round) for part in parts], axis=1)
        for parts in zip(*played, strict=True)
    )
    seconds = time.perf_counter() - began
    return EvaluationResult(
        protocol, successes[:, :episodes], returns[:, :episodes], seconds, policy.backend.name
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    half_width = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    low = (centre - half_width) / scale if successes else 0.0  # exactly, without rounding
    high = (centre + half_width) / scale if successes < trials else 1.0
    return low, high


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in RECORDED_VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # harmodt, run from a source tree
            continue
    return found


def _play(
    policy: Policy,
    simulation: Simulation,
    goal_indices: np.ndarray,
    success: SuccessRule,
    show: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """One episode in every row: successes bool [N], returns float64 [N].

    `show` is told after each step how many rows are solved.
    """
    observations = simulation.reset(goal_indices)
    successes = np.zeros(len(goal_indices), bool)
    returns = np.zeros(len(goal_indices))
    for _ in range(MetaWorld.spec.episode_length):
        observations, rewards, solved = simulation.step(policy.act(observations))
        policy.record_rewards(rewards)
        returns += rewards
        successes = successes | solved if success == "any" else solved
        show(int(successes.sum()))
    return successes, returns


def _task_id(policy: Policy, task: str) -> int:
    if task not in policy.tasks:
        raise UserError(
            f"the run was not trained on {task}: choose among {', '.join(policy.tasks)}"
        )
    return policy.tasks.index(task)


def _summarise(name: str, successes: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(successes.sum()), len(successes))
    return {
        "task": name,
        "episodes": len(successes),
        "successes": int(successes.sum()),
        "success": float(successes.mean()),
        "success_low": low,
        "success_high": high,
        "mean_return": float(returns.mean()),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["task"],
        f"{row['successes']}/{row['episodes']}",
        f"{row['success']:.2f}",
        f"{row['success_low']:.2f} – {row['success_high']:.2f}",
        f"{row['mean_return']:.0f}",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the success of a trained policy in Meta-World."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    episodes: int = 50
    """Episodes per task."""
    tasks: tuple[str, ...] = ()
    """Tasks or sets such as mt5; all of the run's by default."""
    success: SuccessRule = "any"
    """Count an episode as solved at any of its steps, or at its last."""
    seed: int = 0
    """Of the prompts."""
    goal_seed: int = GOAL_SEED
    """Of the goals; only results with the same one can be compared."""
    checkpoint: int | None = None
    """Training step of the checkpoint; the last by default."""
    mask: Literal["task", "voted"] = "task"
    """Each task's own mask, or for all the one that an unseen task would get (Eq. 13)."""
    target_return: float | None = None
    """Return to ask of the policy; by default the best of each task's data."""
    workers: int | None = None
    """Processes that simulate; by default one per core."""
    environments: int = ENVIRONMENTS_AT_ONCE
    """Environments in memory at once, about 25 MB each."""
    device: str = "cpu"
    """PyTorch device that the policy runs on, such as cpu, cuda or cuda:1."""
    fused: bool = False
    """Apply the masks inside fused kernels; --no-fused is the reference path in plain PyTorch."""
    video: bool = False
    """Write a film of each task's first episode (needs harmodt[video] and off-screen OpenGL)."""

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: names the setting and what it may be.
        """
        for name in ("episodes", "workers", "environments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}: give at least 1")
        for name in ("seed", "goal_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 to 2^32 - 1"
                )


def main() -> None:
    """The command line: print the table, write it as JSON and CSV into RUN/evaluation."""
    prepare_cpu()
    config = tyro.cli(EvaluateConfig, prog="python -m harmodt.evaluate")
    config.check()
    console = Console()
    if config.video:
        find_backend()
    tasks = resolve_tasks(config.tasks) if config.tasks else None
    policy = Policy.load(config.run, config.checkpoint, config.device, config.fused)
    if config.mask == "voted":
        policy.use_voted_mask()
    directory = config.run / "evaluation"
    result = evaluate(
        policy,
        tasks,
        config.episodes,
        success=config.success,
        seed=config.seed,
        goal_seed=config.goal_seed,
        target_return=config.target_return,
        workers=config.workers,
        environments=config.environments,
        video_directory=directory if config.video else None,
        console=console,
    )
    path = result.save(directory)
    console.print(result.table())
    console.print(f"written to {path} and .csv", soft_wrap=True)
    if config.video:
        console.print(f"videos in {path.with_suffix('')}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
