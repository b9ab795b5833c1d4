"""HarmoDT: a decision transformer with a mask for each task.

HarmoDT-F and HarmoDT-M learn the masks. HarmoDT-R draws them at random and keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from harmodt_kernels.harmony_selection import Importance
from harmodt_kernels.vector import by_layer

from ..config import LearnedMaskSettings, MaskSettings, PromptSettings, UpdatedMaskSettings
from ..data.store import TaskData
from ..environments import family
from ..errors import UserError
from ..masks.bank import MaskBank, TaskMasks
from ..masks.gradients import UpdateGradients
from ..masks.initialisation import sparsities_by_loss
from ..masks.update import MaskUpdater
from .learner import Setup
from .sequence import SequenceLearner, SequenceSettings


@dataclass(frozen=True)
class RandomMaskSettings(SequenceSettings):
    """HarmoDT-R: masks that never change."""

    prompt: PromptSettings = PromptSettings()
    masks: MaskSettings = MaskSettings()

    def prompts(self) -> PromptSettings:
        return self.prompt


@dataclass(frozen=True)
class ChangingMaskSettings(RandomMaskSettings):
    """Masks that are updated every t_m steps."""

    masks: UpdatedMaskSettings = UpdatedMaskSettings()


@dataclass(frozen=True)
class HarmoDTSettings(ChangingMaskSettings):
    """HarmoDT-F and -M: masks that are learned."""

    masks: LearnedMaskSettings = LearnedMaskSettings()


MaskedOwn = TypeVar("MaskedOwn", bound=RandomMaskSettings)
ChangingOwn = TypeVar("ChangingOwn", bound=ChangingMaskSettings)


class RandomMaskLearner(SequenceLearner[MaskedOwn]):
    """Trains under masks that never change.

    Attributes:
        bank: the masks of all tasks. No weight is active before `prepare_training` or `load`.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.bank = MaskBank.empty(self.vector, self.task_count, self.settings.mask_levels)

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """Do the same as `SequenceLearner.prepare_training`, and draw the first masks.

        Raises:
            UserError: also if a task cannot have its sparsity, or `task_sparsity` names a task that
                the run does not train on.
        """
        super().prepare_training(data)
        masks = self.settings.masks
        self.bank.draw(
            self._sparsities(),
            self.setup.config.run.seed,
            masks.mask_initialisation,
            masks.shared_mask,
        )

    def _sparsities(self) -> list[float]:
        """The sparsity S of each task's mask."""
        bounds = self.settings.masks.sparsity_by_loss
        if bounds is None:
            return task_sparsities(self.setup, self.settings.masks)
        return sparsities_by_loss(self._first_losses(), *bounds)

    def _first_losses(self) -> Tensor:
        """Each task's loss, [T], on its own batch, with all initial weights active."""
        draw, found = self.draw_for(0), []
        self.model.eval()
        with torch.no_grad(), self.execution.computing():
            for task in range(self.task_count):
                ids = torch.tensor([task], device=self.execution.device)
                found.append(self.losses_of_drawn(draw([task]), TaskMasks(self.vector, None, ids)))
        self.model.train()
        return torch.cat(found)

    @property
    def mask_bits(self) -> Tensor:
        """The masks of all tasks."""
        return self.bank.bits

    @property
    def unseen_threshold(self) -> float:
        """The share of tasks above which a weight is active in the voted mask (Eq. 13)."""
        return self.settings.masks.unseen_threshold

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name."""
        return super().tensors() | self.bank.tensors()

    def describe(self) -> dict[str, Any]:
        """Numbers of parameters, of maskable weights, and of active weights in each mask."""
        return super().describe() | {
            "maskable": self.vector.maskable_count(),
            "active_weights": self.bank.active_counts().tolist(),
            "mask_bytes": self.bank.bits.nbytes,
        }


class ChangingMaskLearner(RandomMaskLearner[ChangingOwn]):
    """Trains under masks that it updates every t_m steps.

    Attributes:
        gradients: computes the gradients that a mask update needs.
    """

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """As `RandomMaskLearner.prepare_training`."""
        super().prepare_training(data)
        masks = self.settings.masks
        # A resumed run also has the first masks here: it loads its checkpoint later.
        self._first_bits = self.bank.bits.clone()
        tokens = 3 * (self.model.config.prompt_length + self.settings.model.context_length)
        # Only a CPU captures passes, and only passes of at most as many tasks as a step. They use
        # the memory of the captured step. A larger pass would need more memory and save little
        # time. On a GPU, a captured pass could not use the memory of the captured step.
        records = self.execution.repeats and self.execution.device.type == "cpu"
        self.gradients = UpdateGradients(
            self.bank,
            self.losses_of_drawn,
            memory=masks.mask_update_gb * 1e9,
            rows=self.setup.config.data.batch_per_task * tokens,
            record=self.execution.repeated if records else None,
            most_recorded=self.setup.config.data.tasks_per_step,
        )

    def before_step(self, step: int) -> dict[str, float]:
        """Update all masks at the start and then every t_m steps.

        It logs two counts for each layer, summed over all tasks. `changed` is the number of mask
        bits that this update changed. `differing` is the number of mask bits that differ from the
        first masks.
        """
        if step % self.settings.masks.mask_update_every:
            return super().before_step(step)
        before = self.bank.bits.clone()
        with self.execution.computing():
            values = self.update_masks(step)
        for kind, earlier in (("changed", before), ("differing", self._first_bits)):
            # The first T rows say which weights are active. Only soft masks have more rows.
            changed = (self.bank.bits ^ earlier)[: self.bank.tasks]
            counts = by_layer(self.vector.count_by_parameter(changed))
            values |= {f"{kind}/{layer}": int(count.sum()) for layer, count in counts.items()}
        return values

    def update_masks(self, step: int) -> dict[str, float]:
        """Update all masks after `step` steps, and return the values to log."""
        raise NotImplementedError


class HarmoDTLearner(ChangingMaskLearner[HarmoDTSettings]):
    """Trains under masks that it updates every t_m steps (Algorithm 2).

    Args:
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).
    """

    def __init__(self, setup: Setup, importance: Importance):
        super().__init__(setup)
        self._importance: Importance = importance

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """As `RandomMaskLearner.prepare_training`.

        Raises:
            UserError: also if eta_max is above the number of maskable weights.
        """
        super().prepare_training(data)
        masks, maskable = self.settings.masks, self.vector.maskable_count()
        if masks.eta_max > maskable:
            raise UserError(
                f"eta_max is {masks.eta_max}, but the model has only {maskable} maskable "
                "weights: lower --eta-max"
            )
        self.updater = MaskUpdater(
            self.bank,
            self.gradients,
            self.execution.backend,
            masks,
            self._importance,
            self.setup.config.optimisation.steps,
        )

    def update_masks(self, step: int) -> dict[str, float]:
        """Move weights out of and into every task's mask."""
        update = self.updater.update(step, self.draw_for(step))
        return {"harmony": update.harmony, "moved_weights": int(update.moved.max())}


def task_sparsities(setup: Setup, masks: MaskSettings) -> list[float]:
    """The sparsity S of each task's mask, from the settings.

    Raises:
        UserError: a named task does not exist, or the run does not train on it.
    """
    environments = family(setup.environment.family)
    sparsities = {task.name: masks.sparsity for task in setup.conditioning}
    for name, sparsity in masks.sparsities():
        for task in environments.resolve_tasks((name,)):
            if task not in sparsities:
                raise UserError(
                    f"task_sparsity names {task}, but the run trains on {', '.join(sparsities)}: "
                    f"leave {name} out of --task-sparsity, or add {task} to --tasks"
                )
            sparsities[task] = sparsity
    return list(sparsities.values())
