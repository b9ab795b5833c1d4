"""Measure a trained policy in its environments: `python -m harmodt.evaluate RUN`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import load_policy
from .devices import prepare_cpu
from .environments.video import find_backend
from .errors import printable, run_command
from .progress import PlainConsole
from .rollout import Request, play
from .rundir import RunDirectory
from .settings import Whole, check, parse_arguments

_KERNELS = tyro.conf.create_mutex_group(required=False, title="kernels, by default the run's")


@dataclass(frozen=True)
class PolicyOptions:
    """By default the policy acts as it was trained.

    Raises:
        UserError: a number is outside its bounds.
    """

    checkpoint: Whole | None = None
    """Training step of the checkpoint; the last by default."""
    mask: Literal["task", "voted"] = "task"
    """Each task's own mask, or for all the one that an unseen task would get (Eq. 13)."""
    device: str | None = None
    """PyTorch device, such as cpu, cuda or cuda:1; by default the run's."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Precision of the matrix products (tf32: GPUs only); by default the run's."""
    fused: Annotated[bool, tyro.conf.FlagCreatePairsOff, _KERNELS] = False
    """Act with the fused kernels, whatever the run was trained with."""
    no_fused: Annotated[bool, tyro.conf.FlagCreatePairsOff, _KERNELS] = False
    """Act with plain PyTorch, whatever the run was trained with."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def fused_or_not(self) -> bool | None:
        """What was chosen; None follows the run."""
        return self.fused if self.fused or self.no_fused else None


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained policy in its environments."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    video: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a film of each task's first episode (needs harmodt[video] and off-screen OpenGL)."""
    episodes: tyro.conf.OmitArgPrefixes[Request] = field(default_factory=Request)
    """What is played."""
    policy: tyro.conf.OmitArgPrefixes[PolicyOptions] = field(default_factory=PolicyOptions)
    """What plays; by default as it was trained."""


def main() -> None:
    """The command line: print the table, write it as JSON and CSV into RUN/evaluation."""
    prepare_cpu()
    config: EvaluateConfig = parse_arguments(EvaluateConfig, prog="python -m harmodt.evaluate")
    options, console = config.policy, PlainConsole()
    if config.video:
        find_backend()
    policy = load_policy(
        config.run,
        options.checkpoint,
        device=options.device,
        fused=options.fused_or_not,
        precision=options.precision,
    )
    if options.mask == "voted":
        policy.use_voted_mask()
    directory = RunDirectory(config.run).evaluation
    result = play(
        policy,
        config.episodes,
        video_directory=directory if config.video else None,
        console=console,
    )
    path = result.save(directory)
    console.print(result.table())
    console.print(f"written to {printable(path)} and .csv", soft_wrap=True)
    if config.video:
        console.print(f"videos in {printable(path.with_suffix(''))}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
