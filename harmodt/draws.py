"""Random numbers of a run. Each number is a function of (seed, purpose, step) and a counter.

The generator keeps no state between draws. A run that resumes from a checkpoint at a step therefore
draws the same numbers as a run without interruption. Draws use integer arithmetic, so all devices
draw the same numbers. Normal numbers are the exception: they use floating-point arithmetic.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011). Each of its 32-bit words is stored as an int64.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN, MASKS, INITIALISE, TASKS, DROPOUT, NOISE, SURGERY = range(7)
"""The purposes of draws."""

# The constants of Philox4x32-10.
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Draws:
    """The draws for one purpose in one step of a run, or in several steps.

    Attributes:
        seed: the seed of the run.
        purpose: one of the purposes of this module.
        step: the step, below 2^32; or an int64 tensor of steps, which broadcasts with the counters.
    """

    seed: int
    purpose: int
    step: int | Tensor

    def words(self, position: Tensor, group: int | Tensor = 0, block: int | Tensor = 0) -> Tensor:
        """Four random words for each counter; they do not depend on the other counters.

        Args:
            position, group, block: the counter, int64, each below 2^32. Their shapes broadcast to
                [...]. The words are on the device of `position`.

        Returns:
            int64 [4, ...] in [0, 2^32).
        """
        parts = (position, group, self.step, block)
        shape = torch.broadcast_shapes(*(p.shape for p in parts if isinstance(p, Tensor)))
        counter = torch.empty((4, *shape), dtype=torch.int64, device=position.device)
        for row, value in zip(counter, parts, strict=True):
            row.copy_(value) if isinstance(value, Tensor) else row.fill_(value)
        return philox(counter, _key(self.seed, self.purpose))


@dataclass(frozen=True)
class Seeds:
    """The seed of a run, which also seeds PyTorch's generator."""

    seed: int

    def begin(self, purpose: int, step: int, *more: int) -> Draws:
        """Seed PyTorch's generator, from which dropout draws, and return the step's draws.

        Args:
            more: numbers that distinguish several computations within a step.
        """
        numbers = (self.seed, purpose, step, *more)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        return Draws(self.seed, purpose, step)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: four random words from the four words of each counter.

    Args:
        counter: int64 [4, ...] in [0, 2^32).
        key: two words.

    Returns:
        int64 [4, ...] in [0, 2^32).
    """
    rounds, half, word = _constants(key, counter.device)
    pairs = counter.view(2, 2, -1)
    even, product = pairs[:, 0], pairs[:, 1]
    for multipliers, round_key in rounds:
        # A round of Philox exchanges the two pairs of words. This code does not exchange them, and
        # `rounds` has the constants of every second round in reverse order instead. Ten exchanges
        # cancel out, so the result has Philox's order. The odd words are the lower halves of
        # `product`, and `& word` clears the upper halves.
        odd = product.flip(0)
        product = even * multipliers  # overflow wraps around, and all 64 bits are correct
        even = (product >> half).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(word)
    return torch.stack((even, product.bitwise_and_(word)), 1).view(counter.shape)


def below(words: Tensor, limit: int | Tensor) -> Tensor:
    """Turn random words into integers from 0 to limit - 1, int64 of their shape; limit ≤ 2^31."""
    return (words * limit) >> 32


def coin(words: Tensor, probability: float) -> Tensor:
    """True with a probability, bool of the words' shape; always True at 1, never at 0."""
    return words < round(probability * 2**32)


def normal(words: Tensor) -> Tensor:
    """Turn random words into standard normal numbers, two words into two (Box and Muller).

    Args:
        words: int64 [2 n, ...].

    Returns:
        float32 of their shape.
    """
    lengths, angles = ((words.double() + 0.5) / 2**32).chunk(2)
    lengths, angles = (-2 * lengths.log()).sqrt(), 2 * math.pi * angles
    return torch.cat((lengths * angles.cos(), lengths * angles.sin())).float()


def choose(words: Tensor, count: int) -> Tensor:
    """The indices of the `count` smallest of n < 2^31 random words; if words are equal, the first
    is taken.

    Args:
        words: int64 [..., n].

    Returns:
        int64 [..., count], in rising order.
    """
    size = words.shape[-1]
    # Each key is unique: the word first, then the index.
    keys = words * size + torch.arange(size, device=words.device)
    return (keys.sort().values[..., :count] % size).sort().values


def dropout_seeds(seed: int, purpose: int, steps: Tensor, count: int, part: int = 0) -> Tensor:
    """The seeds of dropout in some steps, in [0, 2^31).

    Args:
        seed: the seed of the run.
        purpose: the purpose of the steps, TRAIN or MASKS.
        steps: int64 [S].
        count: n, the number of dropouts in the model.
        part: a number that distinguishes several computations within a step.

    Returns:
        int64 [S, n].
    """
    places = torch.arange(count, device=steps.device)
    words, *_ = Draws(seed, DROPOUT, steps[:, None]).words(places, purpose, part)
    return words >> 1


@functools.cache
def _key(seed: int, purpose: int) -> tuple[int, int]:
    first, second = np.random.SeedSequence((seed, purpose)).generate_state(2, np.uint32).tolist()
    return first, second


@functools.cache
def _constants(
    key: tuple[int, int], device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The constants of `philox`: each round's multipliers and key; the shift 32; the word mask.

    All are int64 tensors [2, 1]. For few words, tensors are twice as fast as Python numbers. Every
    second round has its constants in reverse order, because `philox` does not exchange the words.
    """
    table = []
    for i in range(_ROUNDS):
        round_key = [(word + i * step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True)]
        # Philox combines the first key with the second product, and the second with the first.
        order = slice(None, None, -1 if i % 2 else 1)
        table.append((_MULTIPLIERS[order], round_key[::-1][order]))
    rounds = [tuple(pair) for pair in torch.tensor(table, device=device)[..., None]]
    half, word = torch.tensor([[32] * 2, [_WORD] * 2], device=device)[..., None]
    return rounds, half, word
