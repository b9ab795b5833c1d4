"""Reads and checks the directories of runs for a page, and gives each run a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..algorithms import config_from_json
from ..checkpoint import checkpoint_steps
from ..config import TrainConfig
from ..data.inputs import own_targets
from ..errors import UserError, printable
from ..policies.decision import DecisionPolicy
from ..results import EvaluationResult, Measure, find_results, plans_as_trained
from ..rollout import Request
from ..rundir import Description, RunDirectory
from ..settings import settings
from ..training.policy import load_policy
from ..training.records import Record, read_records
from .masks import Masks


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a run's directory.

    Attributes:
        name: a name that no other run on the page has.
        path: the directory, as the person named it.
        description: the content of run.json.
        config: the settings.
        metrics: the metrics of training, in their order; empty for an imported checkpoint.
        costs: time and memory; empty for a run of an earlier version.
        target_returns: the target return of each task.
        evaluations: all evaluations in the directory.
        measure: the measure of the results that are compared; None if there are no such results.
        compared: the run's results with that measure, on all its tasks and with its own masks,
            sorted by step.
        masks: the masks of the last checkpoint; None without masks or without a checkpoint.
        step: the step of the last checkpoint or of the last metrics, whichever is later.
    """

    name: str
    path: Path
    description: Description
    config: TrainConfig
    metrics: Sequence[Record]
    costs: Sequence[Record]
    target_returns: Mapping[str, float]
    evaluations: Sequence[EvaluationResult]
    masks: Masks | None
    step: int
    measure: Measure | None = None
    compared: Sequence[EvaluationResult] = ()

    def measure_of(self, result: EvaluationResult) -> Measure:
        """Return the measure of one of the run's results."""
        return result.protocol.measure(self.target_returns)

    @property
    def own_measure(self) -> Measure:
        """The measure of the evaluations during training."""
        request = Request(
            episodes=max(1, self.config.evaluation.evaluation_episodes),
            episode_length=self.description.episode_length,
        )
        return request.measure(self.description.environment["family"])

    @property
    def of_itself(self) -> list[EvaluationResult]:
        """The results on all tasks of the run, with its own masks and plans, sorted by step."""
        trained = dict(settings(self.config))
        found = [
            result
            for result in self.evaluations
            if result.protocol.unseen is None
            and result.protocol.mask in ("task", "none")
            and set(result.protocol.tasks) == set(self.description.tasks)
            and plans_as_trained(result.protocol.plans, trained)
        ]
        return sorted(found, key=lambda result: result.protocol.checkpoint)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and values of the metric with this name."""
        return [(int(r["step"]), r[name]) for r in self.metrics if name in r]

    def by_layer(self, kind: str) -> list[tuple[int, dict[str, float]]]:
        """Return the steps and the values by layer (or task) that mask updates log as KIND/LAYER.

        Args:
            kind: KIND with the slash.
        """
        found = []
        for record in self.metrics:
            values = {n.partition("/")[2]: v for n, v in record.items() if n.startswith(kind)}
            if values:
                found.append((int(record["step"]), values))
        return found

    def seconds_at(self, step: int) -> float | None:
        """Return the seconds of training in the first record at or after a step."""
        later = (record["seconds"] for record in self.costs if record["step"] >= step)
        return next(later, None)


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read runs.

    Raises:
        UserError: a path is named twice or holds no run, or a run is damaged.
    """
    absolute = [path.resolve() for path in paths]
    for path, place in zip(paths, absolute, strict=True):
        if absolute.count(place) > 1:
            raise UserError(f"{path} is named more than once: name it only once")
    names = map(printable, _distinct_names(absolute))
    runs = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    return [_compare(run, runs) for run in runs]


def _compare(run: ReportedRun, runs: Sequence[ReportedRun]) -> ReportedRun:
    """Return the run with its measure and with the results that have this measure.

    All runs of a family get the same measure: the one with which the most runs have results. If
    there are several, a measure of evaluations during training comes first, whatever its number of
    episodes, and then the one with the most episodes.
    """
    family = run.description.environment["family"]
    related = [other for other in runs if other.description.environment["family"] == family]
    counts = Counter(m for other in related for m in {*map(other.measure_of, other.of_itself)})
    usual = {replace(other.own_measure, episodes=0) for other in related}

    def rank(measure: Measure) -> tuple[int, bool, int, str]:
        is_usual = replace(measure, episodes=0) in usual
        return counts[measure], is_usual, measure.episodes, repr(measure)

    measure = max(counts, key=rank, default=None)
    compared = [result for result in run.of_itself if run.measure_of(result) == measure]
    return replace(run, measure=measure, compared=compared)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the directories' names. Equal names get the names of parent directories as prefix."""
    names: list[str] = []
    for path in paths:
        others = [other for other in paths if other != path]
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names


def _read_run(path: Path, name: str) -> ReportedRun:
    directory = RunDirectory(path)
    description = directory.read()
    config = config_from_json(description.config, f"config in {directory.description}")
    metrics = read_records(directory.metrics, timed=False)
    masks, steps = None, checkpoint_steps(directory)
    if steps:
        policy = load_policy(path, device="cpu", fused=False, precision="fp32")
        if isinstance(policy, DecisionPolicy) and policy.mask_bits is not None:
            active = policy.mask_bits[: len(policy.tasks)]  # of soft masks, the values above 0
            masks = Masks.measure(policy.tasks, policy.model.vector, active)
    last = int(metrics[-1]["step"]) if metrics else 0
    return ReportedRun(
        name=name,
        path=path,
        description=description,
        config=config,
        metrics=metrics,
        costs=read_records(directory.costs, timed=True),
        target_returns=own_targets(directory),
        evaluations=[
            EvaluationResult.load(file) for file in find_results(directory.evaluation, "step-*")
        ],
        masks=masks,
        step=max(last, *steps) if steps else last,
    )
