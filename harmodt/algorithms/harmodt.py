"""HarmoDT: a decision transformer with a mask for each task, learned (F, M) or random (R)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmodt_kernels.harmony_selection import Importance

from ..checkpoint import Checkpoint
from ..config import LearnedMaskSettings, MaskSettings, PromptSettings, UpdatedMaskSettings
from ..data.store import TaskData
from ..environments import family
from ..errors import UserError
from ..masks.bank import MaskBank, TaskMasks
from ..masks.gradients import GradientFamilies
from ..masks.initialisation import sparsities_by_loss
from ..masks.update import MaskUpdater
from ..masks.vector import ParameterVector, by_layer
from ..networks.decision_transformer import DecisionTransformer
from ..policies.decision import DecisionPolicy
from .learner import Setup
from .sequence import (
    SequenceLearner,
    SequenceSettings,
    decision_policy,
    load_model,
    sequence_settings,
)


@dataclass(frozen=True)
class RandomMaskSettings(SequenceSettings):
    """HarmoDT-R: masks that stay as they were at first."""

    prompt: PromptSettings = PromptSettings()
    masks: MaskSettings = MaskSettings()

    def prompts(self) -> PromptSettings:
        return self.prompt


@dataclass(frozen=True)
class HarmoDTSettings(RandomMaskSettings):
    """HarmoDT-F and -M: masks that are learned."""

    masks: LearnedMaskSettings = LearnedMaskSettings()


class RandomMaskLearner(SequenceLearner):
    """Trains under masks that stay as they were at first.

    Raises:
        UserError: a task's sparsity cannot be, or is given to a task that there is not.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        super().__init__(setup, data)
        masks, seed = mask_settings(setup), setup.config.run.seed
        self.bank = MaskBank.initialise(
            self.vector,
            self._sparsities(),
            seed,
            masks.mask_initialisation,
            masks.shared_mask,
            self.settings.mask_levels,
        )

    def _sparsities(self) -> list[float]:
        """S of each task's mask."""
        bounds = mask_settings(self.setup).sparsity_by_loss
        if bounds is None:
            return task_sparsities(self.setup)
        return sparsities_by_loss(self._losses_at_first(), *bounds)

    def _losses_at_first(self) -> Tensor:
        """Each task's loss, [T], under all of the initial weights on a batch of its own."""
        draw, found = self.draw_of(0), []
        self.model.eval()
        with torch.no_grad(), self.execution.computing():
            for task in range(self.task_count):
                ids = torch.tensor([task], device=self.execution.device)
                found.append(self.losses_of(draw([task]), super().masks_of(ids)))
        self.model.train()
        return torch.cat(found)

    def masks_of(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """Each task's mask."""
        return self.bank.for_tasks(task_ids, group_gradients)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        return super().tensors() | self.bank.tensors()

    def policy(self, step: int) -> DecisionPolicy:
        """The model and its masks as they are now, as a policy."""
        return _policy(self.setup, self.model, self.bank.bits, step)

    def describe(self) -> dict[str, Any]:
        """The numbers of parameters, of those that masks cover and of each mask's active ones."""
        return super().describe() | {
            "maskable": self.vector.maskable_count(),
            "active_weights": self.bank.active_counts().tolist(),
            "mask_bytes": self.bank.bits.nbytes,
        }


class UpdatedMaskLearner(RandomMaskLearner):
    """Trains under masks that it updates every t_m steps.

    Attributes:
        families: the gradients that updates follow from.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        super().__init__(setup, data)
        masks = mask_settings(setup)
        assert isinstance(masks, UpdatedMaskSettings)
        self._initial_bits = self.bank.bits.clone()  # drawn again, the same, when a run goes on
        self.update_every = masks.mask_update_every
        tokens = 3 * (self.model.config.prompt_length + self.settings.model.context_length)
        # Passes of no more tasks than a step take turns with it in its memory. Larger ones would
        # hold more of it and save little time; a graph on a GPU would have memory of its own.
        records = self.execution.repeats and self.execution.device.type == "cpu"
        self.families = GradientFamilies(
            self.bank,
            self.losses_of,
            memory=masks.mask_update_gb * 1e9,
            rows=setup.config.data.batch_per_task * tokens,
            repeated=self.execution.repeated if records else None,
            most=setup.config.data.tasks_per_step,
        )

    def before_step(self, step: int) -> dict[str, float]:
        """Update all masks at the start and then every t_m steps.

        Logged by layer, over all tasks: `changed`, the mask bits that the update changed, and
        `differing`, those that are others than at the start of the run.
        """
        if step % self.update_every:
            return super().before_step(step)
        before = self.bank.bits.clone()
        with self.execution.computing():
            values = self.update_masks(step)
        for kind, earlier in (("changed", before), ("differing", self._initial_bits)):
            changed = (self.bank.bits ^ earlier)[: self.bank.tasks]  # of soft masks, what is active
            counts = by_layer(self.vector.count_by_parameter(changed))
            values |= {f"{kind}/{layer}": int(count.sum()) for layer, count in counts.items()}
        return values

    def update_masks(self, step: int) -> dict[str, float]:
        """Update all masks after `step` steps; returns what is to be logged."""
        raise NotImplementedError


class HarmoDTLearner(UpdatedMaskLearner):
    """Trains under masks that it updates every t_m steps (Algorithm 2).

    Args:
        importance: "fisher" (HarmoDT-F) or "magnitude" (HarmoDT-M).

    Raises:
        UserError: eta_max is above the number of maskable weights.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData], importance: Importance):
        super().__init__(setup, data)
        masks = mask_settings(setup)
        assert isinstance(masks, LearnedMaskSettings)
        maskable = self.vector.maskable_count()
        if masks.eta_max > maskable:
            raise UserError(
                f"eta_max is {masks.eta_max}, but the model has only {maskable} maskable "
                "weights: lower it"
            )
        self.updater = MaskUpdater(
            self.bank,
            self.families,
            setup.execution.backend,
            masks,
            importance,
            setup.config.optimisation.steps,
        )

    def update_masks(self, step: int) -> dict[str, float]:
        """Move weights out of and into every task's mask."""
        update = self.updater.update(step, self.draw_of(step))
        return {"harmony": update.harmony, "moved_weights": int(update.moved.max())}


def load_policy(setup: Setup, checkpoint: Checkpoint) -> DecisionPolicy:
    """The policy of a checkpoint.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    model = load_model(setup, checkpoint)
    bits = load_masks(setup, model.vector, checkpoint)
    return _policy(setup, model, bits, checkpoint.step)


def load_masks(setup: Setup, vector: ParameterVector, checkpoint: Checkpoint) -> Tensor:
    """The masks of a checkpoint, as `MaskBank` has them.

    Raises:
        UserError: the checkpoint is of another model size.
    """
    levels = sequence_settings(setup).mask_levels
    rows, words = levels * len(setup.conditioning), vector.maskable_size // 32
    bits = vector.weights.new_zeros(rows, words, dtype=torch.int32)
    checkpoint.copy_to(MaskBank(vector, bits, levels).tensors())
    return bits


def _policy(setup: Setup, model: DecisionTransformer, bits: Tensor, step: int) -> DecisionPolicy:
    threshold = mask_settings(setup).unseen_threshold
    return decision_policy(setup, model, bits, step, unseen_threshold=threshold)


def task_sparsities(setup: Setup) -> list[float]:
    """S of each task's mask as the settings name it.

    Raises:
        UserError: a task is named that there is not, or that the run does not train on.
    """
    masks, environments = mask_settings(setup), family(setup.environment.family)
    sparsities = {task.name: masks.sparsity for task in setup.conditioning}
    for name, sparsity in masks.sparsities():
        for task in environments.resolve_tasks((name,)):
            if task not in sparsities:
                raise UserError(
                    f"task_sparsity names {task}, and the run trains on {', '.join(sparsities)}: "
                    "leave it out, or train on it"
                )
            sparsities[task] = sparsity
    return list(sparsities.values())


def mask_settings(setup: Setup) -> MaskSettings:
    """The run's settings of masks, which its algorithm has."""
    own = setup.config.own
    assert isinstance(own, RandomMaskSettings)
    return own.masks
