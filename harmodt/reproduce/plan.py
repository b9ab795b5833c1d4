"""Makes the plan of an experiment at a budget: its collections of data and its runs.

The name of a collection or a run depends only on its own settings. Experiments that use the same
folder therefore share the collections and runs that they have in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..algorithms import config_from_json, preset
from ..config import TrainConfig
from ..environments import EnvironmentFamily, family_of
from ..settings import change, check, settings, to_json
from .experiments import BUDGETS, EXPERIMENTS, Budget, Column, Experiment, Times, Variant


@dataclass(frozen=True)
class Collection:
    """Data that runs train on.

    Attributes:
        name: the name of the store.
        tasks: all tasks of the store.
        wanted: the settings of `harmodt.collect`, by name.
    """

    name: str
    tasks: tuple[str, ...]
    wanted: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: the name of the run's directory.
        preset: the preset on which the settings are based.
        config: the settings, without the paths of the data and of the run's directory.
        collection: the data.
        tasks: the tasks that the run trains on.
    """

    name: str
    preset: str
    config: TrainConfig
    collection: Collection
    tasks: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        return self.config.optimisation.steps

    @property
    def flags(self) -> list[str]:
        """The settings that differ from the preset's, as arguments of `harmodt.train`."""
        default = dict(settings(preset(self.preset, self.config.algorithm)))
        changed = {n: value for n, value in settings(self.config) if value != default[n]}
        return [word for name, value in changed.items() for word in _flag(name, value)]


@dataclass(frozen=True)
class Question:
    """An evaluation that a trained run needs.

    Attributes:
        tasks: the tasks to play.
        episodes: the number of episodes per task.
        mask: the mask for unseen tasks; None if the run was trained on the tasks.
    """

    tasks: tuple[str, ...]
    episodes: int
    mask: str | None = None


@dataclass(frozen=True)
class Cell:
    """A variant on a column: one run for each seed, and the evaluation of each run."""

    column: Column
    variant: Variant
    runs: tuple[Run, ...]
    question: Question


@dataclass(frozen=True)
class Plan:
    """An experiment at a budget, divided into cells."""

    name: str
    experiment: Experiment
    budget_name: str
    budget: Budget
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def table_name(self) -> str:
        """The name of the table's files. If another reference was chosen than the experiment's, the
        name contains it."""
        if self.experiment.reference == EXPERIMENTS[self.name].reference:
            return self.name
        words = re.findall(r"\w+", self.experiment.reference.lower())
        return "-".join([self.name, "minus", *words])

    @property
    def collections(self) -> tuple[Collection, ...]:
        """All collections that the runs need, each once."""
        found = {run.collection.name: run.collection for cell in self.cells for run in cell.runs}
        return tuple(found.values())

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, each once. The first seed of every cell comes before all second seeds."""
        by_seed = zip(*(cell.runs for cell in self.cells), strict=True)
        return tuple({run.name: run for runs in by_seed for run in runs}.values())


def make_plan(
    name: str, budget_name: str, seeds: Sequence[int] = (), reference: str | None = None
) -> Plan:
    """Return the plan of an experiment.

    Args:
        name: the experiment's name in `EXPERIMENTS`.
        budget_name: the budget's name in `BUDGETS`.
        seeds: seeds of training, in place of the budget's seeds.
        reference: the name of a variant, in place of the experiment's reference.

    Raises:
        ValueError: a definition names an unknown algorithm or setting.
    """
    experiment, budget = EXPERIMENTS[name], BUDGETS[budget_name]
    if reference is not None:
        experiment = replace(experiment, reference=reference)
    chosen = tuple(dict.fromkeys(seeds)) or budget.seeds
    cells = tuple(
        _cell(budget, column, variant, chosen)
        for column in experiment.columns
        for variant in experiment.variants
    )
    return Plan(name, experiment, budget_name, budget, chosen, cells)


def _cell(budget: Budget, column: Column, variant: Variant, seeds: Sequence[int]) -> Cell:
    runs = _runs(budget, column, variant, seeds)
    in_training = runs[0].config.evaluation.evaluation_episodes
    question = Question(runs[0].tasks, budget.final_episodes or in_training)
    if column.unseen:
        tasks = _first(budget, family_of([column.tasks]), column.unseen)
        question = Question(tasks, budget.unseen_episodes, variant.mask or "none")
    return Cell(column, variant, runs, question)


def _runs(
    budget: Budget, column: Column, variant: Variant, seeds: Sequence[int]
) -> tuple[Run, ...]:
    """Return the runs of a cell, which differ only in their seeds."""
    tasks = _first(budget, family_of([column.tasks]), column.tasks)
    base = _base(budget, column, variant, tasks)
    values = dict(settings(base))
    shared = {name: value for name, value in column.settings.items() if name in values}
    chosen = {
        name: _times(value, values) if isinstance(value, Times) else value
        for name, value in {**shared, **variant.settings}.items()
    }
    unknown = chosen.keys() - values.keys()
    if unknown:
        raise ValueError(f"{variant.name}: {variant.algorithm} has no {', '.join(unknown)}")
    if "tasks_per_step" in chosen:
        chosen["tasks_per_step"] = min(chosen["tasks_per_step"], len(tasks))
    config = change(base, chosen)
    differing = [f"{name}-{_text(v)}" for name, v in chosen.items() if v != values[name]]
    name = "-".join([column.tasks, column.composition, variant.algorithm, *differing])
    config_from_json(json.loads(json.dumps(to_json(config))), name)  # checks the types
    check(config)
    collection = _collection(budget, column)
    return tuple(
        Run(f"{name}-seed-{seed}", budget.preset, change(config, {"seed": seed}), collection, tasks)
        for seed in seeds
    )


def _base(budget: Budget, column: Column, variant: Variant, tasks: tuple[str, ...]) -> TrainConfig:
    """Return the budget's settings of a run, before column and variant change any of them."""
    steps = budget.steps(len(tasks))
    values: dict[str, Any] = {
        "tasks": (column.tasks,) if budget.tasks is None else tasks,
        "tasks_per_step": min(budget.tasks_per_step, len(tasks)),
        "steps": steps,
        "mask_update_every": max(1, steps // budget.mask_updates),
        **budget.settings,
    }
    if column.unseen:
        values["evaluation_episodes"] = 0
    return change(preset(budget.preset, variant.algorithm), values)


def _collection(budget: Budget, column: Column) -> Collection:
    """Return the data of all tasks of a family at this budget, not only of the column's tasks."""
    found = family_of([column.tasks])
    tasks = dict.fromkeys(t for name in found.task_sets for t in _first(budget, found, name))
    wanted = {
        "tasks": list(tasks),
        "episodes": budget.episodes[column.composition],
        "prompt_episodes": budget.prompt_episodes,
        "composition": column.composition,
        "episode_length": budget.episode_length or found.spec.episode_length,
        "seed": 0,
    }
    return Collection(f"{found.spec.family}-{column.composition}", tuple(tasks), wanted)


def _first(budget: Budget, family: EnvironmentFamily, name: str) -> tuple[str, ...]:
    """Return the tasks of a set that the budget includes."""
    return family.resolve_tasks([name])[: budget.tasks]


def _times(times: Times, values: Mapping[str, Any]) -> int:
    return max(1, round(times.factor * values[times.setting]))


def _text(value: Any) -> str:
    """Return the value of a setting as part of a name."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flag(name: str, value: Any) -> list[str]:
    """Return a setting as words of a command."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
