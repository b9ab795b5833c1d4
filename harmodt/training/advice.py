"""What a person can do when a run ends early: the sentences that name the next command."""

from __future__ import annotations

import shlex

from ..checkpoint import checkpoint_steps
from ..config import TrainConfig
from ..errors import UserError
from ..rundir import RunDirectory


def resume_command(directory: RunDirectory) -> str:
    """The command that goes on with a run."""
    return f"python -m harmodt.train --resume {shlex.quote(str(directory.path))}"


def after_not_finite(
    what: str, directory: RunDirectory, config: TrainConfig, changed: bool
) -> UserError:
    """The error for a number that is NaN or infinite, with what to do about it.

    Args:
        what: the first part of the sentence: which number, and where.
        directory, config: of the run.
        changed: whether a step had changed the weights before.
    """
    if not changed:
        store = shlex.quote(str(config.data.data))
        return UserError(
            f"{what}, before any weight was changed: look at the data with python -m harmodt.data "
            f"info {store}"
        )
    steps = checkpoint_steps(directory)
    last = (
        f"from the last good checkpoint, {directory.checkpoint(steps[-1])},"
        if steps
        else "from the start"
    )
    rate = config.optimisation.learning_rate / 3
    return UserError(
        f"{what}: go on {last} at a lower rate with {resume_command(directory)} --learning-rate "
        f"{rate:.2g}"
    )
