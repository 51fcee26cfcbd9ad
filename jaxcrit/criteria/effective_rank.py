"""effective_rank: over how many directions the samples spread in a layer (Roy and Vetterli 2007).

``exp(H(s / sum s))``, H the entropy and s the singular values of the centred states ``[N, D]`` of the last prompt
token; from 1 to N-1. Low is critical: the layer compresses. Sees a collapse or one dominating direction; blind to
rotations, to scale, and to which directions are taken.
"""

from __future__ import annotations

import numpy as np

from jaxcrit import similarity
from jaxcrit.evidence.criterion import Criterion, Measured
from jaxcrit.evidence.forward import last_token


def effective_rank(states: np.ndarray) -> Measured:
    """Effective rank of each layer, ``[L]``; NaN where all samples are the same."""
    centred = np.ascontiguousarray(states.swapaxes(0, 1)).astype(np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    return Measured(similarity.effective_rank(np.linalg.svd(centred, compute_uv=False)))


CRITERIA = {
    "effective_rank": Criterion(
        needs="forward",
        direction="low",
        score=effective_rank,
        tap=last_token,
        formula="exp(H(s / Σ s)), s the singular values of the centred states",
        source="Roy and Vetterli 2007",
        responds="collapse; one dominating direction",
        blind="rotation, scale. False alarm: one outlier sample",
    )
}
