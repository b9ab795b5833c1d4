"""Makes transitions (a step, its reward and the next observation) from windows of two steps.

The sampler in `windows.py` draws these windows in the same way as all other windows.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from ..batch import Batch
from ..environments import EnvironmentSpec, family
from .store import UNKNOWN

WINDOW = 2
"""Number of steps in the window of a transition."""


class Transitions(NamedTuple):
    """Transitions of several tasks: G groups of B transitions, each group from one task.

    Attributes:
        observations, next_observations: float32 [G, B, O], normalised.
        actions: float32 [G, B, A], in [-1, 1].
        rewards: float32 [G, B], divided by the return scale.
        terminal: bool [G, B], True if the task ended with the step, so that nothing follows.
        known: bool [G, B], False for the last step of a truncated episode, because the data do not
            contain its next observation.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminal: Tensor
    known: Tensor


_Array = TypeVar("_Array", np.ndarray, Tensor)


def is_terminal(terminated: _Array, lengths: _Array, environment: EnvironmentSpec) -> _Array:
    """Whether an episode's last step is terminal, so that nothing follows it, bool [...].

    An episode whose ending is unknown counts as terminated if it is shorter than the environment's
    `episode_length` and the family's episodes can end early. In other families a short episode was
    cut when it was recorded, for example at the first success.

    Args:
        terminated: int8 [...], as in `store.Episodes`.
        lengths: int64 [...], the number of steps of each episode.
        environment: the environment in which the data were recorded.
    """
    found = terminated == 1
    if family(environment.family).ends_early:
        found |= (terminated == UNKNOWN) & (lengths < environment.episode_length)
    return found


def transitions_of(batch: Batch, actions: Tensor, environment: EnvironmentSpec) -> Transitions:
    """Make a transition from the first step of each window of two steps.

    A store has no observation after an episode's last step. If that step is terminal, no next
    observation is needed. If it is not terminal, the transition is not known.

    Args:
        batch: windows of two steps from a store. Its time steps must not be clipped below the
            environment's `episode_length`.
        actions: float32 [G, B, 2, A], including the actions that the batch hides.
        environment: the environment in which the data were recorded.
    """
    history = batch.history
    assert batch.terminated is not None
    last = ~history.valid[..., 1]
    to_go, later = history.returns_to_go.unbind(-1)
    # This is the episode's length only if the window begins at the episode's last step.
    lengths = history.timesteps[..., 0] + 1
    terminal = last & is_terminal(batch.terminated, lengths, environment)
    return Transitions(
        observations=history.observations[..., 0, :],
        actions=actions[..., 0, :],
        # Returns-to-go are rounded, so a reward has an error of up to 5e-4 if they are near 5000.
        rewards=to_go - later.masked_fill(last, 0.0),
        next_observations=history.observations[..., 1, :],
        terminal=terminal,
        known=~last | terminal,
    )
