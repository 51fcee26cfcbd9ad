"""Scores of every layer by delta and step, biased and debiased, with their standard errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcrit.core.deletions import jackknife_stderr
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import LayerScores
from jaxcrit.criteria.delta import delta
from jaxcrit.criteria.step import step
from jaxcrit.similarity import (
    MIN_SAMPLES,
    MIN_UNITS,
    Bias,
    GramSums,
    Tables,
    cka_without_each,
    cka_without_units,
    from_tables,
)


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
    tables: Tables,
    *,
    window: int = 5,
    include_self: bool = True,
    meta: Mapping[str, Any] | None = None,
    without: Mapping[Bias, np.ndarray] | None = None,
) -> dict[str, LayerScores]:
    """Scores all layers by ``delta``, ``delta_debiased``, ``step`` and ``step_debiased``.

    Args:
        tables: of one model on N samples (not of two models).
        window: of delta.
        include_self: whether delta counts the layer itself.
        meta: what was measured on what; kept in every score, beside the estimator, the window and N.
        without: CKA with each unit of resampling deleted, as `deletions` gives it; by default of single samples.

    Returns:
        Score key -> LayerScores, direction ``low``; ``stderr`` by the jackknife, None where ``without`` has no values.

    Raises:
        UserError: the window does not fit the model.
    """
    matrices = {bias: from_tables(tables, bias) for bias in ("biased", "debiased")}
    without = deletions(tables, reach=window // 2) if without is None else without
    scores = {}
    for key, criterion in CRITERIA.items():
        values, valid = criterion(matrices[criterion.bias], window, include_self)
        deleted = without.get(criterion.bias)
        left = None if deleted is None else criterion(deleted, window, include_self)[0]
        shape = {"window": window, "include_self": include_self} if criterion.windowed else {}
        facts = {**(meta or {}), "bias": criterion.bias, "num_samples": tables.num_samples, **shape}
        scores[key] = LayerScores(key, values, valid, "low", None if left is None else jackknife_stderr(left), facts)
    return scores


def deletions(
    tables: Tables, grams: Any = None, units: np.ndarray | None = None, *, reach: int | None = None
) -> dict[Bias, np.ndarray]:
    """CKA with each unit of resampling deleted in turn, by estimator ``[U, L, L]``.

    Args:
        tables: of one model on N samples.
        grams: ``[L, N, N]``; needed with ``units``.
        units: ``[N]`` int, which prompt each sample comes from; by default each is one of its own.
        reach: pairs of layers further apart may be left out, as `cka_without_each` does.

    Returns:
        No entry where too few would be left: debiased with N = 4, and of prompts fewer than 3, or too unequal; nor of
        prompts without Grams, nor of sums without rows.
    """
    if isinstance(tables, GramSums):
        return {}
    if units is not None and len(np.unique(units)) < len(units):
        counts = np.bincount(units)
        few = len(counts) < MIN_UNITS or len(units) - counts.max() < MIN_SAMPLES
        return {} if few or grams is None else cka_without_units(grams, tables, units)
    estimators: tuple[Bias, ...] = ("biased", "debiased") if tables.num_samples > 4 else ("biased",)
    return {bias: cka_without_each(tables, bias, reach=reach) for bias in estimators}


def values_without_each(
    tables: Tables,
    key: str = "delta_debiased",
    window: int = 5,
    include_self: bool = True,
    *,
    without: Mapping[Bias, np.ndarray] | None = None,
) -> np.ndarray:
    """One criterion's values with each sample, or unit, deleted in turn: ``[U, L]`` float64, NaN where invalid.

    Raises:
        UserError: unknown score key, a debiased one with fewer than 5 samples, or sums without rows.
    """
    if key not in CRITERIA:
        raise UserError(f"score {key!r}: expected one of {', '.join(CRITERIA)}{did_you_mean(key, CRITERIA)}")
    criterion = CRITERIA[key]
    deleted = (without or {}).get(criterion.bias)
    if deleted is None:
        deleted = cka_without_each(tables, criterion.bias, reach=window // 2)
    return criterion(deleted, window, include_self)[0]
