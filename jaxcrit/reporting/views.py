"""What a report reads of an analysis, as plain values whoever computed them, and the little it derives from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, resolve
from jaxcrit.criticality.confidence import Certainty
from jaxcrit.criticality.delta import delta

_PLAIN = 0.001


class DatasetView(Protocol):
    """The measurement on one dataset."""

    @property
    def name(self) -> str:
        """Of the dataset."""

    @property
    def num_samples(self) -> int:
        """N."""

    @property
    def scores(self) -> Mapping[str, LayerScores]:
        """``delta``, ``delta_debiased``, ``step`` and ``step_debiased``."""

    @property
    def cka(self) -> Mapping[str, np.ndarray]:
        """``biased``, ``debiased``, ``null_mean`` (biased CKA expected of unrelated layers), each ``[L, L]``.

        Where the samples are prompts also ``null_stddev`` and ``null_p``.
        """

    @property
    def chosen(self) -> LayerSet:
        """Layers that this dataset alone would choose."""

    @property
    def certainty(self) -> Certainty | None:
        """Of the choice, as far as the prompts drawn go."""

    @property
    def warnings(self) -> Sequence[str]:
        """What would mislead a reader, one line each."""


class AnalysisView(Protocol):
    """One run of ``jaxcrit analyze``."""

    @property
    def run(self) -> Mapping[str, Any]:
        """What ``run.json`` holds; ``config`` in it has ``window``, ``include_self`` and ``trim``."""

    @property
    def datasets(self) -> Mapping[str, Any]:
        """A `DatasetView` by name, in order."""

    @property
    def consensus(self) -> LayerScores | None:
        """Mean rank over the datasets; read only where there are several."""

    @property
    def chosen(self) -> LayerSet:
        """The critical layers."""

    @property
    def certainty(self) -> Certainty | None:
        """Of the choice over all datasets."""

    @property
    def out(self) -> Path:
        """Run directory."""


def null_delta(dataset: DatasetView, config: Mapping[str, Any]) -> np.ndarray:
    """δ that unrelated layers would score, ``[L]``: the window mean of the null, a layer with itself still being 1."""
    null = np.array(dataset.cka["null_mean"], dtype=np.float64)
    np.fill_diagonal(null, 1.0)
    values, valid = delta(null, window=config["window"], include_self=config["include_self"])
    return np.where(valid, values, np.nan)


def step_score(dataset: DatasetView) -> np.ndarray | None:
    """How far ``step`` is above chance, in standard deviations of the null, ``[L]``.

    None where chance is out of the question at every layer (p < 0.001), as it mostly is within one model.
    """
    if "null_p" not in dataset.cka or np.diagonal(dataset.cka["null_p"], offset=1).max() < _PLAIN:
        return None
    matrices = (dataset.cka[key] for key in ("biased", "null_mean", "null_stddev"))
    values, mean, stddev = (np.diagonal(matrix, offset=1) for matrix in matrices)
    return np.concatenate([[np.nan], (values - mean) / stddev])


def paper_choice(dataset: DatasetView, config: Mapping[str, Any]) -> LayerSet | None:
    """As many layers as were chosen, by the paper's biased δ; None where the choice was not of critical layers."""
    if not dataset.chosen.rule.startswith("critical"):
        return None
    spec = LayerSpec("critical", count=len(dataset.chosen.layers))
    return resolve(spec, dataset.chosen.num_layers, scores=dataset.scores["delta"], trim=config["trim"])


def num_candidates(scores: LayerScores, config: Mapping[str, Any]) -> int:
    """How many layers a selection by these scores could have chosen."""
    return int(scores.valid[config["trim"] : scores.num_layers - config["trim"]].sum())


def model_type(analysis: AnalysisView) -> str | None:
    """The ``model_type`` of config.json as noted in the scores' meta, or None."""
    return next(iter(analysis.datasets.values())).scores["delta"].meta.get("model_type")
