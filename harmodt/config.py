"""Every setting of a training run with its bounds, in groups, and the presets.

What is particular to an algorithm, the sizes of its model included, is in the `AlgorithmSettings`
of its file in `algorithms/`, put together from groups of this module. Names of settings are unique
over all groups: on a command line each is a flag.
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

Precision = Literal["fp32", "tf32", "bf16"]
MaskInitialisation = Literal["erk", "uniform", "magnitude"]

# Beyond any use, and soon refused: a model of more is built for hours before memory ends.
ModelSize = Annotated[int, Meta(ge=1, le=2**16)]

# (embedding dimension, layers, heads). The first four are Table 3 of the paper, whose parameter
# counts are those of d = 128; the last is Table 6's d = 256.
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
    """What is trained on, and how it is drawn and scaled."""

    data: Path | None = None
    """The store to train on, made by `harmodt.collect` or `harmodt.data import`."""
    tasks: tuple[str, ...] = ()
    """Tasks or task sets to train on; all tasks of the store if none is named."""
    tasks_per_step: Count = 5
    """Tasks in one step, at most the number of tasks; Eq. 11 is averaged over them."""
    batch_per_task: Count = 8
    """Windows per task and step."""
    task_sampling: Literal["random", "round-robin"] = "random"
    """Which tasks a step holds: random without replacement, or each in turn."""
    window_start_bias: Positive = 2.0
    """Windows start at u^bias of the episode's length, u uniform: 1 is uniform, more is earlier."""
    action_dropout: Share = 1.0
    """Probability of hiding each previous action from the model, in training and in evaluation."""
    return_scale: Positive = 1000.0
    """Divisor of rewards and returns-to-go."""
    deviation_floor: Positive = 0.01
    """Smallest deviation by which an observation is divided (raw units, mostly metres)."""


@dataclass(frozen=True)
class TransformerSettings:
    """Sizes of the decision transformer, how it begins, and how much of a history it reads."""

    size: Size = "1.47M"
    """Model size of the paper's Table 3 (d = 128) or Table 6 (5.29M, d = 256)."""
    embed_dim: ModelSize | None = None
    """Embedding dimension d, in place of the size's."""
    layers: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """Number of transformer blocks, in place of the size's."""
    heads: ModelSize | None = None
    """Number of attention heads, in place of the size's."""
    dropout: ShareBelowOne = 0.0
    """Dropout of attention and residual branches."""
    embedding_dropout: ShareBelowOne = 0.0
    """Dropout of the embedded tokens."""
    initialisation: Literal["gpt2", "pytorch"] = "gpt2"
    """Embeddings and head as GPT-2 has them (deviation 0.02) or as PyTorch does by default."""
    context_length: ModelSize = 20
    """K, steps of history."""
    max_timesteps: Count = 1000
    """Size of the time-step embedding; later steps use its last entry."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Embedding dimension, number of blocks, number of heads."""
        named = (self.embed_dim, self.layers, self.heads)
        of_size = SIZES[self.size]
        embed_dim, layers, heads = (
            b if a is None else a for a, b in zip(named, of_size, strict=True)
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
    """The steps of a good episode that a model reads before its history."""

    prompt_length: ModelSize = 5
    """K*, steps of the prompt."""
    prompt_pool: Count = 5
    """Prompts come from this many of a task's held-apart episodes, the best by return."""
    prompt_position: Literal["random", "end"] = "random"
    """A prompt is any steps of an episode, or its last ones, at evaluation the best episode's."""


@dataclass(frozen=True)
class MaskSettings:
    """The masks of the tasks."""

    sparsity: ShareBelowOne = 0.2
    """S, the share of inactive weights in each mask."""
    task_sparsity: tuple[str, ...] = ()
    """TASK=SHARE: another sparsity for a task, or for all tasks of a set; the last one counts."""
    sparsity_by_loss: tuple[ShareBelowOne, ShareBelowOne] | None = None
    """Lowest and highest sparsity, in place of one for all: the task of highest loss under the
    initial weights has the lowest, and those between are evenly spaced in the order of losses."""
    mask_initialisation: MaskInitialisation = "erk"
    """Masks begin at random with ERK densities, at random with one density for all matrices, or
    with the largest weights, the same for every task."""
    shared_mask: bool = False
    """Draw one mask for all tasks: harmodt-r keeps it, and learned masks begin with it."""
    unseen_threshold: ShareBelowOne = 0.5
    """Share of tasks above which a weight is active in the mask for unseen tasks (Eq. 13)."""

    def sparsities(self) -> list[tuple[str, float]]:
        """Name and sparsity of each entry of `task_sparsity`.

        Raises:
            UserError: an entry is of another form, or its share outside [0, 1).
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
            UserError: a sparsity that cannot be, or a setting that another one leaves no use.
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
    """GB for a mask update, which computes as many tasks at a time as fit; if all tasks' gradients
    do not, they are computed twice."""


@dataclass(frozen=True)
class LearnedMaskSettings(UpdatedMaskSettings):
    """The masks of the tasks, and how they are learned (Algorithm 2)."""

    balance: NotNegative = 10.0
    """λ, the weight of importance against agreement."""
    eta_min: Whole = 0
    """Fewest weights moved per task and mask update."""
    eta_max: Whole = 100
    """Most weights moved per task and mask update."""
    harmony_rule: Literal["paper", "upstream-score"] = "paper"
    """Harmony as in the paper (A + λI), or scored as in the authors' code (λA + I, unscaled I)."""

    def check(self) -> None:
        """Refuse bounds that do not fit together.

        Raises:
            UserError: eta_min is above eta_max, or as for masks that are not learned.
        """
        super().check()
        if self.eta_min > self.eta_max:
            raise UserError(f"eta_min {self.eta_min} is above eta_max {self.eta_max}: lower it")


@dataclass(frozen=True)
class SoftMaskSettings(UpdatedMaskSettings):
    """Masks of values between 0 and 1, and how they are learned."""

    mask_levels: Annotated[int, Meta(ge=2, le=16)] = 2
    """L: a mask's values are 0, 1/L, 2/L, ... and 1; a step costs about as much as L steps."""
    fence_min: NotNegative = 1.5
    """How many interquartile ranges above the third quartile the threshold of conflict and harmony
    lies where it is lowest."""
    fence_max: NotNegative = 3.0
    """The same where it is highest: at the start and at the end of the run."""
    fence_peak: Annotated[float, Meta(ge=ABOVE_ZERO, lt=1)] = 0.25
    """Share of the run after which the threshold is lowest."""

    def check(self) -> None:
        """Refuse bounds that do not fit together.

        Raises:
            UserError: fence_min is above fence_max, or as for masks that are not learned.
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
    """Decay of AdamW's running means of the gradient and of its square."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    gradient_clip: Positive = 0.25
    """Largest global norm of the masked gradient."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations in the run's environments."""

    evaluate_every: Whole = 0
    """Steps between evaluations during training; 0 for none before the end."""
    evaluation_episodes: Whole = 10
    """Episodes per task of each evaluation; 0 for no evaluation at all."""
    target_return: float | None = None
    """Return asked for at evaluation; by default the best return in each task's data."""


@dataclass(frozen=True)
class RunSettings:
    """Where and how the run computes, and what it keeps."""

    output: Path | None = None
    """The run's directory; by default runs/<preset>-<algorithm>-seed<seed>."""
    seed: Whole = 0
    """Seed of weights, masks, sampling and dropout."""
    device: str = "auto"
    """PyTorch device, such as cpu, cuda or cuda:1; auto is a GPU where there is one."""
    data_device: Literal["auto", "cpu", "same"] = "auto"
    """Data are read from disk (cpu) or kept on the run's device (same), if need be without what
    repeats; auto is the latter where that is a GPU and they take at most half its free memory."""
    fused: bool = True
    """Compute with fused kernels; --no-fused is the reference path in plain PyTorch."""
    graph: bool = True
    """Record training steps and acting with fused kernels once and repeat them as a whole: on a
    GPU as CUDA graphs, on a CPU as their calls of kernels, and mask updates as well."""
    precision: Precision = "fp32"
    """Precision of the matrix products (tf32: GPUs only); weights and optimiser stay in fp32."""
    log_every: Count = 20
    """Steps between metrics."""
    checkpoint_every: Count = 200
    """Steps between checkpoints."""
    keep_checkpoints: Count = 3
    """How many of the last checkpoints are kept."""


@dataclass(frozen=True)
class AlgorithmSettings:
    """What is particular to an algorithm; each has its own, in its file."""

    def prompts(self) -> PromptSettings | None:
        """How prompts are drawn, for an algorithm that has them."""
        return None


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; the defaults are the quickstart's."""

    algorithm: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "harmodt-f"
    """Whose own settings these are."""
    data: DataSettings = DataSettings()
    own: Annotated[AlgorithmSettings, tyro.conf.arg(name="")] = AlgorithmSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()


PRESETS: dict[str, dict[str, Any]] = {
    # Chosen by measured success over seeds: docs/quickstart.md.
    "quickstart": {},
    # Table 6 of the paper at the size of its parameter counts; what the paper leaves open is as in
    # the authors' code: one task per step, 8 windows, warm-up, initialisation, dropout of
    # embeddings, place of the prompt. It trains without kernels unless they are asked for.
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
"""Settings that a preset has in place of the defaults, by name, where the algorithm has them."""
