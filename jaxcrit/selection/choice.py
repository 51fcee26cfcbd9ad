"""From scores to layers: the consensus of several datasets, the choice, and how firm the choice is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import LayerSpec, default_count, resolve

Multiplier = Literal["gaussian", "exponential"]
DRAWS = 2000
_MULTIPLIERS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "exponential": lambda rng, shape: rng.standard_exponential(shape) - 1,
}


def mean_rank(scores: Sequence[LayerScores]) -> LayerScores:
    """The consensus of one criterion over several datasets: each layer's mean rank.

    Ranks, because datasets differ more in the level of their curves than in the order of the layers.

    Args:
        scores: one criterion's scores of the same model, one per dataset.

    Returns:
        The score itself where there is one only; otherwise mean ranks from 0 (most critical), equal values sharing
        the middle of their ranks, valid where all are, direction ``low``, without ``stderr``.

    Raises:
        UserError: none given, or of different criteria or numbers of layers.
    """
    kinds = {(score.name, score.num_layers, score.direction) for score in scores}
    if len(kinds) != 1:
        raise UserError(f"expected scores of one criterion and one model, got {sorted(kinds) or 'none'}")
    if len(scores) == 1:
        return scores[0]
    first = scores[0]
    valid = np.logical_and.reduce([score.valid for score in scores])
    sign = 1 if first.direction == "low" else -1
    values = np.full(first.num_layers, np.nan)
    values[valid] = np.mean([_ranks(sign * score.values[valid]) for score in scores], axis=0)
    shared = {key: value for key, value in first.meta.items() if all(s.meta.get(key) == value for s in scores)}
    return LayerScores(first.name, values, valid, "low", None, {**shared, "consensus": "mean_rank", "of": len(scores)})


def choose(
    scores: LayerScores,
    count: int | None = None,
    *,
    fraction: float | None = None,
    trim: int = 2,
    model_hash: str | None = None,
) -> LayerSet:
    """The most critical layers, ties to the lower index.

    Args:
        scores: what to rank by.
        count: K; by default max(1, round(0.15 L)).
        fraction: share of all L layers, instead of a count.
        trim: layers at each end that are never chosen.
        model_hash: kept in the set.

    Raises:
        UserError: more layers asked for than there are, a fraction outside (0, 1], or both count and fraction.
    """
    if fraction is not None:
        if count is not None or not 0 < fraction <= 1:
            raise UserError(f"expected a count or a fraction in (0, 1], got count={count}, fraction={fraction}")
        count = max(1, round(fraction * scores.num_layers))
    spec = LayerSpec("critical", default_count(scores.num_layers) if count is None else count)
    return resolve(spec, scores.num_layers, scores=scores, trim=trim, model_hash=model_hash)


def selection_probability(
    scores: Sequence[LayerScores],
    without_each: Sequence[np.ndarray],
    count: int | None = None,
    *,
    trim: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
    multiplier: Multiplier = "gaussian",
) -> np.ndarray:
    """How often each layer would be among the K chosen if other samples had been drawn.

    Multiplier (infinitesimal-jackknife) bootstrap: ``value* = value + sqrt((N-1)/N) sum_m w_m (mean - left_m)`` with
    independent weights of mean 0 and variance 1, so that a drawn value has exactly the jackknife's variance and all
    layers move together as the same samples gain or lose weight. Drawing samples with replacement instead would be
    wrong here: a sample drawn twice puts into the Gram the very diagonal that the debiased estimator leaves out, and
    the bootstrap returns the biased value (0.87 for unrelated layers at N=300, D=2000) with a narrow interval
    around it; the biased estimator is inflated once more.

    Args:
        scores: one criterion's scores, one per dataset; several are joined by mean rank in every draw.
        without_each: for each dataset ``[N, L]``, as ``values_without_each`` gives them.
        count: K; by default max(1, round(0.15 L)).
        trim: layers at each end that are never chosen.
        draws: number of draws; the result's own standard error is at most 0.5 / sqrt(draws).
        seed: seed of the weights.
        multiplier: ``gaussian``, or ``exponential`` (minus 1) whose skew weighs samples as the Bayesian bootstrap does.

    Returns:
        ``[L]`` float64 in [0, 1]; 0 for layers that cannot be chosen. Sums to K.

    Raises:
        UserError: more layers asked for than there are.
    """
    consensus = mean_rank(scores)
    layers = np.flatnonzero(consensus.valid)
    chosen = choose(consensus, count, trim=trim).layers
    rng = np.random.default_rng(seed)
    drawn = [
        score.values[layers] + jackknife_noise(left[:, layers], rng, draws, multiplier)
        for score, left in zip(scores, without_each, strict=True)
    ]
    picked = lowest(drawn, layers, len(chosen), consensus.num_layers, scores[0].direction, trim)
    return np.bincount(picked.ravel(), minlength=consensus.num_layers) / draws


def jackknife_noise(
    left: np.ndarray, rng: np.random.Generator, draws: int, multiplier: Multiplier = "gaussian"
) -> np.ndarray:
    """Deviations ``[draws, V]`` of mean 0 whose covariance is the jackknife's of ``[U, V]`` values left."""
    influence = (left.mean(axis=0) - left) * np.sqrt((len(left) - 1) / len(left))
    return _MULTIPLIERS[multiplier](rng, (draws, len(left))) @ influence


def lowest(
    drawn: Sequence[np.ndarray], layers: np.ndarray, count: int, num_layers: int, direction: str, trim: int
) -> np.ndarray:
    """The ``count`` most critical layers of each draw, as `choose` picks them: ``[draws, count]``.

    Args:
        drawn: values ``[draws, V]`` of each dataset, joined by mean rank where there are several.
        layers: ``[V]`` which layers they are of.
        count: K.
        num_layers: L.
        direction: direction of the values.
        trim: layers at each end that are never chosen.
    """
    signed = [values if direction == "low" else -values for values in drawn]
    joined = signed[0] if len(signed) == 1 else np.mean([_ranks(values) for values in signed], axis=0)
    inside = (layers >= trim) & (layers < num_layers - trim)
    return layers[inside][np.argsort(joined[:, inside], axis=1, kind="stable")[:, :count]]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 along the last axis of ``[..., V]``; equal values share the middle of their ranks."""
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return below + (equal - 1) / 2
