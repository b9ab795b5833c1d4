"""Sentences that tell a person how to go on after a run has ended early."""

from __future__ import annotations

import shlex

from ..checkpoint import checkpoint_steps
from ..config import TrainConfig
from ..errors import UserError
from ..rundir import RunDirectory


def resume_command(directory: RunDirectory) -> str:
    """Return the command that resumes a run."""
    return f"python -m harmodt.train --resume {shlex.quote(str(directory.path))}"


def after_not_finite(
    what: str, directory: RunDirectory, config: TrainConfig, changed: bool
) -> UserError:
    """Return the error for a number that is NaN or infinite. Its text says what to do.

    Args:
        what: the beginning of the sentence, which says which number it is and where it occurred.
        directory: the run's directory.
        config: the run's settings.
        changed: whether an earlier step has changed the weights.
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
        f"{what}: go on {last} at a lower learning rate with {resume_command(directory)} "
        f"--learning-rate {rate:.2g}"
    )
