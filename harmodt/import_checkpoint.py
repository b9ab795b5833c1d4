"""Turns a checkpoint of the HarmoDT authors' code into a run.

python -m harmodt.import_checkpoint FILE --data STORE --output RUN
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .algorithms import preset
from .algorithms.harmodt import RandomMaskLearner
from .checkpoint import Checkpoint, save_checkpoint
from .config import SIZES, ModelSize, TrainConfig
from .data.store import DataStore
from .devices import prepare_cpu
from .environments import family
from .errors import UserError, printable, run_command
from .files import owned
from .progress import PlainConsole
from .rundir import RunDirectory
from .settings import Count, Positive, change, check, parse_arguments, to_json
from .training.authors import AuthorsCheckpoint
from .training.run import begin
from .training.trainer import Trainer

_PRESET = "paper"


@dataclass(frozen=True)
class ImportCheckpointConfig:
    """Turn a checkpoint of the HarmoDT authors' code into a run, for harmodt.evaluate.

    Their file has only weights and masks. Normalisation, prompts and target returns come from a
    store of the same tasks. The settings here give the sizes that the weights do not show.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """The file that their code saved: model_iter_<steps>."""
    data: Path
    """A store of the same tasks, made by harmodt.data import or harmodt.collect."""
    output: Path
    """Directory of the run."""
    tasks: tuple[str, ...] = ()
    """The tasks of the file's masks, in the order of the masks; by default the names in the
    file."""
    algorithm: Literal["harmodt-f", "harmodt-m", "harmodt-r"] = "harmodt-f"
    """The algorithm that the checkpoint was trained with."""
    step: Count | None = None
    """Number of training steps done; by default the number at the end of the file's name."""
    heads: ModelSize | None = None
    """Number of attention heads; by default the number in the paper's Table 3 for this number of
    blocks."""
    context_length: ModelSize = 20
    """K, the number of steps of history."""
    prompt_length: ModelSize = 5
    """K*, the number of steps of the prompt."""
    target_return: float | None = None
    """Return that the policy aims at in evaluation (the authors use 4500); by default the best
    return in each task's data."""
    deviation_floor: Positive = 1e-6
    """Smallest deviation by which an observation is divided; the default is the authors' value."""


def import_checkpoint(config: ImportCheckpointConfig) -> AuthorsCheckpoint:
    """Write the run's directory, whole or not at all; return the content of the file.

    Raises:
        UserError: the file cannot be used, or it does not fit the store or the settings, or the
            directory is not empty.
    """
    check(config)
    found = AuthorsCheckpoint.read(config.file)
    store = DataStore.open(config.data)
    tasks = _tasks(config, found, store)
    settings = _settings(config, found)
    check(settings)
    with owned(config.output):
        made, final = RunDirectory(config.output / ".import"), RunDirectory(config.output)
        # If an earlier import was killed between the moves below, delete its checkpoints.
        if made.path.exists() and not final.description.exists():
            shutil.rmtree(final.checkpoints, ignore_errors=True)
        shutil.rmtree(made.path, ignore_errors=True)
        final.check_empty()
        try:
            _write(config, found, begin(made.path, _PRESET, settings, store, tasks))
            os.rename(made.conditioning, final.conditioning)
            os.rename(made.checkpoints, final.checkpoints)
            # This is the last move, because run.json makes the directory a run.
            os.rename(made.description, final.description)
        finally:
            shutil.rmtree(made.path, ignore_errors=True)
    return found


def _tasks(
    config: ImportCheckpointConfig, found: AuthorsCheckpoint, store: DataStore
) -> tuple[str, ...]:
    """Return the task of each mask in the file, as the store names it."""
    names = config.tasks or tuple(found.masks)
    tasks = family(store.environment.family).resolve_tasks(names)
    if len(tasks) != len(found.masks):
        raise UserError(
            f"{config.file} has masks for {len(found.masks)} tasks, {', '.join(found.masks)}, but "
            f"{len(tasks)} tasks are named: name each task with --tasks, in this order"
        )
    return tasks


def _settings(config: ImportCheckpointConfig, found: AuthorsCheckpoint) -> TrainConfig:
    """Return the run's settings. The paper preset sets what the file and the command do not say."""
    embed_dim, layers, max_timesteps = found.shape
    heads = config.heads or {size[1]: size[2] for size in SIZES.values()}.get(layers)
    if heads is None:
        raise UserError(
            f"{config.file} has {layers} blocks and does not say how many heads they have: give "
            "--heads"
        )
    numbered = re.search(r"([0-9]{1,8})$", config.file.name)
    step = config.step or (int(numbered[1]) if numbered else 0)
    if not step:
        raise UserError(
            f"the name of {config.file} does not end in a number of training steps: give --step"
        )
    changes = {
        "embed_dim": embed_dim,
        "layers": layers,
        "heads": heads,
        "max_timesteps": max_timesteps,
        "steps": step,
        "data": config.data,
        "context_length": config.context_length,
        "prompt_length": config.prompt_length,
        "target_return": config.target_return,
        "deviation_floor": config.deviation_floor,
    }
    return change(preset(_PRESET, config.algorithm), changes)


def _write(config: ImportCheckpointConfig, found: AuthorsCheckpoint, run: Trainer) -> None:
    """Load weights and masks into a new run, and write its checkpoint."""
    learner = run.learner
    assert isinstance(learner, RandomMaskLearner)
    tensors = learner.tensors() | found.tensors(learner.vector)
    run.load(Checkpoint(config.file, run.steps, tensors))
    places = {"output": config.output.absolute(), "data": config.data.absolute()}
    run.directory.update(
        {
            "config": to_json(change(run.setup.config, places)),
            **learner.describe(),  # counts the active weights of the imported masks
            "imported": str(config.file.absolute()),
        }
    )
    save_checkpoint(run.directory, run.step, learner.tensors())


def main() -> None:
    """Run the command line: write the run, and name the weights that were left out."""
    prepare_cpu()
    config: ImportCheckpointConfig = parse_arguments(
        ImportCheckpointConfig, prog="python -m harmodt.import_checkpoint"
    )
    found, console = import_checkpoint(config), PlainConsole()
    if found.unused:
        names = printable(", ".join(found.unused))
        console.print(f"left out, because a policy does not use them: {names}", soft_wrap=True)
    count = len(found.masks)
    console.print(
        f"{count} task{'s'[: count > 1]} written to {printable(config.output)}: measure the run "
        f"with python -m harmodt.evaluate {printable(config.output)}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(main)
