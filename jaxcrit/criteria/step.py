"""step: the CKA between a layer's input and its output. Low where this very block changes the representation."""

from __future__ import annotations

import numpy as np

from jaxcrit.evidence.criterion import Criterion


def step(cka: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``cka[l-1, l]``, what block l does to the stream; layer 0, whose input is no layer, is invalid.

    Args:
        cka: ``[..., L, L]``.

    Returns:
        Values ``[..., L]`` float64 (NaN at layer 0) and valid ``[L]`` bool.
    """
    values = np.full(cka.shape[:-1], np.nan)
    values[..., 1:] = np.diagonal(cka, offset=1, axis1=-2, axis2=-1)
    return values, np.arange(cka.shape[-1]) > 0


CRITERIA = {
    key: Criterion(
        needs="forward",
        direction="low",
        score=step,
        command="analyze",
        formula=f"{cka}(h_{{l-1}}, h_l)",
        source="CKA of neighbours",
        responds="a change of how samples lie to each other, in its layer",
        blind="rotation, scale. False alarm: one outlier sample",
    )
    for key, cka in (("step", "CKA"), ("step_debiased", "debiased CKA"))
}
