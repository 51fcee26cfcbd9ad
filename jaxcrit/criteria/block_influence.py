"""block_influence: how far a block turns the states of all tokens (Men et al. 2024, ShortGPT, arXiv 2403.03853).

``1 - mean over tokens of cos(h_{l-1}, h_l)``, from 0 to 2; ShortGPT removes the blocks where it is low, so high is
critical. Sees what angular_distance sees, at every token of the prompt; blind to the length of the stream.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.evidence.criterion import Measured, States, mean_over


def block_influence(states: States) -> Measured:
    """Mean over the tokens of all prompts, ``[L]``."""
    return mean_over(states.influence / states.tokens[:, None], states.tokens.astype(np.float64))


def influence(before: jax.Array, after: jax.Array) -> jax.Array:
    """``1 - cos`` along the last axis, ``[..., D]`` to ``[...]`` float32.

    As half the squared distance of the unit vectors: 1 minus a float32 cosine has no digits left where little turns.
    """
    apart = _unit(after) - _unit(before)
    return jnp.sum(apart * apart, axis=-1) / 2


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
