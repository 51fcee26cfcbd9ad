"""Intervals and tests for shares, paired answers and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from jaxcrit.core.errors import UserError

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)
_CHUNK = 500  # draws of a bootstrap whose weights are held at a time


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a share k/n (Wilson 1927); good down to few trials, and at 0 and n.

    Raises:
        UserError: n below 1, k outside 0..n, or a level outside (0, 1).

    Example:
        >>> tuple(round(end, 3) for end in wilson(0, 30))
        (0.0, 0.114)
    """
    _check(k, n, level)
    found = stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def newcombe(k1: int, n1: int, k2: int, n2: int, level: float = 0.95) -> Interval:
    """Interval of the difference k1/n1 - k2/n2 of two independent shares (Newcombe 1998, method 10, of two Wilsons).

    Raises:
        UserError: as `wilson`.
    """
    (low1, high1), (low2, high2) = wilson(k1, n1, level), wilson(k2, n2, level)
    p1, p2 = k1 / n1, k2 / n2
    return (
        p1 - p2 - math.hypot(p1 - low1, high2 - p2),
        p1 - p2 + math.hypot(high1 - p1, p2 - low2),
    )


def placements(negative: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the other group that each score lies on the right side of; a tie is half (DeLong et al. 1988).

    Args:
        negative: ``[n]`` scores that should be low.
        positive: ``[m]`` scores that should be high.

    Returns:
        ``[m]`` share of the negatives below each positive, and ``[n]`` of the positives above each negative.
    """
    m, n = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    return (ranks[:m] - stats.rankdata(positive)) / n, 1 - (ranks[m:] - stats.rankdata(negative)) / m


def auroc(negative: np.ndarray, positive: np.ndarray, level: float = 0.95) -> tuple[float, Interval]:
    """Chance that a positive scores above a negative, ties half, and its interval.

    The interval is DeLong's on the logit scale. Where all pairs are in one order its variance is 0; then as many
    disjoint pairs as the smaller group has are independent, and the interval is `wilson` of these.

    Args:
        negative: ``[n]`` scores that should be low.
        positive: ``[m]`` scores that should be high.
        level: confidence level, as 0.95.

    Returns:
        NaN for an empty group; no interval where a group has one score, or all scores are equal.

    Example:
        >>> auroc([1, 2, 3], [3, 4])[0]
        0.9166666666666666
    """
    negative, positive = np.asarray(negative, np.float64), np.asarray(positive, np.float64)
    m, n = len(positive), len(negative)
    if not min(m, n):
        return math.nan, UNKNOWN
    ranks = stats.rankdata(np.concatenate([positive, negative]))[:m]
    value = float(ranks.sum() - m * (m + 1) / 2) / (m * n)  # whole numbers and halves until here: exact
    if value in (0, 1):
        return value, wilson(round(value * min(m, n)), min(m, n), level)
    error = _delong(*placements(negative, positive))
    if not error > 0:
        return value, UNKNOWN
    middle, half = math.log(value / (1 - value)), stats.norm.ppf((1 + level) / 2) * error / (value * (1 - value))
    return value, (float(special.expit(middle - half)), float(special.expit(middle + half)))


def auroc_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], level: float = 0.95
) -> tuple[float, Interval]:
    """Difference of the `auroc` of two scores of the same rows, and its interval (DeLong's, paired).

    Args:
        first: negatives ``[n]`` and positives ``[m]`` by one score.
        second: the same rows by the other.
        level: confidence level, as 0.95.
    """
    if not min(map(len, first)):
        return math.nan, UNKNOWN
    value = auroc(*first)[0] - auroc(*second)[0]
    pairs = zip(placements(*first), placements(*second), strict=True)
    half = stats.norm.ppf((1 + level) / 2) * _delong(*(one - other for one, other in pairs))
    return value, (value - half, value + half) if half > 0 else UNKNOWN


def _delong(positive: np.ndarray, negative: np.ndarray) -> float:
    """Standard error from `placements`; NaN for a group of one."""
    if min(len(positive), len(negative)) < 2:
        return math.nan
    return math.sqrt(sum(group.var(ddof=1) / len(group) for group in (positive, negative)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that paired answers differ by chance alone, from the pairs that differ; 1 where none does.

    Args:
        only_first: pairs in which only the first succeeds.
        only_second: pairs in which only the second does.

    Raises:
        UserError: a negative count.
    """
    if min(only_first, only_second) < 0:
        raise UserError(f"expected counts of pairs of at least 0, got {only_first} and {only_second}")
    differ = only_first + only_second
    return float(stats.binomtest(only_first, differ).pvalue) if differ else 1.0


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean of one value per seed; NaN for fewer than two."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return UNKNOWN
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def t_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p that paired differences, one per seed, have mean 0.

    NaN for fewer than two; 1 where all are 0. Where all are equal and not 0, Student's p would be 0 however few the
    seeds are, so the sign test's is given: 2^(1-n).
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return math.nan
    if np.ptp(values) == 0:
        return 1.0 if values[0] == 0 else 2.0 ** (1 - len(values))
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def two_level_bootstrap(outcomes: np.ndarray, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """Percentile interval of the mean when both the seeds and the prompts are a sample of many.

    Seeds are drawn, and prompts are drawn once for all seeds, for every seed answers the same prompts (the pigeonhole
    bootstrap, Owen 2007). Percentiles are widened for few seeds S, to Φ(-t √(S/(S-1))) with Student's t of S-1
    degrees (Hesterberg 2015): plain ones of 5 seeds would cover some 85 % where 95 is said.

    Args:
        outcomes: ``[S, N]`` of each seed's answer to each prompt: 0 or 1, or a difference.
        level: confidence level, as 0.95.
        draws: number of draws of the bootstrap.
        seed: seed of the draws.

    Returns:
        The ends; NaN for fewer than two seeds. Both are the mean where all outcomes are equal: then `wilson` of a
        single seed says how little that may mean.

    Raises:
        UserError: no prompts, or a level outside (0, 1).
    """
    outcomes = np.asarray(outcomes, np.float64)
    if outcomes.ndim != 2 or not outcomes.size or not 0 < level < 1:
        raise UserError(f"expected outcomes [seeds, prompts] and a level in (0, 1), got {outcomes.shape}, {level}")
    seeds, prompts = outcomes.shape
    if seeds < 2:
        return UNKNOWN
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, _CHUNK):
        count = min(_CHUNK, draws - start)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), count)
        of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), count)
        means.append(np.einsum("bs,bs->b", of_seeds, of_prompts @ outcomes.T) / outcomes.size)
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, seeds - 1) * math.sqrt(seeds / (seeds - 1)))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): comparing each to α keeps the chance of any false finding below α.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(order)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * float(p_values[place])))
        adjusted[int(place)] = highest
    return adjusted


def _check(k: int, n: int, level: float) -> None:
    if n < 1 or not 0 <= k <= n or not 0 < level < 1:
        raise UserError(f"expected 0 <= k <= n, n at least 1 and a level in (0, 1), got k={k}, n={n}, level={level}")
