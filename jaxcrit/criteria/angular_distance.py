"""angular_distance: how far a block turns the state of the last prompt token (Gromov et al. 2024, arXiv 2403.17887).

``mean_i arccos(cos(h_{l-1,i}, h_{l,i})) / pi``, from 0 (same direction) to 1 (opposite). The authors prune where it is
low; high is critical here. Sees any turn of the stream, also a rotation of all samples together, to which CKA is blind;
blind to the length of the stream.
"""

from __future__ import annotations

import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.forward import last_token, with_embedding


def angular_distance(states: np.ndarray) -> Measured:
    """Mean angle in units of pi, ``[L]``; by the half angle, for arccos near 1 loses half of all digits."""
    hidden = np.ascontiguousarray(states.swapaxes(0, 1)).astype(np.float64)
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    apart = np.linalg.norm(unit[1:] - unit[:-1], axis=-1)
    return mean_over((2 * np.arctan2(apart, np.linalg.norm(unit[1:] + unit[:-1], axis=-1)) / np.pi).T)


CRITERIA = {
    "angular_distance": Criterion(
        needs="forward",
        direction="high",
        score=angular_distance,
        tap=with_embedding(last_token),
        formula="mean_i arccos(cos(h_{l-1,i}, h_{l,i})) / π, last token",
        source="Gromov et al. 2024",
        responds="any turn of the last token's state, rotations too",
        blind="scale",
    )
}
