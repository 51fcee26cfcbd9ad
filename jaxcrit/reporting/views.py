"""What reports derive of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import delta

if TYPE_CHECKING:
    from jaxcrit.studies.analysis import Analysis, DatasetResult

_PLAIN = 0.001


def null_delta(dataset: DatasetResult, config: Mapping[str, Any]) -> np.ndarray:
    """δ that unrelated layers would score, ``[L]``: the window mean of the null, a layer with itself still being 1."""
    null = np.array(dataset.cka["null_mean"], dtype=np.float64)
    np.fill_diagonal(null, 1.0)
    values, valid = delta(null, window=config["window"], include_self=config["include_self"])
    return np.where(valid, values, np.nan)


def step_score(dataset: DatasetResult) -> np.ndarray | None:
    """How far ``step`` is above chance, in standard deviations of the null, ``[L]``.

    None where chance is out of the question at every layer (p < 0.001), as it mostly is within one model.
    """
    if "null_p" not in dataset.cka or np.diagonal(dataset.cka["null_p"], offset=1).max() < _PLAIN:
        return None
    matrices = (dataset.cka[key] for key in ("biased", "null_mean", "null_stddev"))
    values, mean, stddev = (np.diagonal(matrix, offset=1) for matrix in matrices)
    return np.concatenate([[np.nan], (values - mean) / stddev])


def paper_choice(dataset: DatasetResult, config: Mapping[str, Any]) -> LayerSet | None:
    """As many layers as were chosen, by the paper's biased δ; None where the choice was not of critical layers."""
    if not dataset.chosen.rule.startswith("critical:"):
        return None
    spec = LayerSpec("critical", count=len(dataset.chosen.layers))
    return resolve(spec, dataset.chosen.num_layers, scores=dataset.scores["delta"], trim=config["trim"])


def num_candidates(scores: LayerScores, config: Mapping[str, Any]) -> int:
    """How many layers a selection by these scores could have chosen."""
    return int(scores.valid[config["trim"] : scores.num_layers - config["trim"]].sum())


def model_type(analysis: Analysis) -> str | None:
    """The ``model_type`` of config.json as noted in the scores' meta, or None."""
    return next(iter(analysis.datasets.values())).scores["delta"].meta.get("model_type")
