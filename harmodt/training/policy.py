"""Loads the policy of a saved run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

from ..algorithms import find
from ..algorithms.unseen import Unseen, unseen_policy
from ..checkpoint import load_checkpoint
from ..config import Precision
from ..data.store import DataStore, TaskData
from ..devices import Execution
from ..environments import family
from ..errors import UserError
from ..policies import Policy, Sampler
from ..settings import change, check, settings
from .run import SavedRun


def load_policy(
    path: Path,
    checkpoint: int | None = None,
    *,
    device: str | None = None,
    fused: bool | None = None,
    precision: Precision | None = None,
    unseen: Unseen | None = None,
    sampler: Sampler | None = None,
    sampling_steps: int | None = None,
) -> Policy:
    """Load the policy of a run; `harmodt.load_policy` describes the arguments."""
    saved = _with_plans(SavedRun.open(path), sampler, sampling_steps)
    trained = saved.config.run
    execution = Execution.choose(
        trained.device if device is None else device,
        trained.fused if fused is None else fused,
        trained.precision if precision is None else precision,
        trained.graph,
    )
    setup = saved.setup(execution)
    state = load_checkpoint(saved.directory, checkpoint)
    if unseen is None:
        learner = find(saved.config.algorithm).learner(setup)
        learner.load(state)
        return learner.policy(state.step)
    return unseen_policy(setup, state, unseen, *_open_unseen(unseen, saved))


def _with_plans(saved: SavedRun, sampler: Sampler | None, steps: int | None) -> SavedRun:
    """Return the run with another sampler of MTDiff's plans; None keeps the run's own setting."""
    if sampler is None and steps is None:
        return saved
    if sampler not in (None, *get_args(Sampler)):
        raise UserError(f"sampler is {sampler!r}: give {' or '.join(get_args(Sampler))}")
    if sampler == "ddpm" and steps is not None:
        raise UserError("ddpm takes all steps of the diffusion: leave sampling_steps out")
    asked = {"sampler": sampler or "ddim"} | ({} if steps is None else {"sampling_steps": steps})
    if asked.keys() - dict(settings(saved.config)).keys():
        raise UserError(
            "the run's algorithm draws no plans: leave --sampler and --sampling-steps out"
        )
    config = change(saved.config, asked)
    check(config)
    return replace(saved, config=config)


def _open_unseen(unseen: Unseen, saved: SavedRun) -> tuple[list[TaskData], str]:
    """Return the data of the unseen tasks, and the checksum of their store.

    Raises:
        UserError: the store is damaged, lacks a task, or has other environments than the run. Only
            the version of the rewards may differ.
    """
    store = DataStore.open(unseen.store)
    ours, theirs = saved.environment.to_json(), store.environment.to_json()
    different = [
        f"{name} {theirs[name]} instead of {ours[name]}"
        for name in ours
        if name != "reward_version" and theirs[name] != ours[name]
    ]
    if different:
        raise UserError(
            f"{store.path} has other environments than the run ({', '.join(different)}): name a "
            "store of the run's environments"
        )
    found = family(saved.environment.family)
    names = found.resolve_tasks(unseen.tasks) if unseen.tasks else store.tasks
    tasks = [store.task(name) for name in names]
    store.verify(prompts_of=names)
    return tasks, store.checksum
