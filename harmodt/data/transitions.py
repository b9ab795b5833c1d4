"""Single steps and what came of them, from windows of two steps.

They are drawn as every window is (`windows.py`), so that a step's draws, and what is read ahead of
it, are those of any other algorithm with windows of that length.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..batch import Batch

WINDOW = 2
"""Steps of a window that a transition is made of."""


class Transitions(NamedTuple):
    """Transitions of several tasks: G groups of one task each, B transitions per group.

    Attributes:
        observations, next_observations: float32 [G, B, O], normalised.
        actions: float32 [G, B, A], in [-1, 1].
        rewards: float32 [G, B], divided by the return scale.
        terminal: bool [G, B], whether the episode ended with it, so that nothing follows.
        known: bool [G, B], False for the last step of an episode that was cut: what followed was
            not recorded.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminal: Tensor
    known: Tensor


def transitions_of(
    batch: Batch, actions: Tensor, episode_length: int, short_ends: bool
) -> Transitions:
    """The first step of each window of two, and what came of it.

    A store has no observation after an episode's last step, and does not say why it was the last.
    An episode of the environments' length was cut by the clock. A shorter one came to an end, as a
    walker that fell, or was cut as well, by whoever recorded it.

    Args:
        batch: windows of two steps, whose time steps are clipped at no less than `episode_length`.
        actions: float32 [G, B, 2, A], all of them.
        episode_length: steps of the environments' episodes.
        short_ends: whether a shorter episode came to an end.
    """
    history = batch.history
    last = ~history.valid[..., 1]
    to_go, later = history.returns_to_go.unbind(-1)
    terminal = last & (history.timesteps[..., 0] + 1 < episode_length) & short_ends
    return Transitions(
        observations=history.observations[..., 0, :],
        actions=actions[..., 0, :],
        # Exact but for the rounding of returns-to-go: 5e-4 of a reward where those are 5000.
        rewards=to_go - later.masked_fill(last, 0.0),
        next_observations=history.observations[..., 1, :],
        terminal=terminal,
        known=~last | terminal,
    )
