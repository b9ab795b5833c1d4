"""HarmoDT: one decision transformer for many tasks, with a learned weight mask for each.

Command lines: `python -m harmodt.collect`, `harmodt.data`, `harmodt.train`, `harmodt.evaluate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .policies.decision import Policy

__version__ = "0.1.0"


def load_policy(
    run: Path,
    checkpoint: int | None = None,
    *,
    device: str | None = None,
    fused: bool | None = None,
    precision: str | None = None,
) -> Policy:
    """Load a trained policy; what is None is as the run was trained.

    Args:
        run: the run's directory.
        checkpoint: training step of the weights; the last by default.
        device: PyTorch device.
        fused: whether to act with the fused kernels or with plain PyTorch.
        precision: of the matrix products: "fp32", "tf32" or "bf16".

    Raises:
        UserError: no such run, checkpoint or device, or it cannot compute as asked.
    """
    from .policies.decision import Policy
    from .training.checkpoint import read_run

    config = read_run(run)["config"]
    device = config["device"] if device is None else device
    fused = config["fused"] if fused is None else fused
    return Policy.load(run, checkpoint, device, fused, precision or config["precision"])
