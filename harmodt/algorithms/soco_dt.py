"""HarmoDT with soft masks, after SoCo-DT: docs/baselines.md says what of it was determined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import SoftMaskSettings
from ..data.store import TaskData
from ..masks.soft import SoftMaskUpdater
from .harmodt import RandomMaskSettings, UpdatedMaskLearner, mask_settings
from .learner import Setup


@dataclass(frozen=True)
class SoCoDTSettings(RandomMaskSettings):
    """Masks with values between 0 and 1, as sparse as each task's gradients ask for."""

    masks: SoftMaskSettings = SoftMaskSettings()

    @property
    def mask_levels(self) -> int:
        """L: a mask's values are 0, 1/L, 2/L, ... and 1."""
        return self.masks.mask_levels


class SoCoDTLearner(UpdatedMaskLearner):
    """Trains under soft masks, which begin as those of HarmoDT, with values of 0 and 1.

    Raises:
        UserError: as `RandomMaskLearner`.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        super().__init__(setup, data)
        masks = mask_settings(setup)
        assert isinstance(masks, SoftMaskSettings)
        self.updater = SoftMaskUpdater(
            self.bank, self.families, masks, setup.config.optimisation.steps
        )

    def update_masks(self, step: int) -> dict[str, float]:
        """Lower and raise values in every task's mask.

        `moved_weights` is the number of those that changed, of the task with most; `sparsity` each
        task's share of inactive weights.
        """
        update = self.updater.update(step, self.draw_of(step))
        moved = int((update.lowered + update.raised).max())
        shares = 1 - self.bank.active_counts().double() / self.vector.maskable_count()
        tasks = zip(self.setup.conditioning, shares.tolist(), strict=True)
        sparsity = {f"sparsity/{task.name}": share for task, share in tasks}
        return {"harmony": update.harmony, "moved_weights": moved} | sparsity

    def describe(self) -> dict[str, Any]:
        """As with masks of bits, without the number of active weights, which changes."""
        described = super().describe()
        del described["active_weights"]
        return described
