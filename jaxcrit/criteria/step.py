"""step: the CKA between a layer's input and its output. Low where this very block changes the representation."""

from __future__ import annotations

import numpy as np


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
