"""Means and intervals, beside published values, listed resamples and plain loops."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmodt.statistics import (
    average,
    bootstrap_means,
    interquartile_mean,
    paired_difference,
    seed_deviation,
    wilson_interval,
)


# Table I of R. G. Newcombe, "Two-sided confidence intervals for the single proportion",
# Statistics in Medicine 17 (1998), method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_the_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_bounds_are_where_the_score_test_turns(trials, share):
    successes = round(share * trials)
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if bound not in (0, 1):
            score = abs(rate - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert score == pytest.approx(1.959964, abs=1e-4)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def bootstrap_variance(values: np.ndarray) -> float:
    """Of the mean of a resample: analysis of variance of [seeds, tasks, episodes].

    Drawing seeds, tasks and episodes each with replacement, the effect of the seeds is averaged
    over as many draws as there are seeds, and so on.
    """
    seeds, tasks, episodes = values.shape
    cells = values.mean(2)
    seed = cells.mean(1, keepdims=True) - cells.mean()
    task = cells.mean(0, keepdims=True) - cells.mean()
    both = cells - cells.mean() - seed - task
    within = values.var(2).mean() / (seeds * tasks * episodes)
    return (
        (seed**2).mean() / seeds + (task**2).mean() / tasks
        + (both**2).mean() / (seeds * tasks) + within
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1, 20), (1, 9, 10), (1, 9, 1), (3, 1, 10), (3, 5, 4)])
@pytest.mark.parametrize("binary", [True, False])
def test_resampled_means_vary_as_the_analysis_of_variance_says(shape, binary):
    rng = np.random.default_rng(1)
    seeds, tasks, _ = shape
    values = (
        rng.normal(size=(seeds, 1, 1)) + rng.normal(size=(1, tasks, 1)) + rng.normal(size=shape)
    )
    if binary:
        values = values > 0
    means = bootstrap_means(values, 40_000)
    expected = bootstrap_variance(values.astype(float))
    # 40,000 draws give a variance to within 0.7 % (one deviation of a normal's) and a mean to
    # within 0.5 % of its deviation.
    assert means.var() == pytest.approx(expected, rel=0.04)
    assert abs(means.mean() - values.mean()) < 0.025 * math.sqrt(expected)


def test_resampled_means_are_distributed_as_if_all_resamples_were_listed():
    values = np.array([[[0, 1], [2, 7]]], float)  # one seed, two tasks, two episodes
    listed = []
    for tasks in itertools.product(range(2), repeat=2):
        for draws in itertools.product(range(2), repeat=4):
            pairs = (draws[:2], draws[2:])
            listed.append(
                np.mean([values[0, t, list(e)] for t, e in zip(tasks, pairs, strict=True)])
            )
    found, counts = np.unique(bootstrap_means(values, 50_000), return_counts=True)
    expected, weights = np.unique(listed, return_counts=True)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(counts / 50_000, weights / len(listed), atol=0.01)


def test_the_averages_interval_covers_the_mean_of_all_tasks_that_could_have_been():
    """Tasks drawn from a population whose mean is 0.6: about 95 % of the intervals hold it.

    Wilson's interval of the pooled episodes, which takes the tasks for the only ones, holds it in
    two thirds of the cases at most.
    """
    rng = np.random.default_rng(2)
    covered = pooled = 0
    for _ in range(200):
        rates = rng.beta(1.2, 0.8, size=(1, 30, 1))
        solved = rng.random((1, 30, 10)) < rates
        low, high = np.quantile(bootstrap_means(solved, 1000), (0.025, 0.975))
        covered += low <= 0.6 <= high
        low, high = wilson_interval(int(solved.sum()), solved.size)
        pooled += low <= 0.6 <= high
    assert 0.9 <= covered / 200 <= 0.99
    assert pooled / 200 < 0.8


def middle_mean(numbers: list[float]) -> float:
    """Without the lowest and the highest quarter, rounded down: by a list."""
    cut = len(numbers) // 4
    kept = sorted(numbers)[cut : len(numbers) - cut]
    return math.fsum(kept) / len(kept)


def plain_bootstrap(values: np.ndarray, resamples: int) -> list[float]:
    """Interquartile means of resamples, in loops, with another generator."""
    rng, drawn = random.Random(5), []
    seeds, tasks, episodes = values.shape
    for _ in range(resamples):
        chosen_seeds = [rng.randrange(seeds) for _ in range(seeds)]
        chosen_tasks = [rng.randrange(tasks) for _ in range(tasks)]
        pairs = [
            math.fsum(values[s, t, rng.randrange(episodes)] for _ in range(episodes)) / episodes
            for s in chosen_seeds
            for t in chosen_tasks
        ]
        drawn.append(middle_mean(pairs))
    return drawn


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3, 2), (2, 2, 1), (1, 5, 2), (3, 7, 4)])
def test_the_interquartile_mean_is_that_of_a_sorted_list(shape):
    values = np.random.default_rng(3).normal(size=shape)
    expected = middle_mean([float(np.mean(pair)) for seed in values for pair in seed])
    assert interquartile_mean(values).mean == pytest.approx(expected, rel=1e-12)


def test_an_interquartile_mean_leaves_out_what_is_far_off():
    values = np.array([[[0.1], [0.2], [0.4], [900.0]]])
    assert interquartile_mean(values).mean == pytest.approx(0.3)
    assert average(values).mean == pytest.approx(225.175)


def test_intervals_of_interquartile_means_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(4).gamma(1.0, size=(3, 6, 5))
    drawn = plain_bootstrap(values, 4000)
    found = interquartile_mean(values)
    for bound, level in ((found.low, 0.025), (found.high, 0.975)):
        # 4000 draws put the bound's level within 0.0025 (one deviation) of the true one, and
        # 10,000 draws the bound itself within 0.0016: four deviations of both.
        share = sum(number <= bound for number in drawn) / len(drawn)
        assert abs(share - level) < 0.012


@pytest.mark.parametrize("mean", [average, interquartile_mean])
@pytest.mark.parametrize("solved", [True, False])
def test_a_rate_of_0_or_1_has_wilsons_interval(mean, solved):
    found = mean(np.full((2, 3, 4), solved))
    assert (found.mean, found.low, found.high) == (solved, *wilson_interval(24 * solved, 24))


def test_a_pair_of_runs_on_the_same_goals_is_told_apart_where_two_runs_are_not():
    """Tasks differ by far more than the two runs do, and hard goals are hard for both."""
    rng = np.random.default_rng(6)
    hardness = rng.normal(size=(1, 20, 1)) + rng.normal(size=(2, 20, 10))
    a, b = hardness < 0.3, hardness < 0.0
    found, one, other = paired_difference(a, b), average(a), average(b)
    assert found.mean == pytest.approx(one.mean - other.mean) and found.low > 0
    assert one.low < other.high  # their own intervals overlap
    unpaired = np.hypot(one.high - one.low, other.high - other.low)
    assert found.high - found.low < 0.6 * unpaired


def test_a_difference_varies_as_that_of_the_pairs():
    """Two tasks of two episodes, listed: tasks are drawn once for both, and so are episodes."""
    a, b = np.array([[[5.0, 7.0], [1.0, 0.0]]]), np.array([[[4.0, 4.0], [1.0, 2.0]]])
    differences = (a - b)[0]
    means = [
        np.mean([differences[t][e] for t, e in zip((t1, t1, t2, t2), episodes, strict=True)])
        for t1, t2 in itertools.product(range(2), repeat=2)
        for episodes in itertools.product(range(2), repeat=4)
    ]
    found = paired_difference(a, b)
    assert found.mean == 0.5
    # All 64 resamples are as likely; no bound falls on a step of their distribution.
    low, high = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (0, 0), (1, 0), (0, 1)])
def test_pairs_that_are_all_alike_do_not_make_certain(a, b):
    """Of 20 pairs that all differ by d, Wilson lets 16.11 % be others: Newcombe's 0 of 20."""
    found = paired_difference(np.full((1, 4, 5), a, bool), np.full((1, 4, 5), b, bool))
    bounds = {0: (-0.1611, 0.1611), 1: (1 - 2 * 0.1611, 1), -1: (-1, -1 + 2 * 0.1611)}[a - b]
    assert found.mean == a - b
    assert (found.low, found.high) == pytest.approx(bounds, abs=1e-4)


def test_values_of_other_shapes_make_no_pairs():
    with pytest.raises(ValueError, match="make no pairs"):
        paired_difference(np.ones((2, 3, 4)), np.ones((1, 3, 4)))


def test_the_deviation_over_seeds():
    values = np.array([[[0.0, 1.0]], [[1.0, 1.0]], [[0.5, 1.0]]])
    assert seed_deviation(values) == pytest.approx(0.25)  # of 0.5, 1 and 0.75
    assert seed_deviation(values[:1]) is None
