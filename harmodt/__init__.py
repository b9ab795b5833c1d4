"""HarmoDT: one decision transformer for many tasks, with a learned weight mask for each task.

Commands: `python -m harmodt.collect`, `harmodt.data`, `harmodt.train`, `harmodt.evaluate`,
`harmodt.import_checkpoint`, `harmodt.report`, `harmodt.reproduce`.
In Python, `harmodt.load_policy(run)` loads the policy of a run.
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

# A command takes seconds to import PyTorch. During this time Ctrl-C ends it without a traceback.
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
    """Load the policy that a run has learned. It acts in many episodes at once.

    Args:
        run: the run's directory.
        checkpoint: the training step of the checkpoint; by default the last checkpoint.
        device, fused, precision: how the policy computes; by default as the run was trained.
        unseen: a `harmodt.algorithms.unseen.Unseen` with tasks that the run was not trained on. The
            policy acts on them and not on the run's own tasks.
        sampler: how MTDiff draws its plans, "ddpm" or "ddim"; by default as in the run's settings.
        sampling_steps: number of steps of ddim; by default as in the run's settings.

    Raises:
        UserError: the run, the checkpoint or the device does not exist; the checkpoint has another
            model size; the device lacks the requested fused kernels; the policy cannot act on the
            unseen tasks; or sampler and steps do not fit the algorithm.
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
