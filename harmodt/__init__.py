"""HarmoDT: one decision transformer for many tasks, with a learned weight mask for each.

Command lines: `python -m harmodt.collect`, `harmodt.data`, `harmodt.train`, `harmodt.evaluate`,
`harmodt.import_checkpoint`, `harmodt.report`, `harmodt.reproduce`.
From Python, `harmodt.load_policy(run)` is what a run has learned.
"""

from __future__ import annotations

import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .algorithms.unseen import Unseen
    from .config import Precision
    from .policies import Policy, Sampler

__version__ = "0.1.0"

# A command imports PyTorch for seconds: until it begins, Ctrl-C just ends it, without a traceback.
if (
    any(flag == "-m" and module.startswith("harmodt.") for flag, module in pairwise(sys.orig_argv))
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load_policy(
    run: Path | str,
    checkpoint: int | None = None,
    *,
    device: str | None = None,
    fused: bool | None = None,
    precision: Precision | None = None,
    unseen: Unseen | None = None,
    sampler: Sampler | None = None,
    sampling_steps: int | None = None,
) -> Policy:
    """What a run has learned, as a policy that acts in many episodes at once.

    Args:
        run: the run's directory.
        checkpoint: training step, the last by default.
        device, fused, precision: as the run was trained where they are None.
        unseen: tasks that it was not trained on, to act on them in place of its own: a
            `harmodt.algorithms.unseen.Unseen`.
        sampler: how MTDiff's plans are drawn, "ddpm" or "ddim", by default as the run's settings
            say.
        sampling_steps: of ddim.

    Raises:
        UserError: no such run, checkpoint or device, a checkpoint of another model size, no fused
            kernels for the device although they are asked for, unseen tasks that cannot be met, or
            plans of an algorithm that makes none, in an unknown way, or in other steps than it has.
    """
    from .training.policy import load_policy  # imports PyTorch

    return load_policy(
        Path(run),
        checkpoint,
        device=device,
        fused=fused,
        precision=precision,
        unseen=unseen,
        sampler=sampler,
        sampling_steps=sampling_steps,
    )
