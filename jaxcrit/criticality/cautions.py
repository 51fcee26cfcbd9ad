"""What would mislead a reader of layer scores, said in a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.criticality.correlation import FEW_LAYERS, Correlation

# Unrelated layers that score this much leave biased CKA little room to say anything.
_HIGH_NULL = 0.5
# A curve whose range is within so many standard errors is flat.
_FLAT = 3.0
_UNSURE = 0.5


def cautions(
    scores: Mapping[str, LayerScores],
    null: np.ndarray,
    chosen: LayerSet,
    probability: np.ndarray | None,
    *,
    trim: int,
    dtype: str = "float32",
) -> list[str]:
    """Warnings about one dataset's scores.

    Args:
        scores: with ``delta`` and ``delta_debiased``.
        null: ``[L, L]`` biased CKA expected of unrelated layers.
        chosen: the layers this dataset chooses.
        probability: ``[L]`` how often resampled prompts choose each layer, or None.
        trim: layers at each end that selection leaves out.
        dtype: of the forward pass.

    Returns:
        Warnings, none where nothing misleads.
    """
    found = []
    debiased = scores["delta_debiased"]
    count = debiased.meta.get("num_samples")
    neighbours = np.diagonal(null, offset=1)
    if neighbours.max() > _HIGH_NULL:
        layer = int(neighbours.argmax()) + 1
        found.append(
            f"biased CKA is inflated: unrelated layers would score {neighbours.max():.2f} (layer {layer}) at"
            f" {count} samples; read the debiased column"
        )
    values = debiased.values[debiased.valid]
    if debiased.stderr is not None and len(values) > 1:
        error = float(np.nanmedian(debiased.stderr[debiased.valid]))
        if np.ptp(values) < _FLAT * error:
            found.append(
                f"flat δ curve: its range {np.ptp(values):.4f} is within {_FLAT:.0f} standard errors ({error:.4f});"
                " base models often look so, and the choice means little"
            )
    if probability is not None:
        unsure = [layer for layer in chosen.layers if probability[layer] < _UNSURE]
        if unsure:
            found.append(
                f"the chosen set is not determined by {count} samples: layers {', '.join(map(str, unsure))} are"
                " chosen in less than half of the draws; give more prompts"
            )
    if dtype != "float32":
        found.append(f"the forward pass ran in {dtype}: scores carry its rounding")
    return found


def correlation_cautions(pair: Correlation, names: Sequence[str]) -> list[str]:
    """Warnings about a correlation over layers.

    Args:
        pair: of two scores.
        names: of both.

    Returns:
        Warnings, none where nothing misleads.
    """
    found = []
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
