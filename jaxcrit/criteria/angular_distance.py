"""angular_distance: how far a block turns the state of the last prompt token (Gromov et al. 2024, arXiv 2403.17887).

``mean_i arccos(cos(h_{l-1,i}, h_{l,i})) / pi``, from 0 (same direction) to 1 (opposite). The authors prune where it is
low; high is critical here. Sees any turn of the stream, also a rotation of all samples together, to which CKA is blind;
blind to the length of the stream.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.forward import View


def tap(before: jax.Array, after: jax.Array, view: View) -> jax.Array:
    """Angle in units of pi, ``[B]`` float32; by the half angle, for arccos near 1 loses half of all digits."""
    first, second = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (view.last(before), view.last(after)))
    apart, along = (jnp.linalg.norm(x, axis=-1) for x in (second - first, second + first))
    return 2 * jnp.arctan2(apart, along) / jnp.pi


def angular_distance(angles: np.ndarray) -> Measured:
    """Mean over the prompts, ``[L]``."""
    return mean_over(angles.astype(np.float64))


CRITERIA = {
    "angular_distance": Criterion(
        needs="forward",
        direction="high",
        score=angular_distance,
        tap=tap,
        formula="mean_i arccos(cos(h_{l-1,i}, h_{l,i})) / π, last token",
        source="Gromov et al. 2024",
        responds="any turn of the last token's state, rotations too",
        blind="scale",
    )
}
