"""What a report reads of an analysis, as plain values whoever computed them, and the little it derives from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, resolve
from jaxcrit.criticality.delta import delta


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
        """``biased``, ``debiased`` and ``null`` (biased CKA expected of unrelated layers), each ``[L, L]``."""

    @property
    def chosen(self) -> LayerSet:
        """Layers that this dataset alone would choose."""

    @property
    def selection_probability(self) -> np.ndarray | None:
        """``[L]`` how often resampled prompts choose each layer."""

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
    def selection_probability(self) -> np.ndarray | None:
        """``[L]`` how often resampled prompts (of every dataset) choose each layer."""

    @property
    def out(self) -> Path:
        """Run directory."""


def null_delta(dataset: DatasetView, config: Mapping[str, Any]) -> np.ndarray:
    """δ that unrelated layers would score, ``[L]``: the window mean of the null, a layer with itself still being 1."""
    null = np.array(dataset.cka["null"], dtype=np.float64)
    np.fill_diagonal(null, 1.0)
    values, valid = delta(null, window=config["window"], include_self=config["include_self"])
    return np.where(valid, values, np.nan)


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
