"""What an evaluation measured and how: written as JSON and CSV, read back, averaged over seeds.

Every interval is of 95 %. A task's success rate has Wilson's interval. The average over the tasks,
and any mean return, has the percentile interval of a bootstrap (`statistics.py`).
"""

from __future__ import annotations

import csv
import fnmatch
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from rich.table import Table

from . import sealed
from .environments import EnvironmentSpec
from .errors import UserError
from .files import clear_temporaries, json_checksum, names_in, write_bytes
from .settings import Count, Whole, from_json
from .statistics import Average, average, wilson_interval

FORMAT = "harmodt-evaluation"
VERSION = 4

_AGAIN = "evaluate the run again with `python -m harmodt.evaluate`"
KIND = sealed.Kind(
    name="an evaluation",
    format=FORMAT,
    version=VERSION,
    instead="name a JSON file that `python -m harmodt.evaluate` wrote",
    again=_AGAIN,
    remedy=f"{sealed.RESTORE}, or {_AGAIN}",
)

SuccessRule = Literal["any", "last"]


@dataclass(frozen=True)
class Measure:
    """How a result was measured, whichever policy it is of: results of one measure compare.

    Attributes:
        target_returns: None where the policy was asked for what its run asks for.
        episodes, success_rule, goal_seed, seed, unseen, environment: as in `Protocol`.
    """

    episodes: int
    success_rule: SuccessRule | None
    goal_seed: int
    seed: int
    target_returns: tuple[float, ...] | None
    unseen: str | None
    environment: EnvironmentSpec

    def differences(self, other: Measure) -> list[str]:
        """What is different in another measure, in words: each value, and what it is here."""
        ours, theirs = (
            values | values.pop("environment") for values in (asdict(self), asdict(other))
        )
        return [
            f"{name} {_words(theirs[name])} instead of {_words(ours[name])}"
            for name in ours
            if ours[name] != theirs[name]
        ]


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{number:g}" for number in value)
    return "the run's own" if value is None else str(value)


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on besides the weights.

    Attributes:
        tasks: their names, in the order of the results' rows.
        episodes: per task.
        success_rule: solved at any step of the episode, or at its last; None where the environments
            do not say whether a task is solved.
        goal_seed: of the tasks' goals.
        seed: of the prompts that are drawn.
        target_returns: what is asked of the policy at the start of an episode, by task, unscaled.
        checkpoint: the training step of the weights.
        rounds: that the episodes are divided into; each draws its prompts anew.
        mask: "task" for each task's own, "voted" for that of Eq. 13, "none" without; of unseen
            tasks also "random" and "nearest" (`algorithms/unseen.py`).
        unseen: where the tasks were not trained on, the checksum of the store of their prompts.
        environment: what was played: family, sizes, episode length and version of the rewards; an
            episode goes on after a success.
        precision: of the policy's matrix products.
        backend: name of the kernels that computed the actions.
        device: PyTorch's name of where they ran.
        plans: how the policy's plans were drawn, by the names of `PlanSettings`; None where it does
            not plan, or the evaluation is of before that was recorded.
    """

    tasks: Annotated[tuple[str, ...], Meta(min_length=1)]
    episodes: Count
    success_rule: SuccessRule | None
    goal_seed: Whole
    seed: Whole
    target_returns: tuple[float, ...]
    checkpoint: Whole
    rounds: Count
    mask: str
    unseen: str | None
    environment: EnvironmentSpec
    precision: str
    backend: str
    device: str
    plans: dict[str, str | int | float] | None = None

    @property
    def name(self) -> str:
        """For file names: equal for equal protocols alone."""
        digest = json_checksum(self.to_json())
        size = f"{len(self.tasks)}x{self.episodes}"
        return f"step-{self.checkpoint}-{self.success_rule or 'return'}-{size}-{digest}"

    @property
    def episodes_per_round(self) -> int:
        """Episodes of each task that are played at once."""
        return math.ceil(self.episodes / self.rounds)

    def measure(self, own: Mapping[str, float]) -> Measure:
        """How this was measured; what it was measured of, such as checkpoint and mask, aside.

        Args:
            own: the return that the policy's run asks for, by task.
        """
        asked = tuple(dict.fromkeys(self.target_returns))
        as_own = [own.get(task) for task in self.tasks] == list(self.target_returns)
        return Measure(
            episodes=self.episodes,
            success_rule=self.success_rule,
            goal_seed=self.goal_seed,
            seed=self.seed,
            target_returns=None if as_own else asked,
            unseen=self.unseen,
            environment=self.environment,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = asdict(self) | {"environment": self.environment.to_json()}
        if self.plans is None:
            del values["plans"]
        return values


@dataclass(frozen=True)
class EvaluationResult:
    """What every episode of an evaluation came to.

    Attributes:
        protocol: how it was measured.
        successes: bool [tasks, episodes], or None where the environments know no success.
        returns: float64 [tasks, episodes], undiscounted sums of rewards.
        seconds: wall-clock time, starting the environments included.
        versions: of Python and the packages that the result depends on.
    """

    protocol: Protocol
    successes: np.ndarray | None
    returns: np.ndarray
    seconds: float
    versions: Mapping[str, str]

    @property
    def success_rate(self) -> float | None:
        """Average over the tasks, in [0, 1]; None where the environments know no success."""
        return None if self.successes is None else float(self.successes.mean())

    @property
    def mean_return(self) -> float:
        """Average return over the tasks."""
        return float(self.returns.mean())

    @cached_property
    def average(self) -> Average:
        """Success rate over the tasks, or mean return where the environments know no success.

        The interval resamples tasks and each one's episodes.
        """
        return average_over_seeds([self])

    def summary(self) -> list[dict[str, Any]]:
        """One row per task, then their average; `interval` says which kind the row's is."""
        rows = [self._task_row(i) for i in range(len(self.protocol.tasks))]
        return [*rows, self._average_row()]

    def to_json(self) -> dict[str, Any]:
        """The whole result, episodes included, for `json.dump`."""
        *tasks, average = self.summary()
        for i, task in enumerate(tasks):
            if self.successes is not None:
                task["episode_successes"] = self.successes[i].tolist()
            task["episode_returns"] = self.returns[i].tolist()
        return {
            "format": FORMAT,
            "version": VERSION,
            "protocol": self.protocol.to_json(),
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "average": average,
            "tasks": tasks,
        }

    @classmethod
    def load(cls, path: Path) -> EvaluationResult:
        """Read a result that `save` wrote.

        Raises:
            UserError: there is no such file, it is no evaluation of this version, or it is damaged.
        """
        try:
            content = sealed.read(path, _Content, KIND)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no evaluation {path}: {KIND.instead}") from None
        written = {"plans": None} | content.protocol
        protocol = from_json(Protocol, written, f"protocol in {path}")
        odd = _odd(content, protocol)
        if odd:
            raise sealed.damaged(path, odd, KIND.remedy)
        successes = [task.episode_successes for task in content.tasks]
        return cls(
            protocol=protocol,
            successes=None if protocol.success_rule is None else np.array(successes, bool),
            returns=np.array([task.episode_returns for task in content.tasks], np.float64),
            seconds=content.seconds,
            versions=content.versions,
        )

    def to_csv(self) -> str:
        """The summary, with what it was measured by repeated in every row."""
        columns = ["checkpoint", "goal_seed", "seed", "mask", "unseen"]
        columns += ["precision", "backend", "device"]
        if self.successes is not None:
            columns.insert(0, "success_rule")
        environment = self.protocol.environment
        measured = {name: getattr(self.protocol, name) for name in columns} | {
            "family": environment.family,
            "reward_version": environment.reward_version,
            "episode_length": environment.episode_length,
        }
        measured |= self.protocol.plans or {}
        rows = [row | measured for row in self.summary()]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def table(self) -> Table:
        """The summary for the terminal."""
        rule = {
            "any": "Success at any step",
            "last": "Success at the last step",
            None: "Return",
        }[self.protocol.success_rule]
        *tasks, average = self.summary()
        table = Table(
            title=f"{rule}, {self._what}checkpoint {self.protocol.checkpoint}",
            caption=f"interval of a task: {tasks[0]['interval']}\n"
            f"of the average: {average['interval']}",
            show_footer=True,
        )
        for heading, footer in _cells(average).items():
            table.add_column(heading, footer, justify="left" if heading == "task" else "right")
        for row in tasks:
            table.add_row(*_cells(row).values())
        return table

    @property
    def _what(self) -> str:
        """For a title: under which mask unseen tasks were met."""
        return "" if self.protocol.unseen is None else f"unseen tasks, mask {self.protocol.mask}, "

    def save(self, directory: Path) -> Path:
        """Write NAME.json and NAME.csv, each whole or not at all; returns the JSON's path.

        The name tells the protocol, so repeating an evaluation replaces its files and no others.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.protocol.name}.json"
        table = path.with_suffix(".csv")
        content = self.to_json()
        for file in (table, path):
            clear_temporaries(file)
        write_bytes(table, self.to_csv().encode())
        sealed.write(path, content)
        return path

    def _task_row(self, index: int) -> dict[str, Any]:
        returns = self.returns[index]
        row = {"task": self.protocol.tasks[index], "episodes": len(returns)}
        mean = {"mean_return": float(returns.mean())}
        if self.successes is None:
            found = average(returns[None, None])
            bounds = {"return_low": found.low, "return_high": found.high}
            return row | mean | bounds | {"interval": "bootstrap over episodes"}
        solved = int(self.successes[index].sum())
        low, high = wilson_interval(solved, len(returns))
        rate = {"successes": solved, "success_rate": solved / len(returns)}
        bounds = {"success_low": low, "success_high": high}
        return row | rate | bounds | mean | {"interval": "Wilson"}

    def _average_row(self) -> dict[str, Any]:
        average = self.average
        row = {"task": "average", "episodes": self.returns.size}
        mean = {"mean_return": self.mean_return}
        kind = {"interval": "bootstrap over tasks and episodes"}
        if self.successes is None:
            return row | mean | {"return_low": average.low, "return_high": average.high} | kind
        rate = {"successes": int(self.successes.sum()), "success_rate": average.mean}
        return row | rate | {"success_low": average.low, "success_high": average.high} | mean | kind


def find_results(directory: Path, pattern: str) -> list[Path]:
    """The files in a directory that are named as results are, sorted.

    Args:
        pattern: of the protocol's name, as for `fnmatch`.

    Raises:
        OSError: the system refuses to read the directory.
    """
    names = fnmatch.filter(names_in(directory), f"{pattern}.json")
    return [directory / name for name in names]


def plans_as_trained(plans: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> bool:
    """Whether an evaluation drew plans, if it drew any, as the settings of its run say."""
    if plans is None:
        return True
    unread = {"sampling_steps"} if plans["sampler"] == "ddpm" else set()
    return all(trained[name] == value for name, value in plans.items() if name not in unread)


def compare_masks(results: Sequence[EvaluationResult]) -> Table:
    """Evaluations of the same tasks under several masks, a row for each task and mask."""
    first, *_ = results
    rule = "Return" if first.protocol.success_rule is None else "Success"
    where = " on unseen tasks" if first.protocol.unseen else ""
    table = Table(
        title=f"{rule}{where}, checkpoint {first.protocol.checkpoint}",
        caption=f"interval of a task: {first.summary()[0]['interval']}\n"
        f"of the average: {first.summary()[-1]['interval']}",
    )
    rows = [[_cells(row) for row in result.summary()] for result in results]
    for heading in ("task", "mask", *list(rows[0][0])[1:]):
        table.add_column(heading, justify="left" if heading in ("task", "mask") else "right")
    for of_task in zip(*rows, strict=True):
        table.add_section()
        for result, row in zip(results, of_task, strict=True):
            task, *cells = row.values()
            table.add_row("" if result is not first else task, result.protocol.mask, *cells)
    return table


def average_over_seeds(results: Sequence[EvaluationResult]) -> Average:
    """The average of runs that differ in their training seed, and its 95 % interval.

    Success rate over seeds and tasks, or mean return where the environments know no success. The
    interval resamples seeds, tasks and episodes (`statistics.average`).

    Args:
        results: one per seed, as `stack` takes them.

    Raises:
        UserError: there is no result, or two were measured by different protocols.
    """
    return average(stack(results))


def stack(results: Sequence[EvaluationResult]) -> np.ndarray:
    """What several runs came to: successes, or returns where the environments know no success.

    Args:
        results: one per run, measured by the same protocol but for checkpoint, target returns,
            backend and device.

    Returns:
        bool or float64 [runs, tasks, episodes].

    Raises:
        UserError: there is no result, or two were measured by different protocols.
    """
    if not results:
        raise UserError("there is no result to average: name at least one evaluation")
    for result in results[1:]:
        _check_comparable(results[0].protocol, result.protocol)
    return np.stack([r.returns if r.successes is None else r.successes for r in results])


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, HarmoDT, PyTorch, NumPy and of `packages`, those of a simulator."""
    found = {"python": platform.python_version()}
    for package in ("harmodt", "torch", "numpy", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # harmodt, run from a source tree
            continue
    return found


def _check_comparable(first: Protocol, other: Protocol) -> None:
    free = {
        name: getattr(first, name) for name in ("checkpoint", "target_returns", "backend", "device")
    }
    a, b = first.to_json(), replace(other, **free).to_json()
    different = [name for name in a | b if a.get(name) != b.get(name)]
    if different:
        raise UserError(
            f"the results differ in {', '.join(different)}: only those of one protocol can be "
            "averaged, so evaluate the runs in the same way"
        )


@dataclass(frozen=True)
class _Task:
    """What a file says of a task's episodes; the rest follows from it."""

    task: str
    episode_returns: tuple[float, ...]
    episode_successes: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class _Content:
    """What a file says that a result is made from."""

    protocol: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    tasks: tuple[_Task, ...]


def _odd(content: _Content, protocol: Protocol) -> str | None:
    """What does not fit the protocol, if anything."""
    if tuple(task.task for task in content.tasks) != protocol.tasks:
        return "its results are not of the protocol's tasks"
    for task in content.tasks:
        if len(task.episode_returns) != protocol.episodes:
            return f"{task.task} has returns of {len(task.episode_returns)} episodes"
        solves = task.episode_successes
        if (solves is None) != (protocol.success_rule is None):
            return f"{task.task} has successes where there are none, or none where there are some"
        if solves is not None and len(solves) != protocol.episodes:
            return f"{task.task} has successes of {len(solves)} episodes"
    if len(protocol.target_returns) != len(protocol.tasks):
        return f"it has {len(protocol.target_returns)} target returns"
    return None


def _number(value: float) -> str:
    """A return, with a decimal below 1000."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table: what stands under each heading."""
    if "success_rate" not in row:
        interval = f"{_number(row['return_low'])} – {_number(row['return_high'])}"
        mean = _number(row["mean_return"])
        return {"task": row["task"], "mean return": mean, "95 % interval": interval}
    return {
        "task": row["task"],
        "solved": f"{row['successes']}/{row['episodes']}",
        "success": f"{row['success_rate']:.2f}",
        "95 % interval": f"{row['success_low']:.2f} – {row['success_high']:.2f}",
        "mean return": f"{row['mean_return']:.0f}",
    }
