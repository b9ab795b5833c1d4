"""Random draws of a run, each seeded by (seed, purpose, step).

A run that goes on from a checkpoint draws what it would have drawn: the step is all of its random
state and data position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TRAIN, MASKS, INITIALISE = 0, 1, 2
"""What a draw is for."""


@dataclass(frozen=True)
class Seeds:
    """The draws of a run with some seed."""

    seed: int

    def begin(self, purpose: int, step: int, *more: int) -> np.random.Generator:
        """Seed PyTorch's generator for what comes next, and return one of NumPy for the same."""
        numbers = (self.seed, purpose, step, *more)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        return np.random.default_rng(numbers)
