"""From every sample's loss under every variant of a model to scores of layers, with their errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.deletions import Deletions, jackknife_stderr
from jaxcrit.core.layers import Direction, LayerScores


@dataclasses.dataclass(frozen=True, eq=False)
class SampleLosses:
    """Loss of each sample under each variant, and under the model that the variants are changes of.

    Attributes:
        layers: ``[C]`` int, the layer that each variant stands for.
        losses: ``[C, N]`` float64, mean over the response tokens of each sample, nats.
        reference: ``[N]`` float64, the same of the unchanged model.
        tokens: ``[N]`` int, response tokens of each sample.
        sample_ids: ``[N]`` identity of each sample.
    """

    layers: np.ndarray
    losses: np.ndarray
    reference: np.ndarray
    tokens: np.ndarray
    sample_ids: Sequence[str]

    def without_each(self, num_layers: int, *, per_token: bool = False) -> np.ndarray:
        """Scores with each sample left out in turn, ``[N, L]`` float64, NaN for layers without one."""
        left = np.full((len(self.tokens), num_layers), np.nan)
        left[:, self.layers] = _without_each(self.losses, self._weights(per_token)).T
        return left

    def scores(
        self, name: str, num_layers: int, meta: Mapping[str, Any], direction: Direction = "high"
    ) -> dict[str, LayerScores]:
        """Scores ``name``, the mean of the samples' means, and ``name_per_token``, the mean over all tokens."""
        return {
            key: self.score(key, num_layers, meta, direction, per_token=per_token)
            for key, per_token in ((name, False), (f"{name}_per_token", True))
        }

    def score(
        self, key: str, num_layers: int, meta: Mapping[str, Any], direction: Direction, *, per_token: bool = False
    ) -> LayerScores:
        """One score of the layers, with its deletions.

        ``stderr`` is the delete-1 jackknife of the difference from the unchanged model: the samples differ much more
        from each other than the variants do on one sample. None for a single sample.
        """
        weights = self._weights(per_token)
        values, errors = np.full((2, num_layers), np.nan)
        values[self.layers] = mean(self.losses, weights)
        if len(self.tokens) > 1:
            errors[self.layers] = jackknife_stderr(_without_each(self.losses - self.reference, weights).T)
        facts = {
            **meta,
            "average": "tokens" if per_token else "samples",
            "num_samples": len(self.tokens),
            "unchanged": float(mean(self.reference, weights)),
            "stderr": "of the difference from the unchanged model",
        }
        stderr = errors if len(self.tokens) > 1 else None
        left = Deletions(self.without_each(num_layers, per_token=per_token), self.sample_ids)
        return LayerScores(key, values, np.isfinite(values), direction, stderr, facts, left)

    def _weights(self, per_token: bool) -> np.ndarray:
        return self.tokens.astype(np.float64) if per_token else np.ones(len(self.tokens))


def mean(losses: np.ndarray, weights: np.ndarray | Sequence[int]) -> np.ndarray:
    """Weighted mean over the last axis, float64."""
    return np.average(np.asarray(losses, np.float64), axis=-1, weights=weights)


def _without_each(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means ``[..., N]`` with each sample left out in turn."""
    weighted = losses * weights
    with np.errstate(invalid="ignore"):  # one sample leaves nothing
        return (weighted.sum(axis=-1, keepdims=True) - weighted) / (weights.sum() - weights)
