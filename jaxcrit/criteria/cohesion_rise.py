"""cohesion_rise: how much closer together a block brings the prompts of a class (after arXiv 2302.12758).

A class is the model's own next token. Its cohesion behind a block is the mean cosine of each prompt's last-token state
with the mean state of the *other* prompts of the class: a mean that holds the prompt itself flatters small classes.
The score is the rise of cohesion over the layer before, meaned over classes by their number of prompts; layer 0 has
none. High is critical. Sees where prompts with one answer gather; blind to what happens between classes. On decoders
cohesion mostly falls with depth, so the highest rise may be the smallest fall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.evidence.criterion import Criterion, Measured
from jaxcrit.evidence.forward import last_token
from jaxcrit.models.decoder import Decoder, logits

MIN_PROMPTS = 8  # a class of fewer has no centroid to speak of


def with_next(decoder: Decoder, states: jax.Array) -> dict[str, jax.Array]:
    """Last-token states ``[L, B, D]``, and the likeliest next token, ``[L, B]`` int32, the same in all layers."""
    tokens = jnp.argmax(logits(decoder, states[-1]), axis=-1).astype(jnp.int32)
    return {"states": states, "next": jnp.broadcast_to(tokens, states.shape[:2])}


def large_classes(labels: Sequence[Hashable]) -> dict[Any, np.ndarray]:
    """Places of the prompts of every class of `MIN_PROMPTS` or more, the largest class first.

    Raises:
        UserError: there is no such class.
    """
    counted = Counter(labels)
    if not counted or max(counted.values()) < MIN_PROMPTS:
        most = max(counted.values(), default=0)
        raise UserError(
            f"expected a class of {MIN_PROMPTS} prompts or more, got {len(labels)} prompts in {len(counted)}"
            f" classes, the largest of {most}; give more prompts, or prompts whose answers are of fewer kinds"
        )
    places: dict[Any, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return {label: np.array(places[label]) for label, size in counted.most_common() if size >= MIN_PROMPTS}


def leave_one_out(states: np.ndarray) -> np.ndarray:
    """Cosine of each state of a class with the mean of the others, ``[n, L, D]`` to ``[n, L]`` float64.

    It is 0 where one of the two is zero.
    """
    return np.stack([_cosines(products)[0] for products in _products(states)], axis=1)


def cohesion_without_each(states: np.ndarray) -> np.ndarray:
    """Mean of `leave_one_out` with each state left out in turn, ``[n, L]``."""
    return np.stack([_cosines(products, deletions=True)[1] for products in _products(states)], axis=1)


def _products(states: np.ndarray) -> Iterator[np.ndarray]:
    """Inner products ``[n, n]`` float64 of the states of each layer."""
    for layer in range(states.shape[1]):
        one = states[:, layer].astype(np.float64)
        yield one @ one.T


def _cosines(products: np.ndarray, deletions: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cosines with the mean of the others ``[n]``, and their mean without each; the mean's scale does not matter."""
    own, row, total = products.diagonal(), products.sum(axis=1), products.sum()
    found = _cosine(row - own, own, total - 2 * row + own)
    if not deletions:
        return found, found
    i, k = np.s_[:, None], np.s_[None, :]  # whose cosine; who is left out
    rest = total - 2 * row[i] - 2 * row[k] + own[i] + own[k] + 2 * products
    left = _cosine((row - own)[i] - products, own[i], rest)
    np.fill_diagonal(left, 0)
    return found, left.sum(axis=0) / max(len(own) - 1, 1)


def _cosine(dots: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine from an inner product and two squared lengths; the root of their product gives opposites exactly -1."""
    lengths = one * other
    return np.divide(dots, np.sqrt(np.maximum(lengths, 0)), out=np.zeros_like(dots), where=lengths > 0)


def rise(cohesion: np.ndarray) -> np.ndarray:
    """Cohesion ``[..., L]`` less that of the layer before; NaN in layer 0."""
    return np.diff(cohesion, axis=-1, prepend=np.nan)


def measured(states: np.ndarray, labels: Sequence[Hashable]) -> Measured:
    """`rise` meaned over the classes of `MIN_PROMPTS` or more, weighted by their size, with its deletions.

    Args:
        states: ``[N, L, D]`` last-token states.
        labels: ``[N]`` class of each prompt.

    Raises:
        UserError: see `large_classes`.
    """
    classes = large_classes(labels)
    total, count = np.zeros(states.shape[1]), sum(map(len, classes.values()))
    changed = np.zeros((len(labels), states.shape[1]))  # what is added to the weighted sum when a prompt goes
    gone = np.zeros((len(labels), 1))
    for places in classes.values():
        mine = len(places) * rise(leave_one_out(states[places]).mean(axis=0))
        total += mine
        changed[places] = (len(places) - 1) * rise(cohesion_without_each(states[places])) - mine
        gone[places] = 1
    meta = {"classes": len(classes), "prompts_in_classes": count}
    return Measured(total / count, (total + changed) / (count - gone), meta=meta)


def cohesion_rise(found: Mapping[str, np.ndarray]) -> Measured:
    """`measured` of states ``[N, L, D]`` by next token, of which `with_next` gives ``[N, L]``."""
    return measured(found["states"], found["next"][:, 0].tolist())


CRITERIA = {
    "cohesion_rise": Criterion(
        needs="forward",
        direction="high",
        score=cohesion_rise,
        tap=last_token,
        finish=with_next,
        formula="s_l - s_{l-1}, s_l mean cosine of h_{l,i} with the mean of the others of its class (next token)",
        source="after Jebreel et al. 2023",
        responds="prompts with one answer gathering",
        blind="scale; what happens between classes. Cohesion mostly falls with depth: the largest rise may be a fall",
    )
}
