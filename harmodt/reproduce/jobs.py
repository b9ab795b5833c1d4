"""Turns a plan into jobs, and tells which jobs are done. Each job is a command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint import checkpoint_steps
from ..data.inputs import own_targets, unseen_target
from ..data.store import MANIFEST, DataStore
from ..errors import UserError
from ..results import EvaluationResult, Measure, find_results, plans_as_trained
from ..rollout import Request
from ..rundir import Description, RunDirectory
from ..settings import settings, to_json
from ..training.records import read_records
from .plan import Collection, Plan, Question, Run

_LEFT_OPEN = ("data", "output")
"""Settings that hold paths. They do not change a run's result."""


@dataclass(frozen=True)
class Folder:
    """The folder of a budget, which holds data/, runs/, logs/ and the tables."""

    path: Path

    def data(self, collection: Collection) -> Path:
        """Return the path of a store."""
        return self.path / "data" / collection.name

    def run(self, run: Run) -> RunDirectory:
        """Return a run's directory."""
        return RunDirectory(self.path / "runs" / run.name)

    @property
    def logs(self) -> Path:
        """The folder of the jobs' logs."""
        return self.path / "logs"

    def log(self, job: str) -> Path:
        """Return the file with the output of a job."""
        return self.logs / f"{job}.log"


class Job(Protocol):
    """A command that produces a result. After an interruption, the command is given again.

    Attributes:
        name: the name of the job and of its log.
        needs: the names of the jobs that must be done before this one.
        directory: the directory that the command writes.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def directory(self) -> Path: ...

    def is_done(self) -> bool:
        """Tell whether the job's result is there.

        Raises:
            UserError: the directory holds something else, or the result is damaged.
        """

    def words(self) -> list[str]:
        """Return the words after `python -m` that begin the job or go on with it."""


@dataclass(frozen=True)
class Collect:
    """Collects a store. A store that was imported from other data is used without changes."""

    folder: Folder
    collection: Collection
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"data-{self.collection.name}"

    @property
    def directory(self) -> Path:
        return self.folder.data(self.collection)

    def is_done(self) -> bool:
        if not (self.directory / MANIFEST).exists():
            return False
        store, wanted = DataStore.open(self.directory), self.collection.wanted
        missing = [task for task in self.collection.tasks if task not in store.tasks]
        if missing:
            raise UserError(
                f"the store {self.directory} lacks {', '.join(missing)}: move it away, or name "
                "another --output"
            )
        # An imported store has no entry "collect", so none of its settings is refused.
        made = store.provenance.get("collect", wanted)
        for name in wanted:
            there = made.get(name)
            same = there == wanted[name]
            if isinstance(wanted[name], list) and isinstance(there, list):
                same = sorted(there) == sorted(wanted[name])  # the order of tasks does not matter
            if not same:
                raise UserError(
                    f"the store {self.directory} has {name} = {there} instead of "
                    f"{wanted[name]}: move it away, or name another --output"
                )
        return True

    def words(self) -> list[str]:
        words = ["harmodt.collect", "--output", str(self.directory)]
        for name, value in self.collection.wanted.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return words


@dataclass(frozen=True)
class Train:
    """Trains a run to its last step and evaluates it; resumes the run if it was begun."""

    folder: Folder
    run: Run

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def needs(self) -> tuple[str, ...]:
        return (Collect(self.folder, self.run.collection).name,)

    @property
    def directory(self) -> Path:
        return self.folder.run(self.run).path

    @property
    def step(self) -> int | None:
        """The step of the last checkpoint, 0 without checkpoints; None if the run was not begun.

        Raises:
            UserError: the run has other settings, or the directory holds something else.
        """
        directory = self.folder.run(self.run)
        if not directory.description.exists():
            directory.check_empty()
            return None
        self._check(directory.read())
        return max(checkpoint_steps(directory), default=0)

    def is_done(self) -> bool:
        if self.step != self.run.steps:
            return False
        episodes = self.run.config.evaluation.evaluation_episodes
        question = Question(self.run.tasks, episodes)
        return not episodes or find_result(self.folder, self.run, question) is not None

    def words(self) -> list[str]:
        data = ["--data", str(self.folder.data(self.run.collection))]
        if self._is_evaluated:  # its result is missing, so make it again
            episodes = self.run.config.evaluation.evaluation_episodes
            return ["harmodt.evaluate", str(self.directory), "--episodes", str(episodes)]
        if self.folder.run(self.run).description.exists():
            return ["harmodt.train", "--resume", str(self.directory), *data]
        begin = ["harmodt.train", "--preset", self.run.preset]
        begin += ["--algorithm", self.run.config.algorithm, *data, *self.run.flags]
        return [*begin, "--output", str(self.directory)]

    @property
    def _is_evaluated(self) -> bool:
        """Whether the run's metrics record its last evaluation."""
        if self.step != self.run.steps:
            return False
        records = read_records(self.folder.run(self.run).metrics, timed=False)
        return any(r["step"] == self.run.steps and "mean_return" in r for r in records)

    def _check(self, found: Description) -> None:
        """Raise UserError if the run has other settings than the plan."""
        changed = {change["setting"] for change in found.changes}
        wanted, there = dict(_leaves(to_json(self.run.config))), dict(_leaves(found.config))
        for name, value in wanted.items():
            if name in _LEFT_OPEN or name in changed or there.get(name) == value:
                continue
            raise UserError(
                f"the run {self.directory} was trained with {name} = {there.get(name)} instead of "
                f"{value}: move it away, or name another --output"
            )


@dataclass(frozen=True)
class Evaluate:
    """Evaluates a run on more episodes than during training, or on unseen tasks."""

    folder: Folder
    run: Run
    question: Question

    @property
    def name(self) -> str:
        mask = self.question.mask
        return f"{self.run.name}-{'final' if mask is None else f'unseen-{mask}'}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.run.name,)

    @property
    def directory(self) -> Path:
        return self.folder.run(self.run).path

    def is_done(self) -> bool:
        done = Train(self.folder, self.run).is_done()
        return done and find_result(self.folder, self.run, self.question) is not None

    def words(self) -> list[str]:
        store, question = self.folder.data(self.run.collection), self.question
        words = ["harmodt.evaluate", str(self.directory), "--episodes", str(question.episodes)]
        if question.mask is None:
            return words
        words += ["--unseen", str(store), "--tasks", *question.tasks]
        return [*words, "--mask", str(question.mask)]


def jobs_of(plan: Plan, folder: Folder) -> list[Job]:
    """Return all jobs of a plan, each once, in the order in which they should begin."""
    jobs: list[Job] = [Collect(folder, collection) for collection in plan.collections]
    for run in plan.runs:
        jobs.append(Train(folder, run))
        # Training itself makes this evaluation.
        answered = Question(run.tasks, run.config.evaluation.evaluation_episodes)
        asked = dict.fromkeys(cell.question for cell in plan.cells if run in cell.runs)
        jobs += [Evaluate(folder, run, question) for question in asked if question != answered]
    return jobs


def find_result(folder: Folder, run: Run, question: Question) -> EvaluationResult | None:
    """Return the result of a run's last checkpoint with the default measure; None without one.

    Raises:
        UserError: an evaluation is damaged, or there are two such results.
    """
    results = _results(folder, run, question)
    if not results:
        return None
    measure, own = _measure(folder, run, question)
    found = [path for path, result in results.items() if result.protocol.measure(own) == measure]
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(path.name for path in found)} in {found[0].parent} are evaluations of "
            "the same last step: move all but one away"
        )
    return results[found[0]] if found else None


def left_out(folder: Folder, run: Run, question: Question) -> list[str]:
    """Describe the measures of the results that `find_result` leaves out."""
    results = _results(folder, run, question)
    if not results:
        return []
    measure, own = _measure(folder, run, question)
    others = (result.protocol.measure(own) for result in results.values())
    return [", ".join(measure.differences(other)) for other in others if other != measure]


def _results(folder: Folder, run: Run, question: Question) -> dict[Path, EvaluationResult]:
    """Return all results of a run's last step on the question's tasks with its mask, by path.

    They may have any measure.
    """
    masks = {"task", "none"} if question.mask is None else {question.mask}
    trained, found = dict(settings(run.config)), {}
    pattern = f"step-{run.steps}-*-{len(question.tasks)}x*"
    for path in find_results(folder.run(run).evaluation, pattern):
        result = EvaluationResult.load(path)
        protocol = result.protocol
        same_policy = protocol.mask in masks and plans_as_trained(protocol.plans, trained)
        same_kind = (protocol.unseen is not None) == (question.mask is not None)
        if same_policy and same_kind and protocol.tasks == question.tasks:
            found[path] = result
    return found


def _measure(folder: Folder, run: Run, question: Question) -> tuple[Measure, dict[str, float]]:
    """Return the measure of a question's results, and the target return of each task."""
    directory = folder.run(run)
    description = directory.read()
    request = Request(episodes=question.episodes, episode_length=description.episode_length)
    measure = request.measure(description.environment["family"])
    if question.mask is None:
        return measure, own_targets(directory)
    store = DataStore.open(folder.data(run.collection))
    tasks = {name: store.task(name) for name in question.tasks}
    targets = {name: unseen_target(task, run.config) for name, task in tasks.items()}
    return replace(measure, unseen=store.checksum), targets


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the JSON value of every setting, in groups at any depth."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield name, list(value) if isinstance(value, tuple) else value
