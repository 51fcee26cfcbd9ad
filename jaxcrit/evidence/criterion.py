"""What a criterion makes of its evidence."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """Of one forward pass over N prompts.

    Attributes:
        hidden: ``[L+1, N, D]`` float32, residual stream at the last prompt token; the embedding output in front.
        influence: ``[N, L]`` float64, ``1 - cos`` between each block's input and output, summed over the tokens.
        tokens: ``[N]`` int, of each prompt.
        lens: ``[N, L]`` float64 of `lens_kl`, or None where not asked for.
    """

    hidden: np.ndarray
    influence: np.ndarray
    tokens: np.ndarray
    lens: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One criterion's result.

    Attributes:
        values: ``[L]`` float64; NaN where there is none.
        without_each: ``[N, L]``, the same with each sample left out in turn; None where not computed.
    """

    values: np.ndarray
    without_each: np.ndarray | None = None


def mean_over(samples: np.ndarray, weights: np.ndarray | None = None) -> Measured:
    """Mean of ``[N, L]`` over the samples, weighted ``[N]`` where given, and its deletions."""
    weights = np.ones(len(samples)) if weights is None else weights
    weighted = samples * weights[:, None]
    total = weighted.sum(axis=0)
    if len(samples) < 2:
        return Measured(total / weights.sum())
    return Measured(total / weights.sum(), (total - weighted) / (weights.sum() - weights)[:, None])
