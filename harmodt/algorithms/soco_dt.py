"""HarmoDT with soft masks, as in SoCo-DT. docs/baselines.md says what that paper determines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import SoftMaskSettings
from ..data.store import TaskData
from ..masks.soft import SoftMaskUpdater
from .harmodt import ChangingMaskLearner, ChangingMaskSettings


@dataclass(frozen=True)
class SoCoDTSettings(ChangingMaskSettings):
    """SoCo-DT: masks with values between 0 and 1; the gradients of a task decide its sparsity."""

    masks: SoftMaskSettings = SoftMaskSettings()

    @property
    def mask_levels(self) -> int:
        """L: a mask's values are 0, 1/L, 2/L, ... and 1."""
        return self.masks.mask_levels


class SoCoDTLearner(ChangingMaskLearner[SoCoDTSettings]):
    """Trains under soft masks. The first masks are those of HarmoDT, with the values 0 and 1."""

    def prepare_training(self, data: Sequence[TaskData]) -> None:
        """As `RandomMaskLearner.prepare_training`."""
        super().prepare_training(data)
        steps = self.setup.config.optimisation.steps
        self.updater = SoftMaskUpdater(self.bank, self.gradients, self.settings.masks, steps)

    def update_masks(self, step: int) -> dict[str, float]:
        """Lower and raise values in every task's mask.

        It logs `moved_weights`, the largest number of changed values in a task, and `sparsity`,
        each task's share of inactive weights.
        """
        update = self.updater.update(step, self.draw_for(step))
        moved = int((update.lowered + update.raised).max())
        shares = 1 - self.bank.active_counts().double() / self.vector.maskable_count()
        tasks = zip(self.setup.conditioning, shares.tolist(), strict=True)
        sparsity = {f"sparsity/{task.name}": share for task, share in tasks}
        return {"harmony": update.harmony, "moved_weights": moved} | sparsity

    def describe(self) -> dict[str, Any]:
        """As `RandomMaskLearner.describe`, without the numbers of active weights, which change."""
        described = super().describe()
        del described["active_weights"]
        return described
