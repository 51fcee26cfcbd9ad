"""How firm a choice is: which layers may be the most critical one, and how many prompts would settle it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.selection.choice import DRAWS, choose, jackknife_noise, lowest, mean_rank, selection_probability

UNCERTAINTY_FORMAT = "jaxcrit.uncertainty"
LEVEL = 0.95
_FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, eq=False)
class SampleSizes:
    """How often so many prompts would make the choice that the measured scores stand for.

    Attributes:
        num_prompts: ``[M]`` int, of all datasets together.
        same: ``[M]`` share of draws that choose the very same layers.
        overlap: ``[M]`` share of the chosen layers that a draw has too, in the mean.
    """

    num_prompts: np.ndarray
    same: np.ndarray
    overlap: np.ndarray

    def enough(self, share: float = LEVEL) -> int | None:
        """The least number of prompts that makes the same choice so often; None beyond the largest looked at."""
        above = np.flatnonzero(self.same >= share)
        if not above.size:
            return None
        k = int(above[0])
        if k == 0:
            return int(self.num_prompts[0])
        log = np.interp(share, self.same[k - 1 : k + 1], np.log(self.num_prompts[k - 1 : k + 1]))
        return int(np.ceil(np.exp(log)))


@dataclasses.dataclass(frozen=True, eq=False)
class Certainty:
    """How sure a choice of critical layers is, as far as the prompts drawn go.

    Attributes:
        num_prompts: resampled, of all datasets together.
        probability: ``[L]`` how often resampled prompts choose each layer.
        confidence_set: layers that may be the most critical one, at 95 %.
        sample_sizes: how many prompts would make the choice stable.
        draws: number of draws of the bootstrap.
    """

    num_prompts: int
    probability: np.ndarray
    confidence_set: tuple[int, ...]
    sample_sizes: SampleSizes
    draws: int = DRAWS

    def to_json(self) -> dict[str, Any]:
        """For ``uncertainty.json``."""
        sizes = self.sample_sizes
        return {
            "num_prompts": self.num_prompts,
            "draws": self.draws,
            "selection_probability": self.probability.tolist(),
            "confidence_set": {"level": LEVEL, "layers": list(self.confidence_set)},
            "sample_size": {
                "num_prompts": sizes.num_prompts.tolist(),
                "same": sizes.same.tolist(),
                "overlap": sizes.overlap.tolist(),
                "enough": sizes.enough(),
            },
        }


def certainty(
    scores: Sequence[LayerScores],
    without_each: Sequence[np.ndarray],
    count: int | None = None,
    *,
    trim: int = 2,
    seed: int = 0,
) -> Certainty:
    """Selection probability, confidence set and sample-size curve of one choice; arguments as of each."""
    return Certainty(
        num_prompts=sum(map(len, without_each)),
        probability=selection_probability(scores, without_each, count, trim=trim, seed=seed),
        confidence_set=confidence_set(scores, without_each, trim=trim, seed=seed),
        sample_sizes=sample_sizes(scores, without_each, count, trim=trim, seed=seed),
    )


def confidence_set(
    scores: Sequence[LayerScores],
    without_each: Sequence[np.ndarray],
    *,
    level: float = LEVEL,
    trim: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[int, ...]:
    """The layers that may be the most critical one: holds the true one with probability ``level``.

    How often a draw has its lowest value at a layer gives no such set: the layer that won by chance once wins most of
    the draws around it. Here every layer is tested on its own for being the lowest (the comparison with the best of
    Hsu 1984; Mogstad, Romano, Shaikh and Wilhelm 2024). Layer i stays unless

        max_j (value_i - value_j) / se_ij

    is beyond the ``level`` quantile of the same maximum over the multiplier bootstrap's deviations (see
    `selection_probability`), se_ij being the jackknife's error of that difference. The truly lowest layer fails its own
    test with probability 1 - level and no other's test touches it, so nothing has to be paid for the number of layers;
    where several are equally low, each is held with that probability. The deviations are those of a Student
    distribution with one degree of freedom less than prompts, because the errors are estimated too.

    Several datasets choose by mean rank, about which mean values tell nothing. There all differences of all datasets
    are bounded at once, which bounds the ranks; the set holds the layers whose mean rank may be the lowest. It errs on
    the wide side: of three datasets of 60 prompts it held the planted layer in all of 1,000 runs, with 3.7 others of
    the 8 candidates where CKA falls from about 0.9 to 0.64 there, and with all where it falls to 0.81 only; of 300
    prompts each, with 1.9 others (``benchmarks/coverage.py``).

    Args:
        scores: one criterion's scores, one per dataset.
        without_each: for each dataset ``[U, L]``, as ``values_without_each`` gives them.
        level: confidence level, as 0.95.
        trim: layers at each end that cannot be chosen.
        draws: number of draws of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        Sorted layers, never empty.
    """
    consensus = mean_rank(scores)
    layers = np.flatnonzero(consensus.valid)
    inside = (layers >= trim) & (layers < consensus.num_layers - trim)
    kept = inside if len(scores) == 1 else np.full(len(layers), True)
    rng = np.random.default_rng(seed)
    sets = [
        _differences(score, left, layers[kept], rng, draws) for score, left in zip(scores, without_each, strict=True)
    ]
    if len(scores) == 1:
        observed, deviations = sets[0]
        # [draws, V, V] at once would be some 100 MB of a deep model.
        bounds = [np.quantile(deviations(i).max(axis=1), level) for i in range(len(observed))]
        may = observed.max(axis=1) <= np.array(bounds)
        return tuple(layers[inside][may].tolist())
    largest = np.max([deviations(i).max(axis=1) for _, deviations in sets for i in range(len(layers))], axis=0)
    above = np.array([observed > np.quantile(largest, level) for observed, _ in sets])
    least = above.sum(axis=2).mean(axis=0)[inside]
    most = (len(layers) - 1 - above.sum(axis=1)).mean(axis=0)[inside]
    return tuple(layers[inside][least <= most.min()].tolist())


def _differences(
    score: LayerScores, left: np.ndarray, layers: np.ndarray, rng: np.random.Generator, draws: int
) -> tuple[np.ndarray, Any]:
    """Differences of all layers over their errors: ``[V, V]``, and of layer i the bootstrap's, ``[draws, V]``."""
    sign = 1 if score.direction == "low" else -1
    values, left = sign * score.values[layers], sign * left[:, layers]
    freedom = len(left) - 1
    noise = jackknife_noise(left, rng, draws) * np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))
    covariance = np.cov(left.T, bias=True).reshape(len(layers), -1) * freedom
    variance = covariance.diagonal()
    error = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0))
    # Layers of equal values throughout differ by nothing, with no error.
    error = np.maximum(error, 1e-12 * max(1e-300, np.abs(values).max()))
    return (values[:, None] - values) / error, lambda i: (noise[:, i : i + 1] - noise) / error[i]


def sample_sizes(
    scores: Sequence[LayerScores],
    without_each: Sequence[np.ndarray],
    count: int | None = None,
    *,
    trim: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
) -> SampleSizes:
    """How often n prompts would choose the same layers, for n from a quarter to 16 times of those there are.

    Predicted from the jackknife alone, without a forward pass: n prompts scatter like N ones, times sqrt(N/n), about
    the measured values. These are first drawn together by the factor of James and Stein, for measured layers differ
    more than true ones do: without it a flat curve, all noise, would look settled at a few times N. A rough guide only:
    of chains of 12 layers at N=60, 0.98 of choices were predicted to stay at 4 N where 1.00 did, 0.52 where 0.85 did (a
    planted layer near the noise), and 0.22 where 0.11 did (nothing planted; ``benchmarks/coverage.py``).

    Args:
        scores: one criterion's scores, one per dataset.
        without_each: for each dataset ``[U, L]``, as ``values_without_each`` gives them.
        count: K.
        trim: layers at each end that are never chosen.
        draws: number of draws of each size.
        seed: seed of the draws.
    """
    consensus = mean_rank(scores)
    layers = np.flatnonzero(consensus.valid)
    chosen = choose(consensus, count, trim=trim).layers
    rng = np.random.default_rng(seed)
    centres, noises = [], []
    for score, left in zip(scores, without_each, strict=True):
        values, noise = score.values[layers], jackknife_noise(left[:, layers], rng, draws)
        spread, chance = values.var(), noise.var(axis=1).mean()
        keep = max(0.0, 1 - chance / spread) if spread > 0 else 0.0
        centres.append(values.mean() + keep * (values - values.mean()))
        noises.append(noise)
    total = sum(map(len, without_each))
    factors = [factor for factor in _FACTORS if total * factor >= 4 * len(scores)]
    shared = []
    for factor in factors:
        drawn = [centre + noise / np.sqrt(factor) for centre, noise in zip(centres, noises, strict=True)]
        picked = lowest(drawn, layers, len(chosen), consensus.num_layers, scores[0].direction, trim)
        shared.append(np.isin(picked, chosen).mean(axis=1))
    common = np.array(shared)
    sizes = np.array([round(total * factor) for factor in factors])
    return SampleSizes(sizes, (common == 1).mean(axis=1), common.mean(axis=1))
