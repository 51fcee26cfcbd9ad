"""lens_entropy: how undecided a layer's own reading is (logit lens; for its knees, arXiv 2503.01275).

``mean_i H(softmax F(h_{l,i}))`` at the last prompt token, in nats, F being final norm and head. High is critical: no
token is settled on yet. Sees where the reading narrows; blind to which token it narrows to (`lens_kl` sees that), to
the length of the stream, which the final norm takes out, and to anything the head does not read.

The curve's two knees are the layers of its two largest drops from the layer below, at least an eighth of the layers
apart. Deep supervision takes them as where the input is understood and where the answer is made. A knee is named only
where nine tenths of the resamples of the prompts put it on that very layer: half of them agree on a layer of nothing
but noise too often. Of pure noise, nine tenths name one in at most 5 % of draws
(``tests/criteria/test_lens_entropy.py``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.forward import last_token
from jaxcrit.models.decoder import Decoder, logits

KNEES = ("first", "second")
_RESAMPLES, _AGREE, _LEAST = 1000, 0.9, 10  # prompts that a knee takes at least


def lens_entropy(entropies: np.ndarray) -> Measured:
    """Mean over the prompts ``[L]``, nats; in the meta the knees."""
    entropies = entropies.astype(np.float64)
    found = mean_over(entropies)
    return Measured(found.values, found.without_each, meta=knees(entropies))


def entropy(decoder: Decoder, states: jax.Array) -> jax.Array:
    """Entropy of every layer's reading.

    Args:
        decoder: final norm and head are read.
        states: ``[L, B, D]`` float32; one layer's logits are held at a time.

    Returns:
        ``[L, B]`` float32, nats.
    """

    def read(state: jax.Array) -> jax.Array:
        shares = jax.nn.log_softmax(logits(decoder, state).astype(jnp.float32), axis=-1)
        return -jnp.sum(jnp.exp(shares) * shares, axis=-1)

    return jax.lax.map(read, states)


def knees(entropies: np.ndarray) -> dict[str, Any]:
    """The two layers where the mean entropy drops most, in order, as far as resamples of the prompts agree on them.

    Layer 0 has no layer below, so it is never a knee.

    Args:
        entropies: ``[N, L]`` nats.

    Returns:
        JSON values: by `KNEES`, ``knees``, a layer, or None where it is not named; and ``agreement``, the share of
        resamples with a knee on the layer where all prompts have it (None where there is none).
    """
    count = len(entropies)
    whole = _largest_drops(entropies.mean(axis=0))
    if count < _LEAST or whole is None:
        return {"knees": dict.fromkeys(KNEES), "agreement": dict.fromkeys(KNEES)}
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
    each = [_largest_drops(curve) for curve in weights @ entropies]
    shares = [sum(one is not None and one[place] == whole[place] for one in each) / _RESAMPLES for place in (0, 1)]
    named = [layer if share > _AGREE else None for layer, share in zip(whole, shares, strict=True)]
    return {
        "knees": dict(zip(KNEES, named, strict=True)),
        "agreement": dict(zip(KNEES, shares, strict=True)),
    }


def _largest_drops(curve: np.ndarray) -> tuple[int, int] | None:
    """Two layers of ``[L]``, in order, at least L/8 apart; None where the curve does not drop in two such places."""
    drops = np.diff(-curve, prepend=np.inf)  # -inf in layer 0
    first = int(np.argmax(drops))
    apart = np.abs(np.arange(len(curve)) - first) >= max(1, len(curve) / 8)
    second = int(np.argmax(np.where(apart, drops, -np.inf)))
    if not min(drops[first], drops[second]) > 0 or not apart[second]:
        return None
    return min(first, second), max(first, second)


CRITERIA = {
    "lens_entropy": Criterion(
        needs="forward",
        direction="high",
        score=lens_entropy,
        tap=last_token,
        finish=entropy,
        formula="mean_i H(softmax F(h_{l,i})), F final norm and head",
        source="logit lens; knees: DFT",
        responds="no answer being settled on yet; where it narrows (knees)",
        blind="scale; which answer it settles on; what the head does not read",
    )
}
