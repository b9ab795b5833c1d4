"""Results of evaluations: writes them as JSON and CSV, reads them, averages them over seeds.

All intervals are 95 % intervals. The interval of a task's success rate is Wilson's. The interval of
the average over the tasks, and of every mean return, is the percentile interval of a bootstrap
(`statistics.py`).
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
    """How a result was measured. Two results with the same measure can be compared.

    A measure does not depend on the policy.

    Attributes:
        target_returns: the distinct target returns of the tasks; None where the policy aimed at the
            target returns of its own run.
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
        """Describe each difference between the other measure and this one."""
        # pop removes the environment before its entries are merged.
        ours, theirs = (
            values | values.pop("environment") for values in (asdict(self), asdict(other))
        )
        return [
            f"{name} {_words(name, theirs[name])} instead of {_words(name, ours[name])}"
            for name in ours
            if ours[name] != theirs[name]
        ]


_MEANING_OF_NONE = {"target_returns": "the run's own", "reward_version": "unknown"}


def _words(name: str, value: Any) -> str:
    if value is None:
        return _MEANING_OF_NONE.get(name, "none")
    if isinstance(value, tuple):
        return ", ".join(f"{number:g}" for number in value)
    return str(value)


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on, except the weights.

    Attributes:
        tasks: the names of the tasks, in the order of the result's rows.
        episodes: the number of episodes per task.
        success_rule: "any" if an episode counts as solved when any of its steps succeeds, "last" if
            its last step must succeed; None where the environments do not report success.
        goal_seed: the seed from which the tasks' goals are drawn.
        seed: the seed from which the prompts are drawn.
        target_returns: for each task, the unscaled return that the policy aims at.
        checkpoint: the training step of the weights.
        rounds: the number of rounds that play the episodes; each round draws new prompts.
        mask: "task" for each task's own mask, "voted" for the mask of Eq. 13, "none" for no mask;
            for unseen tasks also "random" and "nearest" (`algorithms/unseen.py`).
        unseen: for unseen tasks, the checksum of the store that holds their prompts; else None.
        environment: the environments: family, sizes, episode length and version of the rewards. An
            episode goes on after a success.
        precision: the precision of the policy's matrix products.
        backend: the name of the kernels that computed the actions.
        device: the device of the policy, as PyTorch names it.
        plans: how the policy drew its plans, under the names of `PlanSettings`; None where the
            policy does not plan, and in evaluations of earlier versions, which did not record this.
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
        """A name for files. Two protocols have the same name only if they are equal."""
        digest = json_checksum(self.to_json())
        size = f"{len(self.tasks)}x{self.episodes}"
        return f"step-{self.checkpoint}-{self.success_rule or 'return'}-{size}-{digest}"

    @property
    def episodes_per_round(self) -> int:
        """The number of episodes of each task that are played at once."""
        return math.ceil(self.episodes / self.rounds)

    def measure(self, own: Mapping[str, float]) -> Measure:
        """Return the measure, which leaves out the policy (its checkpoint, its mask).

        Args:
            own: the target return of the policy's run for each task.
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
        """Return the protocol as plain JSON values."""
        values = asdict(self) | {"environment": self.environment.to_json()}
        if self.plans is None:
            del values["plans"]
        return values


@dataclass(frozen=True)
class EvaluationResult:
    """The results of all episodes of an evaluation.

    Attributes:
        protocol: how the episodes were measured.
        successes: bool [tasks, episodes], or None where the environments do not report success.
        returns: float64 [tasks, episodes], undiscounted sums of rewards.
        seconds: wall-clock time, which includes the start of the environments.
        versions: the versions of Python and of the packages that the result depends on.
    """

    protocol: Protocol
    successes: np.ndarray | None
    returns: np.ndarray
    seconds: float
    versions: Mapping[str, str]

    @property
    def success_rate(self) -> float | None:
        """Average over the tasks, in [0, 1]; None where the environments do not report success."""
        return None if self.successes is None else float(self.successes.mean())

    @property
    def mean_return(self) -> float:
        """Average return over the tasks."""
        return float(self.returns.mean())

    @cached_property
    def average(self) -> Average:
        """Average success rate, or mean return where the environments do not report success.

        The bootstrap of its interval resamples the tasks and the episodes of each task.
        """
        return average_over_seeds([self])

    def summary(self) -> list[dict[str, Any]]:
        """Return a row per task, then their average; `interval` names the kind of interval."""
        rows = [self._task_row(i) for i in range(len(self.protocol.tasks))]
        return [*rows, self._average_row()]

    def to_json(self) -> dict[str, Any]:
        """Return the whole result, with its episodes, for `json.dump`."""
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
            UserError: the file is missing or damaged, or is no evaluation of this version.
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
        """Return the summary as CSV; every row repeats the protocol."""
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
        """Return the summary as a table for the terminal."""
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
        """The mask that unseen tasks were played with, for a title."""
        return "" if self.protocol.unseen is None else f"unseen tasks, mask {self.protocol.mask}, "

    def save(self, directory: Path) -> Path:
        """Write NAME.json and NAME.csv, each whole or not at all; return the path of the JSON file.

        NAME is the protocol's name. An evaluation that is repeated therefore replaces its own
        files, and no others.
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
    """Return the files of results in a directory, sorted by name.

    Args:
        directory: the directory.
        pattern: a pattern for `fnmatch` that the protocol's name has to match.

    Raises:
        OSError: the system refuses to read the directory.
    """
    names = fnmatch.filter(names_in(directory), f"{pattern}.json")
    return [directory / name for name in names]


def plans_as_trained(plans: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> bool:
    """Whether an evaluation drew its plans with the settings of its run; True if it drew none.

    Args:
        plans: the protocol's `plans`.
        trained: the settings of the run, by name.
    """
    if plans is None:
        return True
    unread = {"sampling_steps"} if plans["sampler"] == "ddpm" else set()
    return all(trained[name] == value for name, value in plans.items() if name not in unread)


def compare_masks(results: Sequence[EvaluationResult]) -> Table:
    """Return a table of evaluations of the same tasks with several masks.

    It has a row for each task and mask.
    """
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
    for task_rows in zip(*rows, strict=True):
        table.add_section()
        for result, row in zip(results, task_rows, strict=True):
            task, *cells = row.values()
            table.add_row("" if result is not first else task, result.protocol.mask, *cells)
    return table


def average_over_seeds(results: Sequence[EvaluationResult]) -> Average:
    """Return the average over runs that differ in their training seed, and its 95 % interval.

    It is the average success rate, or the mean return where the environments do not report success.
    The interval's bootstrap resamples seeds, tasks and episodes (`statistics.average`).

    Args:
        results: one result per seed. `stack` says which results can be averaged.

    Raises:
        UserError: there is no result, or two were measured by different protocols.
    """
    return average(stack(results))


def stack(results: Sequence[EvaluationResult]) -> np.ndarray:
    """Stack the successes of several runs, or returns where environments do not report success.

    Args:
        results: one result per run. Only checkpoint, target returns, backend and device may differ
            between their protocols.

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
    """Return the versions of Python, HarmoDT, PyTorch, NumPy and the simulator's `packages`."""
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
            f"the results differ in {', '.join(different)}: only results of one protocol can be "
            "averaged, so evaluate the runs in the same way"
        )


@dataclass(frozen=True)
class _Task:
    """The results of a task's episodes in a file; the task's other numbers follow from them."""

    task: str
    episode_returns: tuple[float, ...]
    episode_successes: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class _Content:
    """The entries of a file from which a result is built."""

    protocol: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    tasks: tuple[_Task, ...]


def _odd(content: _Content, protocol: Protocol) -> str | None:
    """Describe the first entry that contradicts the protocol, or return None."""
    if tuple(task.task for task in content.tasks) != protocol.tasks:
        return "the tasks of its results are not the tasks of its protocol"
    for task in content.tasks:
        if len(task.episode_returns) != protocol.episodes:
            return f"{task.task} has the returns of {len(task.episode_returns)} episodes"
        solves = task.episode_successes
        if (solves is None) != (protocol.success_rule is None):
            return f"the successes of {task.task} do not fit the protocol's success rule"
        if solves is not None and len(solves) != protocol.episodes:
            return f"{task.task} has the successes of {len(solves)} episodes"
    if len(protocol.target_returns) != len(protocol.tasks):
        return f"it has {len(protocol.target_returns)} target returns"
    return None


def _number(value: float) -> str:
    """Format a return; a return below 1000 gets one decimal."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Return the texts of a table's row, by heading."""
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
