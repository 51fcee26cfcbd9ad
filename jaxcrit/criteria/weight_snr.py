"""weight_snr: signal-to-noise ratio of weight matrices, as in Spectrum (Hartford et al. 2024, arXiv 2406.06623).

With singular values S, ``(sum of S above t / sum of the rest) / max S``, t = (1 + sqrt(beta)) IQR(S) / 1.349 and beta
the shorter side over the longer; Spectrum trains the matrices where it is high. Needs weights alone. The threshold is
the released code's, without the sqrt(n) of the Marchenko-Pastur edge, so that most of a random matrix counts as signal;
and dividing by max S makes one strong new direction *lower* the ratio, and a matrix of twice the size half as critical.
"""

from __future__ import annotations

import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured
from jaxcrit.evidence.weights import Spectra, relative_mean


def weight_snr(spectra: Spectra) -> Measured:
    """SNR of each layer, `relative_mean` of its matrices; ``[L]``, not finite where a matrix has nothing below t."""
    return relative_mean(spectra, snr)


def snr(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``[..., r]`` descending singular values to ``[...]``."""
    upper, lower = np.quantile(values, [0.75, 0.25], axis=-1)
    threshold = (upper - lower) / 1.349 * (1 + np.sqrt(min(shape) / max(shape)))
    above = np.where(values > threshold[..., None], values, 0).sum(axis=-1)
    with np.errstate(divide="ignore"):
        return above / (values.sum(axis=-1) - above) / values[..., 0]


CRITERIA = {
    "weight_snr": Criterion(
        needs="weights",
        direction="high",
        score=weight_snr,
        formula="Σ S above t / Σ S below t / max S, S the singular values; mean over matrices",
        source="Hartford et al. 2024 (Spectrum)",
        responds="many directions of like strength",
        blind="rotation. One strong direction *lowers* it; twice the weights halve it",
    )
}
