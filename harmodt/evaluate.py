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
    """How the policy acts; by default as it was trained.

    Raises:
        UserError: a number is outside its bounds.
    """

    checkpoint: Whole | None = None
    """Training step of the checkpoint; by default the last one."""
    unseen: Path | None = None
    """A store of unseen tasks, which the run was not trained on. The policy plays them in place of
    the run's tasks. It needs only their prompt episodes."""
    mask: tuple[Mask, ...] = ()
    """Mask of the policy. For the run's tasks: task (each task's own mask, the default) or voted
    (the mask of Eq. 13 for all tasks). For unseen tasks: voted (the default if the run has masks),
    none (no mask), random (a random mask as dense as the voted one) or nearest (the mask of the
    training task with the most similar gradient; each task's gradient is computed on its prompts).
    Several masks are compared in one table."""
    threshold: NotNegative | None = None
    """A weight is in the voted mask if more than this number of training tasks use it. A number
    below 1 is a share of the tasks. By default the run's threshold."""
    sampler: Sampler | None = None
    """How MTDiff draws its plans: with all steps of the diffusion (ddpm) or with some (ddim); by
    default the run's."""
    sampling_steps: Count | None = None
    """Number of steps with which ddim draws a plan; by default the run's."""
    device: str | None = None
    """PyTorch device, such as cpu, cuda or cuda:1; by default the run's."""
    precision: Literal["fp32", "tf32x3", "tf32", "bf16"] | None = None
    """Precision of the matrix products (tf32x3, tf32: GPUs only); by default the run's."""
    fused: Annotated[bool, tyro.conf.FlagCreatePairsOff, _KERNELS] = False
    """Act with the fused kernels, whatever the run was trained with."""
    no_fused: Annotated[bool, tyro.conf.FlagCreatePairsOff, _KERNELS] = False
    """Act with plain PyTorch, whatever the run was trained with."""

    def __post_init__(self) -> None:
        check(self)
        for_unseen = [mask for mask in self.mask if mask in ("none", "random", "nearest")]
        if for_unseen and self.unseen is None:
            raise UserError(
                f"--mask {for_unseen[0]} is for unseen tasks: name a store with --unseen"
            )
        if self.unseen is not None and "task" in self.mask:
            raise UserError("an unseen task has no mask of its own: leave task out of --mask")
        if self.threshold is not None and self.unseen is None:
            raise UserError("--threshold is for unseen tasks: name a store with --unseen")
        if self.threshold is not None and self.mask and not {"voted", "random"} & {*self.mask}:
            raise UserError(
                "--threshold is for the voted mask: add voted to --mask, or leave --threshold out"
            )

    @property
    def fused_or_not(self) -> bool | None:
        """Whether to act with the fused kernels; None follows the run."""
        return self.fused if self.fused or self.no_fused else None


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained policy in its environments."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    video: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a film of each task's first episode; this needs harmodt[video] and off-screen
    OpenGL."""
    output: Path | None = None
    """Folder for the result and the films; by default RUN/evaluation."""
    episodes: tyro.conf.OmitArgPrefixes[Request] = field(default_factory=Request)
    """The episodes that are played."""
    policy: tyro.conf.OmitArgPrefixes[PolicyOptions] = field(default_factory=PolicyOptions)
    """The policy that plays; by default it acts as it was trained."""


def main() -> None:
    """Run the command line: print the table, and write it as JSON and CSV."""
    prepare_cpu()
    config: EvaluateConfig = parse_arguments(EvaluateConfig, prog="python -m harmodt.evaluate")
    console = PlainConsole()
    if config.video:
        find_backend()
    masks = tuple(dict.fromkeys(config.policy.mask)) or (None,)
    # Load every policy before the first one plays, so that a wrong mask is refused at once.
    policies = [_load(config, mask) for mask in masks]
    results: list[EvaluationResult] = []
    paths: list[Path] = []
    try:
        for policy in policies:
            results.append(_play(config, policy, console))
            with _elsewhere():
                paths.append(results[-1].save(_output(config)))
    finally:  # show the results even if they could not be written
        if results:
            console.print(compare_masks(results) if len(masks) > 1 else results[0].table())
    for path in paths:
        console.print(f"written to {printable(path)} and .csv", soft_wrap=True)
        if config.video:
            console.print(f"videos in {printable(path.with_suffix(''))}", soft_wrap=True)


def _output(config: EvaluateConfig) -> Path:
    return config.output or RunDirectory(config.run).evaluation


def _elsewhere() -> AbstractContextManager[None]:
    return going_on("give the same command again, or name another --output")


def _play(config: EvaluateConfig, policy: Policy, console: PlainConsole) -> EvaluationResult:
    """Measure a policy.

    Raises:
        OSError: the output folder cannot be written. This is checked before anything is played.
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
    """Load the run's policy with a mask; None stands for the default mask."""
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
