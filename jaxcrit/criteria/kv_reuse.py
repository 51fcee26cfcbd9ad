"""kv_reuse: what a model loses when one layer's keys and values of a prompt's beginning come from another model.

``D_l = mean_i mean_t KL(p_it || p_it^l)``, over rows i and the scored places t of each: p of the model over its own
cache, p^l over the same with layer l from the sender. Nothing passes on inside the prefix. After arXiv 2411.02820.
``kv_distance_keys`` and ``kv_distance_values`` are the Frobenius norms of the difference over those of the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.evidence.criterion import Criterion, Measured, mean_over


def kv_reuse(damage: np.ndarray) -> Measured:
    """Mean over rows of the damage ``[L, N]`` in nats."""
    return mean_over(damage.T)


def kv_distance(apart: np.ndarray, own: np.ndarray) -> Measured:
    """Norm of a difference over a norm, from their squares ``[L, N]`` by row."""

    def ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(one / other)

    total, whole = apart.sum(axis=1), own.sum(axis=1)
    without = None if len(apart.T) < 2 else ratio(total - apart.T, whole - own.T)
    return Measured(ratio(total, whole), without)


def scores(
    damage: np.ndarray, distances: np.ndarray, sample_ids: Sequence[str], meta: Mapping[str, Any]
) -> dict[str, LayerScores]:
    """The three scores, with their deletions.

    Args:
        damage: ``[L, N]`` in nats, of each layer reused alone.
        distances: ``[5, L, N]``, as `jaxcrit.evidence.reuse.Damage` has them.
        sample_ids: ``[N]`` identity of each row.
        meta: JSON values to keep beside the scores.
    """
    keys_apart, keys, values_apart, values, _ = distances
    found = {
        "kv_reuse": kv_reuse(damage),
        "kv_distance_keys": kv_distance(keys_apart, keys),
        "kv_distance_values": kv_distance(values_apart, values),
    }
    about = {**meta, "num_samples": len(sample_ids)}
    return {key: CRITERIA[key].scores(key, one, about, sample_ids) for key, one in found.items()}


def _criterion(formula: str, responds: str, blind: str, score: Any) -> Criterion:
    return Criterion(
        needs="variants",
        direction="high",
        score=score,
        command="reuse",
        formula=formula,
        source="after arXiv 2411.02820",
        responds=responds,
        blind=blind,
    )


CRITERIA = {
    "kv_reuse": _criterion(
        "mean KL(own || with the layer's keys and values of another model), nats",
        "what the model reads from this layer's cache and the other model has changed",
        "what reuse of several layers does together; which of them are worth recomputing",
        kv_reuse,
    ),
    "kv_distance_keys": _criterion(
        "||K_S - K_R|| / ||K_R||",
        "how far the other model's keys have moved",
        "whether the model reads what has moved; grows with depth",
        kv_distance,
    ),
    "kv_distance_values": _criterion(
        "||V_S - V_R|| / ||V_R||",
        "how far the other model's values have moved",
        "whether the model reads what has moved; grows with depth",
        kv_distance,
    ),
}
