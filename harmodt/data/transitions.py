"""Single steps and what came of them, from windows of two steps.

They are drawn as every window is (`windows.py`), so that a step's draws, and what is read ahead of
it, are those of any other algorithm with windows of that length.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from ..batch import Batch
from ..environments import EnvironmentSpec, family
from .store import UNKNOWN

WINDOW = 2
"""Steps of a window that a transition is made of."""


class Transitions(NamedTuple):
    """Transitions of several tasks: G groups of one task each, B transitions per group.

    Attributes:
        observations, next_observations: float32 [G, B, O], normalised.
        actions: float32 [G, B, A], in [-1, 1].
        rewards: float32 [G, B], divided by the return scale.
        terminal: bool [G, B], whether the task came to its end with it, so that nothing follows.
        known: bool [G, B], False for the last step of an episode that was cut: nobody recorded
            what followed.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminal: Tensor
    known: Tensor


_Array = TypeVar("_Array", np.ndarray, Tensor)


def is_terminal(terminated: _Array, lengths: _Array, environment: EnvironmentSpec) -> _Array:
    """Whether nothing follows the last step of an episode, bool [...].

    Where the data do not say how an episode ended, it terminated if it is shorter than the
    environments' episodes and these can end early. Other short episodes were cut when they were
    recorded, as many are at the first success.

    Args:
        terminated: int8 [...], as in `store.Episodes`.
        lengths: int64 [...], steps of the episode.
    """
    found = terminated == 1
    if family(environment.family).ends_early:
        found |= (terminated == UNKNOWN) & (lengths < environment.episode_length)
    return found


def transitions_of(batch: Batch, actions: Tensor, environment: EnvironmentSpec) -> Transitions:
    """The first step of each window of two, and what came of it.

    A store has no observation after an episode's last step. Nothing is needed of it where the step
    is terminal; else the transition is not known.

    Args:
        batch: windows of two steps from a store, whose time steps are clipped at no less than the
            environments' `episode_length`.
        actions: float32 [G, B, 2, A], all of them.
        environment: that the data were recorded in.
    """
    history = batch.history
    assert batch.terminated is not None
    last = ~history.valid[..., 1]
    to_go, later = history.returns_to_go.unbind(-1)
    # Only of a last step is this the episode's length.
    lengths = history.timesteps[..., 0] + 1
    terminal = last & is_terminal(batch.terminated, lengths, environment)
    return Transitions(
        observations=history.observations[..., 0, :],
        actions=actions[..., 0, :],
        # Exact but for the rounding of returns-to-go: 5e-4 of a reward where those are 5000.
        rewards=to_go - later.masked_fill(last, 0.0),
        next_observations=history.observations[..., 1, :],
        terminal=terminal,
        known=~last | terminal,
    )
