"""One training run in memory: model, masks, optimiser, and the step that moves them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..config import TrainConfig
from ..data.inputs import TaskConditioning
from ..data.store import TaskData
from ..data.windows import WindowSampler
from ..devices import choose_backend, set_precision
from ..errors import UserError
from ..masks.bank import MaskBank, TaskMasks
from ..masks.update import MaskUpdate, update_masks
from ..networks.decision_transformer import DecisionTransformer
from .checkpoint import Checkpoint, load_parameters

# What a random draw is for: part of its seed, beside the run's seed and the step.
_TRAIN, _MASKS, _INITIALISE = 0, 1, 2

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # AdamW's usual values, as in the authors' code


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: its tasks, their losses [G] and the norm of the unclipped gradient."""

    tasks: Sequence[int]
    losses: Tensor
    gradient_norm: Tensor


class Trainer:
    """Trains one model on several tasks (Eq. 11) and updates their masks (Algorithm 2).

    Every random draw is seeded by (seed, purpose, step): a run continued from a checkpoint draws
    what it would have drawn.

    Args:
        config: the run's settings.
        data, conditioning: one entry per task; index = task id.
        device: where to train.

    Raises:
        UserError: eta_max is above the number of maskable weights, tasks_per_step above the
            number of tasks, or the device has no fused kernels although they are asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Sequence[TaskData],
        conditioning: Sequence[TaskConditioning],
        device: torch.device,
    ):
        self.config = config
        self.device = device
        self.backend = choose_backend(config.fused, device)
        set_precision(config.precision, device, self.backend)
        self.tasks = len(data)
        self.step = 0
        torch.manual_seed(_seed(config.seed, _INITIALISE, 0))
        self.model = DecisionTransformer(config.model(), self.tasks, device)
        self.vector = self.model.vector
        self.masks = (
            MaskBank.initialise(self.vector, self.tasks, config.sparsity, config.seed, self.backend)
            if config.masked
            else None
        )
        self.first_moment = torch.zeros_like(self.vector.weights)
        self.second_moment = torch.zeros_like(self.vector.weights)
        self.valid_bits = self.vector.valid_bits()
        self.sampler = WindowSampler(data, conditioning, config, device)
        self._check()

    def _check(self) -> None:
        maskable = self.vector.maskable_count()
        if self.config.masked and self.config.eta_max > maskable:
            raise UserError(
                f"eta_max is {self.config.eta_max}, but the model has only {maskable} maskable "
                "weights: lower it"
            )
        if self.config.tasks_per_step > self.tasks:
            raise UserError(
                f"tasks_per_step is {self.config.tasks_per_step}, but there are only "
                f"{self.tasks} tasks: give at most that many"
            )

    def train_step(self) -> StepResult:
        """One optimiser step over some tasks."""
        rng = self._begin(_TRAIN)
        tasks = self._choose_tasks(rng)
        batch, targets = self.sampler.sample(tasks, rng)
        self.vector.gradient.zero_()
        masks = self.masks.for_tasks(batch.task_ids) if self.masks else None
        losses = self.losses(batch, targets, masks)
        losses.mean().backward()
        self.step += 1
        norm = self.backend.masked_adamw(
            self.vector.weights,
            self.vector.gradient,
            self.first_moment,
            self.second_moment,
            self._active_bits(tasks),
            step=self.step,
            learning_rate=learning_rate(self.step, self.config),
            betas=_BETAS,
            epsilon=_EPSILON,
            weight_decay=self.config.weight_decay,
            max_norm=self.config.gradient_clip,
        )
        return StepResult(tasks, losses.detach(), norm)

    def mask_update_due(self) -> bool:
        """Whether Algorithm 2 runs before the next step: at the start, then every t_m steps."""
        return self.config.updates_masks and self.step % self.config.mask_update_every == 0

    def update_masks(self) -> MaskUpdate:
        """Update the masks of all tasks from fresh batches."""
        assert self.masks is not None

        def draw(tasks: Sequence[int]) -> tuple[Batch, Tensor]:
            return self.sampler.sample(tasks, self._begin(_MASKS, *tasks))

        return update_masks(self.step, self.config, self.masks, self.vector, self.losses, draw)

    def losses(self, batch: Batch, targets: Tensor, masks: TaskMasks | None) -> Tensor:
        """Mean squared error on the actions of each group's valid history steps (Eq. 2), [G]."""
        autocast = (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.config.precision == "bf16" and not self.backend.rounds_inside
            else contextlib.nullcontext()
        )
        with autocast:
            predicted = self.model(batch, masks)
        valid = batch.history.valid
        errors = (predicted.float() - targets).square().mean(-1) * valid
        return errors.sum((1, 2)) / valid.sum((1, 2))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors["optimizer.first_moment"] = self.first_moment
        tensors["optimizer.second_moment"] = self.second_moment
        if self.masks is not None:
            tensors["masks"] = self.masks.bits
        return tensors

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is of another model size.
        """
        load_parameters(checkpoint, self.tensors(), prefix="")
        self.step = checkpoint.values["step"]

    def _begin(self, purpose: int, *more: int) -> np.random.Generator:
        numbers = (self.config.seed, purpose, self.step, *more)
        torch.manual_seed(_seed(*numbers))
        return np.random.default_rng(numbers)

    def _choose_tasks(self, rng: np.random.Generator) -> list[int]:
        count = self.config.tasks_per_step
        if self.config.task_sampling == "round-robin":
            return [(self.step * count + i) % self.tasks for i in range(count)]
        return sorted(rng.choice(self.tasks, size=count, replace=False).tolist())

    def _active_bits(self, tasks: Sequence[int]) -> Tensor:
        """Packed bits over the whole vector: the weights that this step may change."""
        if self.masks is None:
            return self.valid_bits
        active = self.valid_bits.clone()
        active[: self.masks.bits.shape[1]] = self.masks.active_bits(tasks)
        return active


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant or a cosine to `final_learning_rate` of the peak."""
    warm = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    wave = 0.5 * (1.0 + math.cos(math.pi * min(step / config.steps, 1.0)))
    floor = config.final_learning_rate
    return config.learning_rate * warm * (floor + (1.0 - floor) * wave)


def _seed(*numbers: Any) -> int:
    """A 64-bit seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
