"""weight_snr: signal-to-noise ratio of weight matrices, as in Spectrum (Hartford et al. 2024, arXiv 2406.06623).

With singular values S, ``(sum of S above t / sum of the rest) / max S``, t = (1 + sqrt(beta)) IQR(S) / 1.349 and beta
the shorter side over the longer; Spectrum trains the matrices where it is high. Needs weights alone. The threshold is
the released code's, without the sqrt(n) of the Marchenko-Pastur edge, so that most of a random matrix counts as signal;
and dividing by max S makes one strong new direction *lower* the ratio, and a matrix of twice the size half as critical.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxcrit.evidence.measured import Measured, Spectra


def weight_snr(spectra: Spectra) -> Measured:
    """SNR of each layer, `relative_mean` of its matrices; ``[L]``, not finite where a matrix has nothing below t."""
    return relative_mean(spectra, snr)


def relative_mean(spectra: Spectra, of: Callable[[np.ndarray, tuple[int, int]], np.ndarray]) -> Measured:
    """A layer's figure from its matrices': each relative to the mean of its kind over the layers, then their mean.

    Kinds (q, o, down, ...) differ in shape and so in level; Spectrum too compares within a kind. 1 is a layer like the
    average.

    Args:
        spectra: of all matrices.
        of: function of singular values ``[L, r]`` (float64) and shape, giving ``[L]``.
    """
    kinds = [of(values.astype(np.float64), spectra.shapes[name]) for name, values in spectra.values.items()]
    levels = [np.mean(values, where=np.isfinite(values)) if np.isfinite(values).any() else np.nan for values in kinds]
    return Measured(np.mean([values / level for values, level in zip(kinds, levels, strict=True)], axis=0))


def snr(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``[L, r]`` descending singular values to ``[L]``."""
    upper, lower = np.quantile(values, [0.75, 0.25], axis=-1)
    threshold = (upper - lower) / 1.349 * (1 + np.sqrt(min(shape) / max(shape)))
    above = np.where(values > threshold[:, None], values, 0).sum(axis=-1)
    with np.errstate(divide="ignore"):
        return above / (values.sum(axis=-1) - above) / values[:, 0]
