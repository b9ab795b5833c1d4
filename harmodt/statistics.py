"""Means of what runs came to, with intervals of 95 %.

Values are [seeds, tasks, episodes]: success as bool, or returns. An interval is the percentile
interval of a bootstrap that resamples all three (`bootstrap`), so it holds for other seeds and
other tasks of the same kind. Interquartile means and such intervals are what Agarwal et al. (Deep
Reinforcement Learning at the Edge of the Statistical Precipice, 2021) would have reports of few
seeds give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Average:
    """A mean of whatever kind, and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def average(values: np.ndarray) -> Average:
    """The mean over seeds, tasks and episodes.

    Where no two episodes differ, resampling them can show nothing: the interval of a success rate
    of 0 or 1 is then Wilson's of all episodes together.

    Args:
        values: bool or float [seeds, tasks, episodes].
    """
    return Average(float(values.mean()), *_interval(values, _mean))


def interquartile_mean(values: np.ndarray) -> Average:
    """The mean of the middle half of the runs' results on each task.

    A result is a run's mean over its episodes of a task: of the seeds × tasks results, the lowest
    and the highest quarter are left out (rounded down, so that of less than four none is). The
    interval is like that of `average`.

    Args:
        values: bool or float [seeds, tasks, episodes].
    """
    found = _middle_mean(values.mean(2).reshape(1, -1))[0]
    return Average(float(found), *_interval(values, _middle_mean))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Average:
    """How much larger the mean of `a` is than that of `b`, both [seeds, tasks, episodes].

    Seed by seed, task by task and episode by episode, the two are of the same training seed and the
    same goal. Each resample draws them for both, so what they have in common drops out. Where each
    pair of episodes differs by the same d, in [-1, 1], the interval is what follows from a share of
    other pairs that is as large as Wilson's interval of none among them lets it be.

    Raises:
        ValueError: they are of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"values of the shapes {a.shape} and {b.shape} make no pairs")
    differences = a.astype(np.float64) - b
    found, same = float(differences.mean()), float(differences.flat[0])
    if a.dtype == bool and (differences == same).all():
        _, others = wilson_interval(0, differences.size)
        return Average(same, same - others * (1 + same), same + others * (1 - same))
    return Average(found, *_interval(differences, _mean))


def seed_deviation(values: np.ndarray) -> float | None:
    """The sample deviation of the seeds' means; None of a single seed."""
    means = values.mean((1, 2))
    return float(means.std(ddof=1)) if len(means) > 1 else None


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of resampled evaluations, float64 [resamples]; its spread is its uncertainty.

    A resample draws the seeds and the tasks with replacement, every drawn seed with every drawn
    task, and for each such pair its episodes with replacement (a nested bootstrap; A. C. Davison
    and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). So the interval
    holds for other tasks of the same kind and other seeds, not for these alone. The episodes'
    chance also moves the rates that tasks are drawn by: it counts twice, which errs towards wide;
    that there are few tasks or seeds to draw from errs towards narrow.

    Args:
        values: bool or float [seeds, tasks, episodes].
        statistic: of the means over episodes of seeds × tasks pairs: from [n, pairs] to [n].
        resamples: how many; always the same ones.
    """
    rng = np.random.default_rng(0)
    seeds, tasks, episodes = values.shape
    found = np.empty(resamples)
    at_once = max(1, 2**20 // values.size)  # bounds the memory
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        seed = rng.integers(seeds, size=(count, seeds, 1, 1))
        task = rng.integers(tasks, size=(count, 1, tasks, 1))
        episode = rng.integers(episodes, size=(count, seeds, tasks, episodes))
        pairs = values[seed, task, episode].mean(3).reshape(count, -1)
        found[first : first + count] = statistic(pairs)
    return found


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """The `bootstrap` of the mean."""
    return bootstrap(values, _mean, resamples)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    half_width = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    low = (centre - half_width) / scale if successes else 0.0  # exactly, without rounding
    high = (centre + half_width) / scale if successes < trials else 1.0
    return low, high


def _interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    if values.dtype == bool and values.min() == values.max():
        return wilson_interval(int(values.sum()), values.size)
    low, high = np.quantile(bootstrap(values, statistic), (0.025, 0.975))
    return float(low), float(high)


def _mean(pairs: np.ndarray) -> np.ndarray:
    return pairs.mean(1)


def _middle_mean(pairs: np.ndarray) -> np.ndarray:
    """The mean without the lowest and the highest quarter, of each row."""
    count = pairs.shape[1]
    return np.sort(pairs, axis=1)[:, count // 4 : count - count // 4].mean(1)
