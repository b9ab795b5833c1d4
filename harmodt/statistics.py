"""Means over the results of runs, with 95 % intervals.

Values have the shape [seeds, tasks, episodes]. They are successes as bool, or returns. An interval
is the percentile interval of a bootstrap that resamples all three axes (`bootstrap`). It therefore
holds for other seeds and for other tasks of the same kind. Agarwal et al. (Deep Reinforcement
Learning at the Edge of the Statistical Precipice, 2021) recommend interquartile means and such
intervals for results of few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Average:
    """A mean of any kind, and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def average(values: np.ndarray) -> Average:
    """Return the mean over seeds, tasks and episodes.

    A bootstrap has no spread where all episodes are equal. A success rate of 0 or 1 therefore has
    Wilson's interval, computed from all episodes together.

    Args:
        values: bool or float [seeds, tasks, episodes].
    """
    return Average(float(values.mean()), *_interval(values, _mean))


def interquartile_mean(values: np.ndarray) -> Average:
    """Return the mean of the middle half of the seeds × tasks results.

    A result is a run's mean over its episodes of a task. The lowest and the highest quarter of the
    results are left out. Their number is rounded down: of fewer than four results, none is left
    out. The interval is computed as in `average`.

    Args:
        values: bool or float [seeds, tasks, episodes].
    """
    found = _middle_mean(values.mean(2).reshape(1, -1))[0]
    return Average(float(found), *_interval(values, _middle_mean))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Average:
    """Return the mean of `a` minus the mean of `b`, both [seeds, tasks, episodes].

    Entries with the same index have the same training seed and the same goal. Each resample draws
    the same entries of both, so that effects which both share cancel.

    If all n pairs of successes have the same difference d (-1, 0 or 1), the bootstrap has no
    spread. The bounds are then the means that result if a share s of the pairs has the difference
    -1, or 1, instead of d. s is the upper bound of Wilson's interval for 0 successes in n trials.

    Raises:
        ValueError: the shapes differ.
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
    """Return the sample standard deviation of the seeds' means; None for a single seed."""
    means = values.mean((1, 2))
    return float(means.std(ddof=1)) if len(means) > 1 else None


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """Return a statistic of resampled values, float64 [resamples]. Its spread is its uncertainty.

    A resample draws seeds with replacement and tasks with replacement. For each pair of a drawn
    seed and a drawn task it draws that pair's episodes with replacement. (This is a nested
    bootstrap: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997,
    section 3.8.) The interval therefore also holds for other seeds and for other tasks of the same
    kind. Two errors remain. The noise of the episodes counts twice, because it is also part of the
    differences between tasks; this makes the interval too wide. Few seeds or few tasks make it too
    narrow.

    Args:
        values: bool or float [seeds, tasks, episodes].
        statistic: a function of the mean over episodes of each seed × task pair; it maps
            [n, pairs] to [n].
        resamples: the number of resamples; every call draws the same ones.
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
    """Return the `bootstrap` of the mean, float64 [resamples]."""
    return bootstrap(values, _mean, resamples)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes: the number of successes, 0 to `trials`.
        trials: the number of trials, at least 1.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    half_width = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    low = (centre - half_width) / scale if successes else 0.0  # exact, with no rounding error
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
    """Return the mean of each row without its lowest and its highest quarter."""
    count = pairs.shape[1]
    return np.sort(pairs, axis=1)[:, count // 4 : count - count // 4].mean(1)
