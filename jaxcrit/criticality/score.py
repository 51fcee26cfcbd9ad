"""Scores of every layer by delta and step, biased and debiased, with their standard errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import LayerScores
from jaxcrit.criticality.delta import delta
from jaxcrit.criticality.step import step
from jaxcrit.similarity import Bias, GramTables, cka_without_each, from_tables


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How one score key is computed from a CKA matrix.

    Attributes:
        bias: which estimate of CKA.
        windowed: delta, over a window of layers; otherwise step.
    """

    bias: Bias
    windowed: bool

    def __call__(self, cka: np.ndarray, window: int, include_self: bool) -> tuple[np.ndarray, np.ndarray]:
        """``[..., L, L]`` to values ``[..., L]`` and valid ``[L]``."""
        return delta(cka, window, include_self) if self.windowed else step(cka)


CRITERIA: Mapping[str, Criterion] = {
    "delta": Criterion("biased", windowed=True),
    "delta_debiased": Criterion("debiased", windowed=True),
    "step": Criterion("biased", windowed=False),
    "step_debiased": Criterion("debiased", windowed=False),
}


def layer_scores(
    tables: GramTables, *, window: int = 5, include_self: bool = True, meta: Mapping[str, Any] | None = None
) -> dict[str, LayerScores]:
    """Scores all layers by ``delta``, ``delta_debiased``, ``step`` and ``step_debiased``.

    Args:
        tables: of one model on N samples (not of two models).
        window: of delta.
        include_self: whether delta counts the layer itself.
        meta: what was measured on what; kept in every score, beside the estimator, the window and N.

    Returns:
        Score key -> LayerScores, direction ``low``; ``stderr`` by the delete-1 jackknife (debiased: None where N = 4,
        since 4 samples must be left).

    Raises:
        UserError: the window does not fit the model.
    """
    matrices = {bias: from_tables(tables, bias) for bias in ("biased", "debiased")}
    scores = {}
    for key, criterion in CRITERIA.items():
        values, valid = criterion(matrices[criterion.bias], window, include_self)
        left = None if _too_few(tables, criterion) else values_without_each(tables, key, window, include_self)
        shape = {"window": window, "include_self": include_self} if criterion.windowed else {}
        facts = {**(meta or {}), "bias": criterion.bias, "num_samples": tables.num_samples, **shape}
        scores[key] = LayerScores(key, values, valid, "low", None if left is None else jackknife_stderr(left), facts)
    return scores


def values_without_each(
    tables: GramTables, key: str = "delta_debiased", window: int = 5, include_self: bool = True
) -> np.ndarray:
    """One criterion's values with each sample deleted in turn: ``[N, L]`` float64, NaN where invalid.

    Raises:
        UserError: unknown score key, or a debiased one with fewer than 5 samples.
    """
    if key not in CRITERIA:
        raise UserError(f"score {key!r}: expected one of {', '.join(CRITERIA)}{did_you_mean(key, CRITERIA)}")
    criterion = CRITERIA[key]
    return criterion(cka_without_each(tables, criterion.bias), window, include_self)[0]


def jackknife_stderr(left: np.ndarray) -> np.ndarray:
    """Delete-1 jackknife: ``sqrt((N-1)/N sum_m (left_m - mean)^2)`` of ``[N, L]``.

    About 1.5 times too wide for nearly unrelated layers of many dimensions, right otherwise.
    """
    return np.sqrt((len(left) - 1) * left.var(axis=0))


def _too_few(tables: GramTables, criterion: Criterion) -> bool:
    return criterion.bias == "debiased" and tables.num_samples < 5
