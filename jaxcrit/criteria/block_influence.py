"""block_influence: how far a block turns the states of all tokens (Men et al. 2024, ShortGPT, arXiv 2403.03853).

``1 - mean over tokens of cos(h_{l-1}, h_l)``, from 0 to 2; ShortGPT removes the blocks where it is low, so high is
critical. Sees what angular_distance sees, at every token of the prompt; blind to the length of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.forward import View


def tap(before: jax.Array, after: jax.Array, view: View) -> dict[str, jax.Array]:
    """`influence` summed over the tokens of each prompt, and their number; ``[B]`` each."""
    return {"turned": view.sum(influence(before, after)), "tokens": view.lengths}


def block_influence(found: Mapping[str, np.ndarray]) -> Measured:
    """Mean over the tokens of all prompts, ``[L]``, of what `tap` gives by prompt and layer."""
    tokens = found["tokens"].astype(np.float64)
    return mean_over(found["turned"] / tokens, tokens[:, 0])


def influence(before: jax.Array, after: jax.Array) -> jax.Array:
    """``1 - cos`` along the last axis, ``[..., D]`` to ``[...]`` float32.

    As half the squared distance of the unit vectors: 1 minus a float32 cosine has no digits left where little turns.
    """
    apart = _unit(after) - _unit(before)
    return jnp.sum(apart * apart, axis=-1) / 2


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)


CRITERIA = {
    "block_influence": Criterion(
        needs="forward",
        direction="high",
        score=block_influence,
        tap=tap,
        formula="1 - mean over tokens of cos(h_{l-1}, h_l)",
        source="Men et al. 2024 (ShortGPT)",
        responds="any turn, of all tokens",
        blind="scale; one outlier sample is one vote",
    )
}
