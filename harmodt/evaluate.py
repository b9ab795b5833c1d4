"""Measure a trained policy in its environments: `python -m harmodt.evaluate RUN`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import load_policy
from .devices import prepare_cpu
from .environments.video import find_backend
from .errors import UserError, going_on, printable, run_command
from .files import check_writable
from .policies import Policy, Sampler
from .progress import PlainConsole
from .results import EvaluationResult, compare_masks
from .rollout import Request, play
from .rundir import RunDirectory
from .settings import Count, NotNegative, Whole, check, parse_arguments

Mask = Literal["task", "voted", "none", "random", "nearest"]

_KERNELS = tyro.conf.create_mutex_group(required=False, title="kernels, by default the run's")


@dataclass(frozen=True)
class PolicyOptions:
    """By default the policy acts as it was trained.

    Raises:
        UserError: a number is outside its bounds.
    """

    checkpoint: Whole | None = None
    """Training step of the checkpoint; the last by default."""
    unseen: Path | None = None
    """A store of tasks that were not trained on, to be met in place of the run's own: their prompt
    episodes are all that is read."""
    mask: tuple[Mask, ...] = ()
    """Each task's own mask (task, the default) or for all the one of Eq. 13 (voted). Unseen tasks:
    voted, the default where there are masks; none; random, as dense as the voted one; nearest, of
    the training task whose gradient on its prompts agrees most. Several are compared."""
    threshold: NotNegative | None = None
    """Of the voted mask: a share of the training tasks, or their number; by default the run's."""
    sampler: Sampler | None = None
    """How MTDiff's plans are drawn: through all steps of the diffusion (ddpm) or some (ddim); by
    default the run's."""
    sampling_steps: Count | None = None
    """Draw them in so many steps of ddim; by default as many as the run's."""
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
        of_unseen = [mask for mask in self.mask if mask in ("none", "random", "nearest")]
        if of_unseen and self.unseen is None:
            raise UserError(
                f"--mask {of_unseen[0]} is for unseen tasks: name a store with --unseen"
            )
        if self.unseen is not None and "task" in self.mask:
            raise UserError("an unseen task has no mask of its own: leave task out of --mask")
        if self.threshold is not None and self.unseen is None:
            raise UserError("--threshold is for unseen tasks: name a store with --unseen")
        if self.threshold is not None and self.mask and not {"voted", "random"} & {*self.mask}:
            raise UserError("--threshold is the voted mask's: add voted to --mask or leave it out")

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
    output: Path | None = None
    """Folder for the result and the films; by default RUN/evaluation."""
    episodes: tyro.conf.OmitArgPrefixes[Request] = field(default_factory=Request)
    """What is played."""
    policy: tyro.conf.OmitArgPrefixes[PolicyOptions] = field(default_factory=PolicyOptions)
    """What plays; by default as it was trained."""


def main() -> None:
    """The command line: print the table, write it as JSON and CSV."""
    prepare_cpu()
    config: EvaluateConfig = parse_arguments(EvaluateConfig, prog="python -m harmodt.evaluate")
    console = PlainConsole()
    if config.video:
        find_backend()
    masks = tuple(dict.fromkeys(config.policy.mask)) or (None,)
    # Every policy is loaded before the first one plays, so that a mask is refused at once.
    policies = [_load(config, mask) for mask in masks]
    results: list[EvaluationResult] = []
    paths: list[Path] = []
    try:
        for policy in policies:
            results.append(_play(config, policy, console))
            with _elsewhere():
                paths.append(results[-1].save(_output(config)))
    finally:  # what was played is shown, though it could not be written
        if results:
            console.print(compare_masks(results) if len(masks) > 1 else results[0].table())
    for path in paths:
        console.print(f"written to {printable(path)} and .csv", soft_wrap=True)
        if config.video:
            console.print(f"videos in {printable(path.with_suffix(''))}", soft_wrap=True)


def _output(config: EvaluateConfig) -> Path:
    return config.output or RunDirectory(config.run).evaluation


def _elsewhere() -> AbstractContextManager[None]:
    return going_on("(or with another --output) give the same command again")


def _play(config: EvaluateConfig, policy: Policy, console: PlainConsole) -> EvaluationResult:
    """Measure a policy.

    Raises:
        OSError: the result could not be written afterwards; nothing is played then.
    """
    request = config.episodes
    if request.episode_length is None:
        length = RunDirectory(config.run).read().episode_length
        request = replace(request, episode_length=length)
    directory = _output(config)
    with _elsewhere():
        check_writable(directory)
    films = directory if config.video else None
    return play(policy, request, video_directory=films, console=console)


def _load(config: EvaluateConfig, mask: Mask | None) -> Policy:
    """Load the run's policy under one of the masks, by default the run's own."""
    options, unseen = config.policy, None
    if options.unseen is not None:
        from .algorithms.unseen import Unseen  # imports PyTorch

        assert mask != "task"
        tasks, seed = config.episodes.tasks, config.episodes.seed
        unseen = Unseen(options.unseen, tasks, mask, options.threshold, seed)
    policy = load_policy(
        config.run,
        options.checkpoint,
        device=options.device,
        fused=options.fused_or_not,
        precision=options.precision,
        unseen=unseen,
        sampler=options.sampler,
        sampling_steps=options.sampling_steps,
    )
    if unseen is None and mask == "voted":
        policy.use_voted_mask()
    return policy


if __name__ == "__main__":
    run_command(main)
