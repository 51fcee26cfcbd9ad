"""Which of several scores tracks another, such as CCA of so many components and δ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.selection.correlation import Correlation, correlate, spearman


@dataclasses.dataclass(frozen=True)
class Tracking:
    """How several scores go along with one.

    Attributes:
        reference: key of the one.
        correlations: by key of each other.
        best: key of the one of highest rho.
        p_best: share of the circular shifts of the reference at which *some* of the scores has as large a |rho|: what
            the best of several is worth. Never below 1/V.
    """

    reference: str
    correlations: Mapping[str, Correlation]
    best: str
    p_best: float


def tracking(reference: LayerScores, scores: Sequence[LayerScores]) -> Tracking:
    """Correlates scores with a reference over the layers that are valid for each, and picks the best honestly.

    Args:
        reference: such as ``delta_debiased``.
        scores: at least one, of the same layers, all valid for the same.

    Raises:
        UserError: fewer than 3 layers in common, or a constant score (`correlate`).
    """
    found = {score.name: correlate(reference, score) for score in scores}
    best = max(found, key=lambda name: found[name].rho)
    valid = np.flatnonzero(np.logical_and.reduce([reference.valid, *(score.valid for score in scores)]))
    values = reference.values[valid]
    shifted = [
        max(abs(spearman(np.roll(values, shift), score.values[valid])) for score in scores)
        for shift in range(len(valid))
    ]
    return Tracking(reference.name, found, best, float(np.mean(np.array(shifted) >= abs(found[best].rho) - 1e-12)))
