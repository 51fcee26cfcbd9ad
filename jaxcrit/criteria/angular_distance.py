"""angular_distance: how far a block turns the state of the last prompt token (Gromov et al. 2024, arXiv 2403.17887).

``mean_i arccos(cos(h_{l-1,i}, h_{l,i})) / pi``, from 0 (same direction) to 1 (opposite). The authors prune where it is
low; high is critical here. Sees any turn of the stream, also a rotation of all samples together, to which CKA is blind;
blind to the length of the stream.
"""

from __future__ import annotations

import numpy as np

from jaxcrit.evidence.criterion import Measured, States, mean_over


def angular_distance(states: States) -> Measured:
    """Mean angle in units of pi, ``[L]``; by the half angle, for arccos near 1 loses half of all digits."""
    hidden = states.hidden.astype(np.float64)
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    apart = np.linalg.norm(unit[1:] - unit[:-1], axis=-1)
    return mean_over((2 * np.arctan2(apart, np.linalg.norm(unit[1:] + unit[:-1], axis=-1)) / np.pi).T)
