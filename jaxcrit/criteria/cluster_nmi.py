"""cluster_nmi and cluster_step: how far a layer groups tokens anew (Nepal et al. 2025, arXiv 2506.22638).

The states of all prompt tokens but each prompt's first are clustered by k-means, at the embedding and behind every
block, each time from the same draws. With U_l the clusters behind block l, ``cluster_nmi`` is ``NMI(U_embed, U_l)``,
normalised by the arithmetic mean of the entropies; low is critical: the layer has left the grouping of the embedding.
``cluster_step`` is ``1 - NMI(U_{l-1}, U_l)``, local as step is to delta; high is critical.

Sees tokens that change places among groups; blind to what happens within a group. The clusters are mostly lexical, at
any depth. Values depend on the number of clusters and on the draws, so each is a mean over several starts of k-means;
beside it stand their spread and the value by chance (labels permuted), which is not 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.options import Options, option
from jaxcrit.evidence.criterion import Criterion, Measured

if TYPE_CHECKING:  # jax is imported where it is used, so that the options can be listed at once
    import jax

ROUNDS = 50  # of Lloyd's algorithm
TOKENS_PER_CLUSTER = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options, title="cluster_nmi and cluster_step", prefix="cluster_nmi"):
    """What the clusters are asked."""

    clusters: int = option(50, "clusters of k-means", lowest=2)
    seeds: int = option(3, "starts of k-means, to average over", lowest=1)
    tokens: int = option(4096, "token states to cluster, at most", lowest=20)
    scale: bool = option(True, "scale states to length 1 first")

    def check(self) -> None:
        """Checks that so many tokens can be enough."""
        super().check()
        if self.tokens < TOKENS_PER_CLUSTER * self.clusters:
            raise UserError(
                f"--cluster_nmi.tokens={self.tokens}: expected {TOKENS_PER_CLUSTER} tokens to a cluster,"
                f" {TOKENS_PER_CLUSTER * self.clusters} for --cluster_nmi.clusters={self.clusters}"
            )


def tap(options: ClusterOptions) -> Any:
    """States of the tokens, the embedding's in front."""
    from jaxcrit.evidence.forward import all_tokens, with_embedding

    return with_embedding(all_tokens(options.tokens))


def regrouping(states: np.ndarray, options: ClusterOptions) -> dict[str, Measured]:
    """Both criteria from the states of tokens.

    Args:
        states: ``[N, L+1, D]`` float32, the embedding in front.
        options: numbers of clusters and starts, and whether states are scaled.

    Raises:
        UserError: fewer tokens than 10 to a cluster, or fewer distinct states than clusters.
    """
    rows = np.ascontiguousarray(states.swapaxes(0, 1), np.float32)
    if options.scale:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    _refuse(rows, options.clusters)
    labels = clusterings(rows, options.clusters, options.seeds)
    permuted = np.stack([np.random.default_rng(seed).permutation(one.T).T for seed, one in enumerate(labels)])
    meta = {
        "clusters": options.clusters,
        "seeds": options.seeds,
        "scale": options.scale,
        "tokens": len(states),
        "stderr": "over the starts of k-means",
    }
    found = {}
    for key, before, value in (
        ("cluster_nmi", labels[:, :1].repeat(labels.shape[1] - 1, axis=1), lambda shared: shared),
        ("cluster_step", labels[:, :-1], lambda shared: 1 - shared),
    ):
        values, chance = (value(_each(before, after[:, 1:])) for after in (labels, permuted))
        spread = values.std(axis=0, ddof=1) if options.seeds > 1 else None
        beside = {"chance": chance.mean(axis=0).tolist(), "spread": None if spread is None else spread.tolist()}
        stderr = None if spread is None else spread / np.sqrt(options.seeds)
        found[key] = Measured(values.mean(axis=0), stderr=stderr, meta={**meta, **beside})
    return found


def nmi(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised mutual information 2 I / (H + H') of two labellings ``[N]``, whole numbers from 0.

    It is 0 where one is constant, and 1 where both are.
    """
    pairs = first.astype(np.int64) * (int(second.max()) + 1) + second
    one, two, joint = (np.unique(labels, return_counts=True)[1] for labels in (first, second, pairs))
    if len(one) == len(two) == 1:
        return 1.0
    of_one, of_two, of_both = (_entropy(counts) for counts in (one, two, joint))
    return max(0.0, 2 * (of_one + of_two - of_both) / (of_one + of_two))


def _entropy(counts: np.ndarray) -> float:
    """Entropy of clusters of these sizes, nats; the same to the last bit whatever the clusters are called."""
    share = np.sort(counts) / counts.sum()
    return float(-np.sum(share * np.log(share)))


def _each(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`nmi` by seed and layer, ``[S, L, N]`` twice to ``[S, L]``."""
    return np.array([[nmi(*pair) for pair in zip(*both, strict=True)] for both in zip(before, after, strict=True)])


def _refuse(rows: np.ndarray, clusters: int) -> None:
    count = rows.shape[1]
    if count < TOKENS_PER_CLUSTER * clusters:
        raise UserError(
            f"--cluster_nmi.clusters={clusters}: expected {TOKENS_PER_CLUSTER} tokens to a cluster,"
            f" {TOKENS_PER_CLUSTER * clusters} in all, got {count} without each prompt's first;"
            " give more rows, or fewer clusters"
        )
    for layer, states in enumerate(rows):
        distinct = len({row.tobytes() for row in states})
        if distinct < clusters:
            where = f"behind layer {layer - 1}" if layer else "at the embedding"
            raise UserError(
                f"--cluster_nmi.clusters={clusters}: expected as many distinct states, got {distinct} {where};"
                " give more varied rows, or fewer clusters"
            )


def clusterings(rows: np.ndarray, clusters: int, seeds: int) -> np.ndarray:
    """Labels ``[seeds, L, N]`` of states ``[L, N, D]``; a seed's draws are the same in all layers."""
    import jax

    keys = jax.vmap(jax.random.key)(np.arange(seeds))
    with jax.default_matmul_precision("highest"):
        return np.asarray(_compiled()(rows, keys, clusters))


@functools.cache
def _compiled() -> Callable[..., jax.Array]:
    import jax

    def every(rows: jax.Array, keys: jax.Array, clusters: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return jax.lax.map(lambda states: lloyd(states, start(states, clusters, key)), rows)

        return jax.lax.map(one, keys)

    return jax.jit(every, static_argnums=2)


def start(states: jax.Array, clusters: int, key: jax.Array) -> jax.Array:
    """First centres ``[k, D]`` by k-means++: rows of ``[N, D]``, each drawn by its squared distance to those before."""
    import jax
    import jax.numpy as jnp

    first, *others = jax.random.split(key, clusters)
    centre = states[jax.random.randint(first, (), 0, len(states))]

    def draw(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        nearest, centre = carry
        nearest = jnp.minimum(nearest, jnp.sum((states - centre) ** 2, axis=-1))  # 0 where the row is a centre already
        following = states[jax.random.categorical(key, jnp.log(nearest))]
        return (nearest, following), following

    _, rest = jax.lax.scan(draw, (jnp.full(len(states), jnp.inf), centre), jnp.stack(others))
    return jnp.concatenate([centre[None], rest])


def lloyd(states: jax.Array, centres: jax.Array) -> jax.Array:
    """Labels ``[N]`` of states ``[N, D]`` after `ROUNDS` rounds from centres ``[k, D]``.

    A cluster that has become empty is moved to the state farthest from its centre, several to several, as scikit-learn
    does it: equal states make equal centres, of which all but one are left empty.
    """
    import jax
    import jax.numpy as jnp

    count, clusters = len(states), len(centres)

    def nearest(centres: jax.Array) -> jax.Array:
        return jnp.argmin(jnp.sum(centres**2, axis=-1) - 2 * jnp.einsum("nd,kd->nk", states, centres), axis=-1)

    def again(_: Any, centres: jax.Array) -> jax.Array:
        labels = nearest(centres)
        empty = jnp.bincount(labels, length=clusters) == 0
        _, farthest = jax.lax.top_k(jnp.sum((states - centres[labels]) ** 2, axis=-1), clusters)
        moved = jnp.where(empty, farthest[jnp.cumsum(empty) - 1], count)
        labels = labels.at[moved].set(jnp.arange(clusters), mode="drop")
        members = jax.nn.one_hot(labels, clusters, dtype=states.dtype)
        sizes = members.sum(axis=0)[:, None]
        means = jnp.einsum("nk,nd->kd", members, states) / jnp.maximum(sizes, 1)
        return jnp.where(sizes > 0, means, centres)

    return nearest(jax.lax.fori_loop(0, ROUNDS, again, centres))


CRITERIA = {
    key: Criterion(
        needs="forward",
        direction="low" if key == "cluster_nmi" else "high",
        score=regrouping,
        tap=tap,
        options=ClusterOptions,
        formula=formula,
        source="Nepal et al. 2025",
        responds=responds,
        blind="what happens within a group; mostly lexical. Not 0 by chance; moves with the number of clusters",
    )
    for key, formula, responds in (
        ("cluster_nmi", "NMI(U_embed, U_l), U k-means clusters of all tokens", "tokens grouped otherwise than by type"),
        ("cluster_step", "1 - NMI(U_{l-1}, U_l)", "tokens regrouped by this very layer"),
    )
}
