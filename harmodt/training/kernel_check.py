"""Compares the first steps of a run on new kernels with the same steps in plain PyTorch.

The kernels for GPUs have not run on a GPU yet. Until they have, every run on a GPU begins with this
check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harmodt_kernels import REFERENCE

from ..algorithms import Setup
from ..data.store import TaskData
from ..errors import UserError
from ..settings import change
from .trainer import build_learner

_STEPS = {"fp32": 6, "tf32x3": 1, "tf32": 1, "bf16": 1}
"""Number of steps that are compared, by precision. Six steps are enough to test a CUDA graph: the
first three steps run without it, the fourth is captured, and later ones are replayed. In the other
precisions the results differ too much after the first step."""

_TOLERANCE = {"fp32": 1e-3, "tf32x3": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
"""Largest allowed relative difference of a loss or a gradient norm, by precision."""


def has_new_kernels(setup: Setup) -> bool:
    """Tell whether a run computes with new kernels: the fused kernels for GPUs."""
    return setup.config.run.fused and setup.execution.device.type == "cuda"


def check_new_kernels(setup: Setup, data: Sequence[TaskData]) -> None:
    """Call `check_kernels` if the run computes with new kernels.

    Raises:
        UserError: a loss or a gradient norm differs.
    """
    if has_new_kernels(setup):
        check_kernels(setup, data)
        # The run's costs do not count the memory of this check.
        torch.cuda.reset_peak_memory_stats(setup.execution.device)


def check_kernels(setup: Setup, data: Sequence[TaskData]) -> None:
    """Take the first steps with the run's kernels and again in plain PyTorch, and compare them.

    The check runs in float32, and in the run's precision if that is another one. Both sides use the
    same weights, batches and dropout masks. The learning rate is at its peak from the first step
    on, so that the losses of the later steps also depend on the gradients and the optimiser.

    Raises:
        UserError: a loss or a gradient norm differs.
    """
    for precision in dict.fromkeys(("fp32", setup.execution.precision)):
        _compare(replace(setup, execution=replace(setup.execution, precision=precision)), data)


def _compare(setup: Setup, data: Sequence[TaskData]) -> None:
    execution, precision = setup.execution, setup.execution.precision
    config = change(setup.config, {"data_device": "cpu", "warmup_steps": 0})
    plain = replace(
        setup,
        config=change(config, {"fused": False}),
        execution=replace(execution, backend=REFERENCE, graph=False),
    )
    found = _first_steps(replace(setup, config=config), data)
    expected = _first_steps(plain, data)
    close = torch.isclose(found, expected, rtol=_TOLERANCE[precision], atol=0.0, equal_nan=True)
    if not bool(close.all()):
        step, place = (~close).nonzero()[0].tolist()
        what = "gradient norm" if place == found.shape[1] - 1 else "loss"
        raise UserError(
            f"the {execution.backend.name} kernels on {execution.device} compute a {what} of "
            f"{found[step, place]:.6g} in step {step + 1} ({precision}), where plain PyTorch "
            f"computes {expected[step, place]:.6g}: train with --no-fused, and please report it"
        )


def _first_steps(setup: Setup, data: Sequence[TaskData]) -> Tensor:
    """Return the losses and the gradient norm of the first S steps, float64 [S, G + 1], on the CPU.

    G is the number of tasks in a step.
    """
    learner, steps = build_learner(setup, data), _STEPS[setup.execution.precision]
    results = [learner.train_step(step) for step in range(1, steps + 1)]
    rows = [torch.cat((result.losses, result.gradient_norm[None])) for result in results]
    return torch.stack(rows).double().cpu()
