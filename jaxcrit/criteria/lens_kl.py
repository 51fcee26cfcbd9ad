"""lens_kl: how far a layer's own reading is from the model's answer (logit lens; nostalgebraist 2020).

``mean_i KL(p_i || softmax F(h_{l,i}))`` at the last prompt token, in nats, F being final norm and head and p the
model's own distribution; 0 in the last layer. High is critical: the answer is not there yet. Sees where the answer
settles; blind to the length of the stream, which the final norm takes out, and to anything the head does not read.
Falls with depth in nearly every model: compare given depth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.forward import last_token
from jaxcrit.models.decoder import Decoder, logits


def lens_kl(divergences: np.ndarray) -> Measured:
    """Mean over the prompts, ``[L]``, nats."""
    return mean_over(divergences.astype(np.float64))


def divergence(decoder: Decoder, states: jax.Array) -> jax.Array:
    """KL divergence from the last layer's distribution to every layer's.

    Args:
        decoder: final norm and head are read.
        states: ``[L, B, D]`` float32; one layer's logits are held at a time.

    Returns:
        ``[L, B]`` float32, nats.
    """

    def read(state: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits(decoder, state).astype(jnp.float32), axis=-1)

    final = read(states[-1])
    return jax.lax.map(lambda state: jnp.sum(jnp.exp(final) * (final - read(state)), axis=-1), states)


CRITERIA = {
    "lens_kl": Criterion(
        needs="forward",
        direction="high",
        score=lens_kl,
        tap=last_token,
        finish=divergence,
        formula="mean_i KL(p_i || softmax F(h_{l,i})), F final norm and head",
        source="logit lens",
        responds="the answer not being there yet",
        blind="scale; what the head does not read",
    )
}
