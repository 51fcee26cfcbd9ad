"""How far several datasets, or several criteria, agree about the layers of one model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet


def spearman_matrix(scores: Sequence[LayerScores]) -> np.ndarray:
    """Spearman's rank correlation between the scores, over the layers that are valid in all of them.

    Adjacent layers are much alike, so the layers are far fewer independent observations than there are of them.

    Args:
        scores: M of one model; one whose direction is ``high`` is turned round.

    Returns:
        ``[M, M]``; NaN where a score is constant.

    Raises:
        UserError: none given, of different numbers of layers, or fewer than 3 layers valid in all.
    """
    from scipy.stats import rankdata

    layers = {score.num_layers for score in scores}
    if len(layers) != 1:
        raise UserError(f"expected scores of one model, got {sorted(layers) or 'none'} layers")
    valid = np.logical_and.reduce([score.valid for score in scores])
    if valid.sum() < 3:
        raise UserError(f"expected 3 layers that all scores are valid for, got {valid.sum()}")
    signs = [1 if score.direction == "low" else -1 for score in scores]
    ranks = [rankdata(sign * score.values[valid]) for sign, score in zip(signs, scores, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant curve has no rank correlation
        return np.corrcoef(ranks).reshape(len(scores), len(scores))


def overlap_matrix(chosen: Sequence[LayerSet]) -> np.ndarray:
    """``[M, M]`` share of the layers of the smaller set that both sets hold."""
    sets = [set(one.layers) for one in chosen]
    return np.array([[len(a & b) / max(1, min(len(a), len(b))) for b in sets] for a in sets])
