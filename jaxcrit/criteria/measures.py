"""delta by measures other than CKA, and by the principal components that layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcrit.core.deletions import jackknife_stderr
from jaxcrit.core.layers import LayerScores
from jaxcrit.criteria.delta import delta
from jaxcrit.similarity import Spectrum, cca, cca_without_each


def measure_scores(
    measures: Mapping[str, np.ndarray], *, window: int = 5, include_self: bool = True, meta: Mapping[str, Any]
) -> dict[str, LayerScores]:
    """``delta_NAME`` of every measure: its mean over a layer's window, as `delta` of CKA; direction ``low``.

    Args:
        measures: by name, ``[L, L]``.
        window: layers to average over.
        include_self: whether the layer itself counts.
        meta: what was measured on what.
    """
    facts = {**meta, "window": window, "include_self": include_self}
    scores = {}
    for name, matrix in measures.items():
        values, valid = delta(matrix, window, include_self)
        scores[f"delta_{name}"] = LayerScores(f"delta_{name}", values, valid, "low", None, {**facts, "measure": name})
    return scores


def component_scores(
    spectrum: Spectrum, ks: tuple[int, ...], *, window: int = 5, errors: bool = True, meta: Mapping[str, Any]
) -> dict[str, LayerScores]:
    """``cca_K``: mean canonical correlation of a layer's first K principal components with those of its neighbours.

    The paper's curves: over a window of 5 the mean over the layers at distance 1 and 2, the layer itself left out.

    Args:
        spectrum: of all layers; with all scores kept where errors are wanted.
        ks: numbers of components.
        window: layers that a layer's neighbours are taken from.
        errors: whether to estimate standard errors (infinitesimal jackknife over the samples).
        meta: what was measured on what.

    Returns:
        Score key -> LayerScores, direction ``low``: where components turn, the representation changes.

    Raises:
        UserError: the window does not fit the model, or K is beyond the rank of a layer.
    """
    scores = {}
    for k in ks:
        values, valid = delta(cca(spectrum, k), window, include_self=False)
        stderr = None
        if errors:
            stderr = jackknife_stderr(delta(cca_without_each(spectrum, k), window, include_self=False)[0])
        facts = {**meta, "components": k, "window": window, "include_self": False}
        scores[f"cca_{k}"] = LayerScores(f"cca_{k}", values, valid, "low", stderr, facts)
    return scores
