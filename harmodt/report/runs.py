"""What a run's directory has for a page: all of it read, checked, and named."""

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
    """A run as it was found.

    Attributes:
        name: tells it from the others on the page.
        path: as it was given.
        description: of run.json.
        config: its settings.
        metrics: numbers over training, in their order; of an import there are none.
        costs: time and memory; a run of an earlier version has none.
        target_returns: what it asks for, by task.
        evaluations: all that are in its directory.
        measure: how the results that are compared were measured; None where there are none.
        compared: its results of that measure, on all its tasks and under its own masks, by step.
        masks: at its last checkpoint; None without masks or without a checkpoint.
        step: of its last checkpoint or its last metrics.
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
        """How one of its results was measured."""
        return result.protocol.measure(self.target_returns)

    @property
    def own_measure(self) -> Measure:
        """How it measures itself while it is trained."""
        request = Request(
            episodes=max(1, self.config.evaluation.evaluation_episodes),
            episode_length=self.description.episode_length,
        )
        return request.measure(self.description.environment["family"])

    @property
    def of_itself(self) -> list[EvaluationResult]:
        """Its results on all its tasks, under its own masks and with its own plans, by step."""
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
        """Steps and values of what the metrics have under a name."""
        return [(int(r["step"]), r[name]) for r in self.metrics if name in r]

    def by_layer(self, kind: str) -> list[tuple[int, dict[str, float]]]:
        """Steps and values by layer, or by task, of what mask updates log under KIND/LAYER."""
        found = []
        for record in self.metrics:
            of_layers = {n.partition("/")[2]: v for n, v in record.items() if n.startswith(kind)}
            if of_layers:
                found.append((int(record["step"]), of_layers))
        return found

    def seconds_at(self, step: int) -> float | None:
        """Seconds of training up to a step, as they stood at the first record from it on."""
        later = (record["seconds"] for record in self.costs if record["step"] >= step)
        return next(later, None)


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read runs.

    Raises:
        UserError: one is named twice, is no run, or is damaged.
    """
    absolute = [path.resolve() for path in paths]
    for path, place in zip(paths, absolute, strict=True):
        if absolute.count(place) > 1:
            raise UserError(f"{path} is named more than once: leave it out but once")
    names = map(printable, _distinct_names(absolute))
    runs = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    return [_compare(run, runs) for run in runs]


def _compare(run: ReportedRun, runs: Sequence[ReportedRun]) -> ReportedRun:
    """A run with the results that are compared: those of one measure for all of its family.

    Of several measures it is the one that most runs have, then the one of a run's own evaluations,
    then that of most episodes.
    """
    family = run.description.environment["family"]
    related = [other for other in runs if other.description.environment["family"] == family]
    having = Counter(m for other in related for m in {*map(other.measure_of, other.of_itself)})
    usual = {replace(other.own_measure, episodes=0) for other in related}

    def rank(measure: Measure) -> tuple[int, bool, int, str]:
        as_usual = replace(measure, episodes=0) in usual
        return having[measure], as_usual, measure.episodes, repr(measure)

    measure = max(having, key=rank, default=None)
    compared = [result for result in run.of_itself if run.measure_of(result) == measure]
    return replace(run, measure=measure, compared=compared)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many of those above as it takes to tell them apart."""
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
            active = policy.mask_bits[: len(policy.tasks)]  # the lowest level of soft masks
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
