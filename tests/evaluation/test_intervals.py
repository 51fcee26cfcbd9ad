"""Intervals and tests: published examples, closed forms, SciPy, and how often they cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcrit.core.errors import UserError
from jaxcrit.evaluation.intervals import (
    auroc,
    auroc_difference,
    holm,
    mcnemar,
    newcombe,
    placements,
    t_interval,
    t_test,
    two_level_bootstrap,
    wilson,
)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_the_closed_form(n, share, level):
    k = round(share * n)
    z, p = stats.norm.ppf((1 + level) / 2), k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    np.testing.assert_allclose(wilson(k, n, level), (max(0, middle - half), min(1, middle + half)), atol=1e-12)


@pytest.mark.parametrize("n", [30, 100, 300])
def test_wilson_covers_on_average(n):
    shares = np.linspace(0.01, 0.99, 99)
    low, high = np.array([wilson(k, n) for k in range(n + 1)]).T
    covers = (low <= shares[:, None]) & (shares[:, None] <= high)
    # All outcomes with their probabilities: what a simulation would approach.
    coverage = (stats.binom.pmf(np.arange(n + 1), n, shares[:, None]) * covers).sum(axis=1)
    assert 0.945 < coverage.mean() < 0.96 and coverage.min() > 0.83


def test_newcombe_of_the_published_example():
    # Newcombe 1998, table II, case (a), method 10.
    np.testing.assert_allclose(newcombe(56, 70, 48, 80), (0.0524, 0.3339), atol=5e-5)
    low, high = newcombe(0, 40, 40, 40)
    assert low == -1 and high < -0.85
    np.testing.assert_allclose(newcombe(48, 80, 56, 70), (-0.3339, -0.0524), atol=5e-5)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_twice_the_smaller_tail(b, c):
    expected = min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5))
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9) == mcnemar(c, b)


def test_seeds():
    values = [0.2, 0.5, 0.4, 0.9]
    known = stats.ttest_1samp(values, 0.0)
    np.testing.assert_allclose(t_interval(values), known.confidence_interval(0.95))
    assert t_test(values) == pytest.approx(known.pvalue)
    assert math.isnan(t_test([0.5])) and all(map(math.isnan, t_interval([0.5])))
    assert t_test([0.0, 0.0, 0.0]) == 1.0 and t_test([1.0, 1.0, 1.0]) == 0.25


def test_two_level_bootstrap_covers():
    rng = np.random.default_rng(0)
    seeds, prompts, rounds, truth = 5, 60, 250, 0.0
    for spread_of_seeds, spread_of_prompts in ((0.3, 0.3), (0.0, 0.5), (0.5, 0.0)):
        covered = 0
        for _ in range(rounds):
            levels = spread_of_seeds * rng.normal(size=(seeds, 1)) + spread_of_prompts * rng.normal(size=prompts)
            low, high = two_level_bootstrap(levels + 0.3 * rng.normal(size=(seeds, prompts)), draws=500)
            covered += low <= truth <= high
        # Five seeds and 500 draws: the outermost ones stand for the widened percentile.
        assert covered / rounds > 0.90


def test_two_level_bootstrap_widens_with_either_level():
    rng = np.random.default_rng(1)
    answers = (rng.random((5, 80)) < 0.5).astype(float)
    same_prompts = np.repeat((rng.random(80) < 0.5).astype(float)[None], 5, axis=0)
    by_seed = np.repeat(np.array([[0.0], [0.0], [1.0], [1.0], [1.0]]), 80, axis=1)
    widths = [np.diff(two_level_bootstrap(one))[0] for one in (answers, same_prompts, by_seed)]
    assert widths[0] < widths[1] < widths[2]
    assert two_level_bootstrap(np.ones((3, 10))) == (1.0, 1.0)
    assert all(map(math.isnan, two_level_bootstrap(np.ones((1, 10)))))
    assert two_level_bootstrap(answers, seed=3) == two_level_bootstrap(answers, seed=3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_between_nothing_and_bonferroni(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_bad_input():
    for k, n, level in ((1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)):
        with pytest.raises(UserError, match="expected 0 <= k <= n"):
            wilson(k, n, level)
    with pytest.raises(UserError, match="at least 0"):
        mcnemar(-1, 2)
    with pytest.raises(UserError, match="outcomes"):
        two_level_bootstrap(np.zeros((3, 0)))


def ordered(positive, negative):
    """Whether each positive is above each negative, ``[m, n]``; a tie is half."""
    return (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_auroc_is_the_share_of_ordered_pairs(negative, positive):
    negative, positive = np.array(negative, float), np.array(positive, float)
    pairs = ordered(positive, negative)
    value, (low, high) = auroc(negative, positive)
    assert value == pytest.approx(pairs.mean(), abs=1e-12)
    assert math.isnan(low) or (low <= value <= high and 0 <= low <= high <= 1)
    above, below = placements(negative, positive)
    np.testing.assert_allclose(above, pairs.mean(axis=1))
    np.testing.assert_allclose(below, pairs.mean(axis=0))


def test_auroc_at_its_ends():
    value, (low, high) = auroc(np.arange(8), np.arange(8, 200))
    assert (value, low) == (1, wilson(8, 8)[0]) and high == pytest.approx(1)
    assert auroc(np.arange(8, 200), np.arange(8))[0] == 0
    same = np.random.default_rng(0).standard_normal(30)
    assert auroc(same, same)[0] == 0.5
    assert math.isnan(auroc(np.zeros(5), np.zeros(5))[1][0]) and math.isnan(auroc(np.zeros(0), np.ones(3))[0])
    assert math.isnan(auroc(np.array([0.5]), np.array([0.0, 1.0]))[1][0])


def test_delongs_intervals_cover():
    rng, truth = np.random.default_rng(0), stats.norm.cdf(1.2 / math.sqrt(2))
    covers = apart = 0
    for _ in range(400):
        shared, first, second = (rng.standard_normal(70) for _ in range(3))
        shift = 1.2 * (np.arange(70) >= 30)
        one, other = ((shared + own) / math.sqrt(2) + shift for own in (first, second))
        low, high = auroc(one[:30], one[30:])[1]
        covers += low <= truth <= high
        low, high = auroc_difference((one[:30], one[30:]), (other[:30], other[30:]))[1]
        apart += low <= 0 <= high
    assert 0.92 < covers / 400 < 0.98 and 0.92 < apart / 400 < 0.98


def test_a_paired_difference_knows_that_rows_are_shared():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(80) + 1.0 * (np.arange(80) >= 40)
    better = hard + 0.3 * (np.arange(80) >= 40)
    value, (low, high) = auroc_difference((better[:40], better[40:]), (hard[:40], hard[40:]))
    assert value == auroc(better[:40], better[40:])[0] - auroc(hard[:40], hard[40:])[0] and 0 < low < value < high
    assert math.isnan(auroc_difference((hard[:0], hard), (hard[:0], hard))[0])
