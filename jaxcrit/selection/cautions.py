"""What would mislead a reader of layer scores, said in a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxcrit.core.errors import listed
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import span
from jaxcrit.selection.confidence import Certainty
from jaxcrit.selection.correlation import FEW_LAYERS, Correlation, circle, tied
from jaxcrit.selection.leverage import Leverage

# Unrelated layers that score this much leave biased CKA little room to say anything.
_HIGH_NULL = 0.5
# A curve whose range is within so many standard errors is flat.
FLAT = 3.0
_UNSURE = 0.5
# One prompt that makes up so much of the jackknife's variance moves the score by 0.7 standard errors by itself; of 300
# ordinary prompts the largest share is about 0.03.
_LEVERAGE = 0.5
_CONTESTED = 0.01
_UNRELATED = 0.05
_TIED = 0.25


class Measured(Protocol):
    """One dataset's result, as far as cautions look at it; see `jaxcrit.studies.analysis.DatasetResult`."""

    @property
    def scores(self) -> Mapping[str, LayerScores]:
        """With ``delta`` and ``delta_debiased``."""

    @property
    def cka(self) -> Mapping[str, np.ndarray]:
        """``null_mean``, and where it is known ``null_p``, each ``[L, L]``."""

    @property
    def chosen(self) -> LayerSet:
        """Layers this dataset chooses."""

    @property
    def certainty(self) -> Certainty | None:
        """Of the choice."""

    @property
    def leverage(self) -> Leverage | None:
        """On the score that chose."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Of the prompts."""


def cautions(result: Measured, *, trim: int, dtype: str = "float32") -> list[str]:
    """Warnings about one dataset's scores.

    Args:
        result: what was measured.
        trim: layers at each end that selection leaves out.
        dtype: dtype of the forward pass.

    Returns:
        Warnings, none where nothing misleads.
    """
    found = []
    debiased = result.scores["delta_debiased"]
    count = debiased.meta.get("num_samples")
    neighbours = np.diagonal(result.cka["null_mean"], offset=1)
    if neighbours.max() > _HIGH_NULL:
        layer = int(neighbours.argmax()) + 1
        found.append(
            f"biased CKA is inflated: unrelated layers would score {neighbours.max():.2f} (layer {layer}) at"
            f" {count} samples; read the debiased column"
        )
    if flat_curve(debiased):
        values, error = debiased.values[debiased.valid], _error(debiased)
        found.append(
            f"flat δ curve: its range {np.ptp(values):.4f} is within {FLAT:.0f} standard errors ({error:.4f});"
            " base models often look so, and the choice means little"
        )
    if "null_p" in result.cka:
        steps = np.diagonal(result.cka["null_p"], offset=1)
        unrelated = (1 + np.flatnonzero(steps > _UNRELATED)).tolist()
        if unrelated:
            found.append(
                f"{_layers(unrelated)} no more like the layer before than unrelated ones may be"
                f" (permutation p > {_UNRELATED}): all changes there, or {count} samples are too few to see what stays"
            )
    if result.certainty is not None:
        unsure = [layer for layer in result.chosen.layers if result.certainty.probability[layer] < _UNSURE]
        if unsure:
            found.append(
                f"the chosen set is not determined by {count} samples: {_layers(unsure)}"
                " chosen in less than half of the draws; give more prompts"
            )
    if result.leverage is not None:
        found += _heavy_prompts(result.leverage, result.sample_ids, _in_question(result, trim))
    if dtype != "float32":
        found.append(f"the forward pass ran in {dtype}: scores carry its rounding")
    return found + training_caution(debiased.meta)


def _layers(layers: Sequence[int]) -> str:
    """``layer 3 is`` or ``layers 3-5,9 are``."""
    return f"layers {span(layers)} are" if len(layers) > 1 else f"layer {layers[0]} is"


def flat_curve(score: LayerScores) -> bool:
    """Whether the range of a score is within a few of its standard errors, so that no layer stands out."""
    values = score.values[score.valid]
    return score.stderr is not None and len(values) > 1 and bool(np.ptp(values) < FLAT * _error(score))


def _error(score: LayerScores) -> float:
    """Median standard error of a score that has some."""
    assert score.stderr is not None
    return float(np.nanmedian(score.stderr[score.valid]))


def training_caution(meta: Mapping[str, Any]) -> list[str]:
    """A warning where scores are of a model of which only some layers were trained.

    Args:
        meta: that of a score, or `jaxcrit.models.model.Model.facts`.
    """
    trained = meta.get("trained")
    if not trained:
        return []
    return [
        f"only layers {span(trained['layers'])} of this model were trained, chosen by {listed(trained['criteria'])}:"
        " its scores show that choice too, and are no evidence for it"
    ]


def correlation_cautions(pair: Correlation, names: Sequence[str], scores: Sequence[LayerScores]) -> list[str]:
    """Warnings about a correlation over layers.

    Args:
        pair: correlation of two scores.
        names: names of both.
        scores: both.

    Returns:
        Warnings, none where nothing misleads.
    """
    found = [f"a circle, as asked: {why}"] if (why := circle(*scores)) else []
    for name, score in zip(names, scores, strict=True):
        if not why:
            found += [f"{name}: {line}" for line in training_caution(score.meta)]
        shared = tied(score.values[scores[0].valid & scores[1].valid])
        if shared >= _TIED:
            found.append(f"{name}: {shared:.0%} of its layers share their value with others; ties carry no order")
    if pair.num_layers < FEW_LAYERS:
        found.append(
            f"{pair.num_layers} layers say little: even if they were independent, only |ρ| of {pair.smallest:.3f} and"
            " above would be significant at 0.05"
        )
    if pair.num_layers < 20:
        found.append(f"{pair.num_layers} layers cannot bring the circular-shift p below {1 / pair.num_layers:.3f}")
    if pair.p_naive < 0.05 < pair.p_shift:
        found.append(
            f"the naive p of {pair.p_naive:.1e} comes of neighbouring layers being alike: {pair.p_shift:.0%} of the"
            " circular shifts correlate as strongly"
        )
    for own, other, name in ((0, 1, names[0]), (1, 0, names[1])):
        if abs(pair.depth[own]) >= max(abs(pair.rho), 1e-9):
            found.append(f"depth alone predicts {name} (ρ {pair.depth[own]:.3f}) no worse than {names[other]} does")
    if not np.isfinite(pair.partial):
        found.append("a score that is monotone in depth leaves nothing to correlate given depth")
    return found


def _in_question(result: Measured, trim: int) -> np.ndarray:
    """``[L]`` bool: chosen layers and those that other draws choose; without draws all that could be chosen."""
    layers = np.arange(result.chosen.num_layers)
    if result.certainty is None:
        return (layers >= trim) & (layers < len(layers) - trim)
    return np.isin(layers, result.chosen.layers) | (result.certainty.probability > _CONTESTED)


def _heavy_prompts(most: Leverage, sample_ids: Sequence[str], asked: np.ndarray) -> list[str]:
    """A line for each prompt that makes up over half of the variance of a layer that is asked about."""
    layers = np.arange(len(most.prompt))
    heavy = (most.share > _LEVERAGE) & asked
    lines = []
    for prompt in np.unique(most.prompt[heavy]).tolist():
        at = layers[heavy & (most.prompt == prompt)]
        worst = at[np.abs(most.shift[at]).argmax()]
        lines.append(
            f"one prompt makes up {most.share[at].max():.0%} of the variance of δ: prompt {prompt}, counted from 0"
            f" (sample {sample_ids[prompt][:12]}), at {_layers(at).rpartition(' ')[0]}; without it δ of layer {worst}"
            f" changes by {most.shift[worst]:+.4f}; look at it"
        )
    return lines
