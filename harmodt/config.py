"""Every setting of a training run, the presets, and the sizes of the paper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .environments.metaworld import MetaWorld
from .errors import UserError

Algorithm = Literal["harmodt-f", "harmodt-m", "harmodt-r", "prompt-dt", "mtdt"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decision transformer."""

    embed_dim: int
    layers: int
    heads: int
    dropout: float = 0.1
    context_length: int = 20
    prompt_length: int = 5
    max_timesteps: int = 1000
    task_embedding_dim: int = 0
    observation_size: int = MetaWorld.spec.observation_size
    action_size: int = MetaWorld.spec.action_size


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
class TrainConfig:
    """Train HarmoDT on a store of offline data.

    The defaults are the quickstart's; `--preset paper` takes the paper's (Table 6). Without --data
    the quickstart first collects its own demonstrations of MT5 by simulation.
    """

    data: Path | None = None
    """The store to train on, made by `harmodt.collect` or `harmodt.data import`."""
    tasks: tuple[str, ...] = ()
    """Tasks or task sets to train on; all tasks of the store if none is named."""
    output: Path | None = None
    """The run's directory; by default runs/<preset>-<algorithm>-seed<seed>."""
    algorithm: Algorithm = "harmodt-f"
    """HarmoDT with Fisher (f), magnitude (m) or fixed random (r) masks, or a baseline without."""
    fused: bool = True
    """Apply the masks inside fused kernels; --no-fused is the reference path in plain PyTorch."""
    device: str = "cpu"
    """PyTorch device, such as cpu, cuda or cuda:1."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the matrix products (tf32: GPUs only); weights and optimiser stay in fp32."""
    seed: int = 0
    """Seed of weights, masks, sampling and dropout."""

    size: Size = "1.47M"
    """Model size of the paper's Table 3 (d = 128) or Table 6 (5.29M, d = 256)."""
    embed_dim: int | None = None
    """Embedding dimension d, in place of the size's."""
    layers: int | None = None
    """Number of transformer blocks, in place of the size's."""
    heads: int | None = None
    """Number of attention heads, in place of the size's."""
    dropout: float = 0.0
    """Dropout of attention and residual branches."""
    context_length: int = 20
    """K, steps of history."""
    prompt_length: int = 5
    """K*, steps of the prompt."""
    max_timesteps: int = 1000
    """Size of the time-step embedding; later steps use its last entry."""
    task_embedding_dim: int = 16
    """Size of the learned task embedding (mtdt only)."""

    steps: int = 800
    """E, optimiser steps."""
    tasks_per_step: int = 5
    """Tasks in one step, at most the number of tasks; Eq. 11 is averaged over them."""
    batch_per_task: int = 8
    """Windows per task and step."""
    task_sampling: Literal["random", "round-robin"] = "random"
    """Which tasks a step holds: random without replacement, or each in turn."""
    window_start_bias: float = 2.0
    """Windows start at u^bias of the episode's length, u uniform: 1 is uniform, more is earlier."""
    action_dropout: float = 1.0
    """Probability of hiding each previous action from the model, in training and in evaluation."""
    return_scale: float = 1000.0
    """Divisor of rewards and returns-to-go."""
    deviation_floor: float = 0.01
    """Smallest deviation by which an observation is divided (raw units, mostly metres)."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_learning_rate: float = 0.1
    """The learning rate falls along a cosine to this share of its peak; 1 keeps it constant."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    gradient_clip: float = 0.25
    """Largest global norm of the masked gradient."""

    sparsity: float = 0.2
    """S, the share of inactive weights in each mask."""
    balance: float = 10.0
    """λ, the weight of importance against agreement."""
    mask_update_every: int = 100
    """t_m, steps between mask updates."""
    eta_min: int = 0
    """Fewest weights moved per task and mask update."""
    eta_max: int = 100
    """Most weights moved per task and mask update."""
    mask_update_gb: float = 4.0
    """GB for gradients in a mask update; if all tasks' need more, they are computed twice."""
    harmony_rule: Literal["paper", "upstream-score"] = "paper"
    """Harmony as in the paper (A + λI) or in the authors' code (λA + I)."""
    unseen_threshold: float = 0.5
    """Share of tasks above which a weight is active in the mask for unseen tasks (Eq. 13)."""

    log_every: int = 20
    """Steps between metrics."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints are kept."""
    evaluate_every: int = 0
    """Steps between evaluations during training; 0 for none before the end."""
    evaluation_episodes: int = 10
    """Episodes per task of each evaluation; 0 for no evaluation at all."""
    target_return: float | None = None
    """Return asked for at evaluation; by default the best return in each task's data."""

    @property
    def masked(self) -> bool:
        """Whether the algorithm has masks."""
        return self.algorithm.startswith("harmodt")

    @property
    def updates_masks(self) -> bool:
        """Whether the algorithm learns its masks."""
        return self.algorithm in ("harmodt-f", "harmodt-m")

    def model(self) -> ModelConfig:
        """The model's sizes."""
        embed_dim, layers, heads = SIZES[self.size]
        prompted = self.algorithm != "mtdt"
        return ModelConfig(
            embed_dim=embed_dim if self.embed_dim is None else self.embed_dim,
            layers=layers if self.layers is None else self.layers,
            heads=heads if self.heads is None else self.heads,
            dropout=self.dropout,
            context_length=self.context_length,
            prompt_length=self.prompt_length if prompted else 0,
            max_timesteps=self.max_timesteps,
            task_embedding_dim=0 if prompted else self.task_embedding_dim,
        )

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: names the setting and what it may be.
        """
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:  # not above 0, or NaN
                raise UserError(f"{name} is {value}: give a number above 0")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more")
        for name in ("dropout", "sparsity", "unseen_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share in [0, 1)")
        for name in ("action_dropout", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share in [0, 1]")
        model = self.model()
        if model.embed_dim % model.heads:
            raise UserError(
                f"embed_dim {model.embed_dim} is not a multiple of heads {model.heads}: "
                "change one of the two"
            )
        if self.eta_min > self.eta_max:
            raise UserError(f"eta_min {self.eta_min} is above eta_max {self.eta_max}: lower it")
        if self.algorithm != "mtdt" and self.prompt_length == 0:
            raise UserError(
                f"prompt_length is 0, but {self.algorithm} reads a prompt: give 1 or more"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`."""
        paths = {key: Path(values[key]) if values[key] else None for key in ("data", "output")}
        return cls(**{**values, **paths, "tasks": tuple(values["tasks"])})


_POSITIVE = (
    "embed_dim", "layers", "heads", "task_embedding_dim", "steps", "tasks_per_step",
    "batch_per_task", "context_length", "max_timesteps", "window_start_bias", "return_scale",
    "deviation_floor", "learning_rate", "gradient_clip", "mask_update_every", "log_every",
    "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
_NOT_NEGATIVE = (
    "prompt_length", "warmup_steps", "weight_decay", "balance", "eta_min", "mask_update_gb",
    "evaluate_every", "evaluation_episodes", "seed",
)  # fmt: skip

PRESETS: dict[str, TrainConfig] = {
    # Chosen by measured success over seeds: docs/quickstart.md.
    "quickstart": TrainConfig(),
    # Table 6 of the paper at the size of its parameter counts; what the table leaves open is as in
    # the authors' code: one task per step, 8 windows, warm-up. It trains by the definitions unless
    # the fused kernels are asked for.
    "paper": TrainConfig(
        fused=False,
        dropout=0.1,
        steps=1_000_000,
        tasks_per_step=1,
        window_start_bias=1.0,
        action_dropout=0.0,
        learning_rate=1e-4,
        warmup_steps=10_000,
        final_learning_rate=1.0,
        mask_update_every=5000,
        log_every=100,
        checkpoint_every=10_000,
        evaluate_every=50_000,
        evaluation_episodes=50,
    ),
}
PRESETS["paper-256"] = dataclasses.replace(PRESETS["paper"], size="5.29M")
