"""All settings of a training run with their bounds, in groups, and the presets.

Each algorithm has its own settings, such as the sizes of its model. They are a subclass of
`AlgorithmSettings` in the algorithm's file in `algorithms/`, and use groups of this module. No two
groups have a setting of the same name, because each setting is a flag on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from .errors import UserError
from .settings import ABOVE_ZERO, Count, NotNegative, Positive, Share, ShareBelowOne, Whole

Precision = Literal["fp32", "tf32x3", "tf32", "bf16"]
MaskInitialisation = Literal["erk", "uniform", "magnitude"]

# A larger model is of no use. PyTorch would build it for hours until the memory is full.
ModelSize = Annotated[int, Meta(ge=1, le=2**16)]

# Embedding dimension, layers, heads. The first four sizes are from Table 3 of the paper; its
# parameter counts hold for d = 128. The last size has d = 256 as in Table 6.
SIZES: dict[str, tuple[int, int, int]] = {
    "0.48M": (128, 1, 2),
    "0.87M": (128, 3, 4),
    "1.47M": (128, 6, 8),
    "2.06M": (128, 9, 16),
    "5.29M": (256, 6, 8),
}
Size = Literal["0.48M", "0.87M", "1.47M", "2.06M", "5.29M"]


@dataclass(frozen=True)
class DataSettings:
    """The data, and how batches are drawn and scaled."""

    data: Path | None = None
    """The store to train on, made by `harmodt.collect` or `harmodt.data import`."""
    tasks: tuple[str, ...] = ()
    """Tasks or task sets to train on; by default all tasks of the store."""
    tasks_per_step: Count = 5
    """Number of tasks in a step; their losses are averaged (Eq. 11). A run of fewer tasks uses all
    of them in each step."""
    batch_per_task: Count = 8
    """Windows per task and step."""
    task_sampling: Literal["random", "round-robin"] = "random"
    """How a step chooses its tasks: at random without replacement, or in turn."""
    window_start_bias: Positive = 2.0
    """A window starts at u^bias of its episode's length, and u is uniform in [0, 1]. With 1 all
    starts are equally likely; a larger bias draws early starts more often."""
    action_dropout: Share = 1.0
    """Probability of hiding each previous action from the model, in training and at evaluation."""
    return_scale: Positive = 1000.0
    """Divisor of rewards and returns-to-go."""
    deviation_floor: Positive = 0.01
    """Observations are divided by their standard deviation, but at least by this number. It has the
    unit of the observation, mostly metres."""


@dataclass(frozen=True)
class TransformerSettings:
    """Sizes of the decision transformer, its initial weights, and the length of its history."""

    size: Size = "1.47M"
    """Model size of the paper's Table 3 (d = 128) or Table 6 (5.29M, d = 256)."""
    embed_dim: ModelSize | None = None
    """Embedding dimension d; by default --size sets it."""
    layers: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """Number of transformer blocks; by default --size sets it."""
    heads: ModelSize | None = None
    """Number of attention heads; by default --size sets it."""
    dropout: ShareBelowOne = 0.0
    """Dropout of attention and residual branches."""
    embedding_dropout: ShareBelowOne = 0.0
    """Dropout of the embedded tokens."""
    initialisation: Literal["gpt2", "pytorch"] = "gpt2"
    """First weights of embeddings and head: as in GPT-2 (deviation 0.02), or PyTorch's defaults."""
    context_length: ModelSize = 20
    """K, steps of history."""
    max_timesteps: Count = 1000
    """Size of the time-step embedding; later steps use its last entry."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Embedding dimension, number of blocks, number of heads."""
        named = (self.embed_dim, self.layers, self.heads)
        defaults = SIZES[self.size]
        embed_dim, layers, heads = (
            b if a is None else a for a, b in zip(named, defaults, strict=True)
        )
        return embed_dim, layers, heads

    def check(self) -> None:
        """Refuse sizes that do not fit together.

        Raises:
            UserError: the embedding dimension is not a multiple of the heads.
        """
        embed_dim, _, heads = self.shape
        if embed_dim % heads:
            raise UserError(
                f"embed_dim {embed_dim} is not a multiple of heads {heads}: change one of the two"
            )


@dataclass(frozen=True)
class PromptSettings:
    """The prompt: steps of a good episode that a model reads before its history."""

    prompt_length: ModelSize = 5
    """K*, steps of the prompt."""
    prompt_pool: Count = 5
    """Number of prompt episodes per task from which prompts are drawn: the ones with the highest
    returns."""
    prompt_position: Literal["random", "end"] = "random"
    """random: a prompt is any K* consecutive steps of an episode. end: a prompt is the K* steps
    before the last step, and evaluations use the best episode, as in the authors' code."""


@dataclass(frozen=True)
class MaskSettings:
    """The masks of the tasks."""

    sparsity: ShareBelowOne = 0.2
    """S, the share of inactive weights in each mask."""
    task_sparsity: tuple[str, ...] = ()
    """TASK=SHARE: another sparsity for a task, or for all tasks of a set. A later entry replaces an
    earlier one."""
    sparsity_by_loss: tuple[ShareBelowOne, ShareBelowOne] | None = None
    """Lowest and highest sparsity, instead of one sparsity for all tasks. The task with the highest
    loss under the initial weights gets the lowest sparsity, and the task with the lowest loss the
    highest. The sparsities of the others are evenly spaced, in the order of their losses."""
    mask_initialisation: MaskInitialisation = "erk"
    """How the first masks are made. erk and uniform draw them at random: erk with higher densities
    for small matrices (Erdős–Rényi-Kernel), uniform with one density for all. magnitude takes the
    largest weights, which are the same for every task."""
    shared_mask: bool = False
    """Draw one first mask for all tasks. harmodt-r keeps it; other algorithms then learn a mask for
    each task."""
    unseen_threshold: ShareBelowOne = 0.5
    """In the mask for unseen tasks, a weight is active if it is active in more than this share of
    the tasks' masks (Eq. 13)."""

    def sparsities(self) -> list[tuple[str, float]]:
        """Name and sparsity of each entry of `task_sparsity`.

        Raises:
            UserError: an entry has another form, or its share is outside [0, 1).
        """
        found = []
        for entry in self.task_sparsity:
            name, _, share = entry.rpartition("=")
            try:
                sparsity = float(share)
            except ValueError:
                sparsity = math.nan
            if not name or not 0 <= sparsity < 1:
                raise UserError(
                    f"task_sparsity is {entry!r}: give TASK=SHARE with a share in [0, 1), such as "
                    "reach=0.3"
                )
            found.append((name, sparsity))
        return found

    def check(self) -> None:
        """Refuse settings that do not fit together.

        Raises:
            UserError: a sparsity is outside [0, 1), or two settings exclude each other.
        """
        self.sparsities()
        names = ("shared_mask", "task_sparsity", "sparsity_by_loss")
        given = [name for name in names if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other: leave one of them out")
        if self.sparsity_by_loss and self.sparsity_by_loss[0] > self.sparsity_by_loss[1]:
            low, high = self.sparsity_by_loss
            raise UserError(f"sparsity_by_loss is {low} {high}: give the lowest first")


@dataclass(frozen=True)
class UpdatedMaskSettings(MaskSettings):
    """The masks of the tasks, and when they are updated."""

    mask_update_every: Count = 100
    """t_m, steps between mask updates."""
    mask_update_gb: NotNegative = 4.0
    """Memory for a mask update, in GB. The update computes as many tasks at a time as fit. If the
    gradients of all tasks do not fit, it computes them twice: first for their mean, then
    for the scores."""


@dataclass(frozen=True)
class LearnedMaskSettings(UpdatedMaskSettings):
    """The masks of the tasks, and how they are learned (Algorithm 2)."""

    balance: NotNegative = 10.0
    """λ, the weight of importance relative to agreement."""
    eta_min: Whole = 0
    """Fewest weights moved per task and mask update."""
    eta_max: Whole = 100
    """Most weights moved per task and mask update."""
    harmony_rule: Literal["paper", "upstream-score"] = "paper"
    """Harmony score: as in the paper (A + λI), or as in the authors' code (λA + I, where the Fisher
    information I is not divided by the squared loss)."""

    def check(self) -> None:
        """Refuse bounds that do not fit together.

        Raises:
            UserError: eta_min is above eta_max, or `MaskSettings.check` refuses a setting.
        """
        super().check()
        if self.eta_min > self.eta_max:
            raise UserError(f"eta_min {self.eta_min} is above eta_max {self.eta_max}: lower it")


@dataclass(frozen=True)
class SoftMaskSettings(UpdatedMaskSettings):
    """Masks of values between 0 and 1, and how they are learned."""

    mask_levels: Annotated[int, Meta(ge=2, le=16)] = 2
    """L: a mask's values are 0, 1/L, 2/L, ... and 1. A step costs about L times as much."""
    fence_min: NotNegative = 1.5
    """Lowest threshold of conflict and harmony, in interquartile ranges above the third
    quartile."""
    fence_max: NotNegative = 3.0
    """Highest threshold, in the same unit. It holds at the start and at the end of the run."""
    fence_peak: Annotated[float, Meta(ge=ABOVE_ZERO, lt=1)] = 0.25
    """Share of the run's steps after which the threshold is lowest."""

    def check(self) -> None:
        """Refuse bounds that do not fit together.

        Raises:
            UserError: fence_min is above fence_max, or `MaskSettings.check` refuses a setting.
        """
        super().check()
        if self.fence_min > self.fence_max:
            raise UserError(
                f"fence_min {self.fence_min} is above fence_max {self.fence_max}: lower it"
            )


@dataclass(frozen=True)
class OptimisationSettings:
    """The optimiser, AdamW, and its schedule."""

    steps: Annotated[int, Meta(ge=1, le=99_999_999)] = 800
    """E, optimiser steps."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up."""
    final_learning_rate: Share = 0.1
    """The learning rate falls along a cosine to this share of its peak; 1 keeps it constant."""
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    adam_epsilon: Positive = 1e-8
    """Number that AdamW adds to the root of its second moment."""
    gradient_clip: Positive = 0.25
    """Largest global norm of the masked gradient."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations in the run's environments."""

    evaluate_every: Whole = 0
    """Steps between evaluations during training; 0 for none before the end."""
    evaluation_episodes: Whole = 10
    """Episodes per task in each evaluation; 0 for no evaluation at all."""
    target_return: float | None = None
    """Return to aim at in evaluations; by default the best return in each task's data."""


@dataclass(frozen=True)
class RunSettings:
    """Where and how the run computes, and what it writes."""

    output: Path | None = None
    """The run's directory; by default runs/<preset>-<algorithm>-seed<seed>."""
    seed: Whole = 0
    """Seed of weights, masks, sampling and dropout."""
    device: str = "auto"
    """PyTorch device, such as cpu, cuda or cuda:1; auto is a GPU if there is one."""
    data_device: Literal["auto", "cpu", "same"] = "auto"
    """cpu reads the data from disk. same keeps the data on the run's device. auto means same if the
    device is a GPU and the data take at most half of its free memory, and cpu otherwise."""
    fused: bool = True
    """Compute with fused kernels. --no-fused is the reference path in plain PyTorch. GPU kernels
    are new, so a run on a GPU first compares its first steps with plain PyTorch."""
    graph: bool = True
    """With fused kernels, capture a training step and a policy call once and replay them. On a GPU
    they are CUDA graphs. On a CPU they are lists of kernel calls, and mask updates are captured
    too."""
    precision: Precision = "fp32"
    """Precision of matrix products; weights and optimiser stay in fp32. Only GPUs have tf32x3 and
    tf32. On NVIDIA's GPUs, fp32 uses no matrix units. With fused kernels tf32x3 does, and a product
    of two numbers has a relative error of at most 2^-19, instead of 2^-24 in fp32."""
    log_every: Count = 20
    """Steps between two lines of metrics."""
    checkpoint_every: Count = 200
    """Steps between checkpoints."""
    keep_checkpoints: Count = 3
    """Number of the last checkpoints that are kept."""


@dataclass(frozen=True)
class AlgorithmSettings:
    """The settings of one algorithm; each algorithm has a subclass in its file."""

    def prompts(self) -> PromptSettings | None:
        """The settings of prompts; None for an algorithm without prompts."""
        return None


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; the defaults are the quickstart's."""

    algorithm: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "harmodt-f"
    """The algorithm that these settings are for."""
    data: DataSettings = DataSettings()
    own: Annotated[AlgorithmSettings, tyro.conf.arg(name="")] = AlgorithmSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()


PRESETS: dict[str, dict[str, Any]] = {
    # The defaults had the highest measured success over seeds: docs/quickstart.md.
    "quickstart": {},
    # Table 6 of the paper, with the model size that gives the paper's parameter counts. The paper
    # does not state tasks per step, windows, warm-up, initialisation, dropout of embeddings and the
    # position of prompts, so the preset takes them from the authors' code.
    "paper": {
        "fused": False,
        "dropout": 0.1,
        "embedding_dropout": 0.1,
        "initialisation": "pytorch",
        "prompt_position": "end",
        "steps": 1_000_000,
        "tasks_per_step": 1,
        "window_start_bias": 1.0,
        "action_dropout": 0.0,
        "learning_rate": 1e-4,
        "warmup_steps": 10_000,
        "final_learning_rate": 1.0,
        "mask_update_every": 5000,
        "log_every": 100,
        "checkpoint_every": 10_000,
        "evaluate_every": 50_000,
        "evaluation_episodes": 50,
    },
}
PRESETS["paper-256"] = {**PRESETS["paper"], "size": "5.29M"}
"""For each preset, the settings that differ from the defaults. An algorithm ignores the settings
that it does not have."""
