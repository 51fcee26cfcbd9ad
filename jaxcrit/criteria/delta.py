"""delta: the mean CKA between a layer and its neighbours. Low where the representation changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxcrit.core.deletions import jackknife_stderr
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import LayerScores
from jaxcrit.criteria.step import step
from jaxcrit.evidence.criterion import Criterion

if TYPE_CHECKING:  # jaxcrit.similarity imports jax, which pictures and tables of delta do without
    from jaxcrit.similarity import Bias, Spectrum, Tables


def delta(
    cka: np.ndarray, window: int = 5, include_self: bool = True, *, edges: Literal["invalid", "clip"] = "invalid"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``cka[r, l]`` over the layers r within ``window // 2`` of l.

    The window looks both ways, so of a jump between blocks b-1 and b both are scored low, and either may come out
    lowest; ``step`` names b itself.

    Args:
        cka: ``[..., L, L]``.
        window: odd number of layers, 3 or more; the paper's figures use 5, its notebook 3.
        include_self: whether ``cka[l, l] = 1`` counts, as in the paper. Without it 1 - delta is larger by the factor
            window / (window - 1); the order of the layers is the same.
        edges: ``invalid`` leaves out layers whose window leaves the model (NaN); ``clip``, as in the paper's code,
            takes the mean of what exists, which is not comparable with the rest.

    Returns:
        Values ``[..., L]`` float64 and valid ``[L]`` bool.

    Raises:
        UserError: the window is even, below 3 or wider than the model, or reaches where a banded sweep has no pairs.
    """
    num_layers = cka.shape[-1]
    if window % 2 == 0 or not 3 <= window <= num_layers:
        raise UserError(f"window={window}: expected an odd number from 3 to the {num_layers} layers there are")
    half = window // 2
    layers = np.arange(num_layers)
    total, counts = np.zeros(cka.shape[:-1]), np.zeros(num_layers)
    for apart in range(-half, half + 1):
        if apart or include_self:
            reached = slice(max(0, apart), num_layers + min(0, apart))
            total[..., reached] += np.diagonal(cka, offset=apart, axis1=-2, axis2=-1)
            counts[reached] += 1
    if np.isnan(total).any():
        raise UserError(
            f"window={window}: the sweep's band leaves out pairs of it; sweep with a band of at least {half}"
        )
    valid = np.full(num_layers, True) if edges == "clip" else (layers >= half) & (layers < num_layers - half)
    return np.where(valid, total / counts, np.nan), valid


@dataclasses.dataclass(frozen=True)
class Curve:
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


CURVES: Mapping[str, Curve] = {
    "delta": Curve("biased", windowed=True),
    "delta_debiased": Curve("debiased", windowed=True),
    "step": Curve("biased", windowed=False),
    "step_debiased": Curve("debiased", windowed=False),
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
        tables: tables of one model on N samples (not of two models).
        window: number of layers that delta averages over; odd.
        include_self: whether delta counts the layer itself.
        meta: what was measured on what; kept in every score, beside the estimator, the window and N.
        without: CKA with each unit of resampling deleted, as `deletions` gives it; by default of single samples.

    Returns:
        Score key -> LayerScores, direction ``low``; ``stderr`` by the jackknife, None where ``without`` has no values.

    Raises:
        UserError: the window does not fit the model.
    """
    from jaxcrit.similarity import from_tables

    estimators: tuple[Bias, ...] = ("biased", "debiased")
    matrices = {bias: from_tables(tables, bias) for bias in estimators}
    without = deletions(tables, reach=window // 2) if without is None else without
    scores = {}
    for key, curve in CURVES.items():
        values, valid = curve(matrices[curve.bias], window, include_self)
        deleted = without.get(curve.bias)
        left = None if deleted is None else curve(deleted, window, include_self)[0]
        shape = {"window": window, "include_self": include_self} if curve.windowed else {}
        facts = {**(meta or {}), "bias": curve.bias, "num_samples": tables.num_samples, **shape}
        scores[key] = LayerScores(key, values, valid, "low", None if left is None else jackknife_stderr(left), facts)
    return scores


def curves(
    tables: Tables,
    grams: Any,
    units: np.ndarray | None,
    *,
    window: int,
    include_self: bool,
    meta: Mapping[str, Any],
) -> tuple[dict[str, LayerScores], dict[str, np.ndarray]]:
    """`layer_scores` with their errors; and by key, where it can be had, ``[U, L]`` with each unit left out.

    Args:
        tables: tables of one model on N samples.
        grams: ``[L, N, N]``; None where there are none.
        units: see `deletions`.
        window: number of layers that delta averages over; odd.
        include_self: whether delta counts the layer itself.
        meta: what was measured on what.
    """
    without = deletions(tables, grams, units, reach=window // 2)
    scores = layer_scores(tables, window=window, include_self=include_self, meta=meta, without=without)
    keys = [key for key, curve in CURVES.items() if curve.bias in without]
    return scores, {key: values_without_each(tables, key, window, include_self, without=without) for key in keys}


def deletions(
    tables: Tables, grams: Any = None, units: np.ndarray | None = None, *, reach: int | None = None
) -> dict[Bias, np.ndarray]:
    """CKA with each unit of resampling deleted in turn, by estimator ``[U, L, L]``.

    Args:
        tables: tables of one model on N samples.
        grams: ``[L, N, N]``; needed with ``units``.
        units: ``[N]`` int, which prompt each sample comes from; by default each is one of its own.
        reach: pairs of layers further apart may be left out, as `cka_without_each` does.

    Returns:
        No entry where too few would be left: debiased with N = 4, and of prompts fewer than 3, or too unequal; nor of
        prompts without Grams, nor of sums without rows.
    """
    from jaxcrit.similarity import MIN_SAMPLES, MIN_UNITS, GramSums, cka_without_each, cka_without_units

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
    """One score's values with each sample, or unit, deleted in turn: ``[U, L]`` float64, NaN where invalid.

    Raises:
        UserError: unknown score key, a debiased one with fewer than 5 samples, or sums without rows.
    """
    from jaxcrit.similarity import cka_without_each

    if key not in CURVES:
        raise UserError(f"score {key!r}: expected one of {', '.join(CURVES)}{did_you_mean(key, CURVES)}")
    curve = CURVES[key]
    deleted = (without or {}).get(curve.bias)
    if deleted is None:
        deleted = cka_without_each(tables, curve.bias, reach=window // 2)
    return curve(deleted, window, include_self)[0]


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
        spectrum: spectrum of all layers; with all scores kept where errors are wanted.
        ks: numbers of components.
        window: layers that a layer's neighbours are taken from.
        errors: whether to estimate standard errors (infinitesimal jackknife over the samples).
        meta: what was measured on what.

    Returns:
        Score key -> LayerScores, direction ``low``: where components turn, the representation changes.

    Raises:
        UserError: the window does not fit the model, or K is beyond the rank of a layer.
    """
    from jaxcrit.similarity import cca, cca_without_each

    scores = {}
    for k in ks:
        values, valid = delta(cca(spectrum, k), window, include_self=False)
        stderr = None
        if errors:
            stderr = jackknife_stderr(delta(cca_without_each(spectrum, k), window, include_self=False)[0])
        facts = {**meta, "components": k, "window": window, "include_self": False}
        scores[f"cca_{k}"] = LayerScores(f"cca_{k}", values, valid, "low", stderr, facts)
    return scores


CRITERIA = {
    key: Criterion(
        needs="forward",
        direction="low",
        score=delta,
        command="analyze",
        formula=f"mean of {cka}(h_r, h_l) over the layers r of a window around l",
        source="the paper",
        responds="a change of how samples lie to each other",
        blind="rotation, scale; in which of two neighbours it happens. False alarm: one outlier sample",
    )
    for key, cka in (("delta", "CKA"), ("delta_debiased", "debiased CKA"))
}
