"""stable_rank: ``||W||_F^2 / ||W||_2^2`` of weight matrices (Rudelson and Vershynin 2007).

Low is critical: a few directions carry the matrix, as training leaves it (Martin and Mahoney 2021). Needs weights
alone. Sees one strong direction; blind to scale, to rotations, and to what the direction does.
"""

from __future__ import annotations

from jaxcrit.evidence.criterion import Criterion, Measured
from jaxcrit.evidence.weights import Spectra, relative_mean


def stable_rank(spectra: Spectra) -> Measured:
    """Stable rank of each layer, `relative_mean` of its matrices; ``[L]``."""
    return relative_mean(spectra, lambda values, shape: (values**2).sum(axis=-1) / values[..., 0] ** 2)


CRITERIA = {
    "stable_rank": Criterion(
        needs="weights",
        direction="low",
        score=stable_rank,
        formula="||W||_F² / ||W||_2², mean over matrices",
        source="Rudelson and Vershynin 2007",
        responds="one strong direction",
        blind="rotation, scale; what the direction does",
    )
}
