"""One pass over stored activations before their sweep in blocks: means, lengths, and what makes them degenerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core import processes
from jaxcrit.similarity._grams import ROUNDING, refuse_constant, refuse_infinite, refuse_repeats

Progress = Callable[[int, int], None]
_DIRECTIONS = 4


class Survey(NamedTuple):
    """What is known of activations ``[L, N, D]`` before any product.

    Attributes:
        mean: ``[L, D]`` float32.
        lengths: ``[L, N]`` float32, each sample's squared distance from the mean.
    """

    mean: jax.Array
    lengths: np.ndarray


class Block(NamedTuple):
    """Samples ``start`` to ``start + size`` of stored activations; ``mask`` leaves out what an earlier block held.

    Blocks have one size, for one compile; so the last begins before the one before it ends.
    """

    start: int
    mask: np.ndarray


def blocks(count: int, size: int) -> list[Block]:
    """Parts ``count`` samples into blocks of ``size``, at most ``count``."""
    starts = [min(start, count - size) for start in range(0, count, size)]
    return [Block(start, np.arange(size) + start >= k * size) for k, start in enumerate(starts)]


def take(hidden: Any, start: int, size: int) -> jax.Array:
    """``hidden[:, start : start + size]`` of an array on a device or on the host, compiled once per size."""
    if isinstance(hidden, jax.Array):
        return jax.lax.dynamic_slice_in_dim(hidden, start, size, 1)
    return jnp.asarray(hidden[:, start : start + size])


def survey(hidden: Any, *, allow_repeats: bool = False) -> Survey:
    """Means and lengths, layer by layer, with the checks of `centred_grams`.

    Equal samples have equal projections: all layers' projections on random directions are added up, sorted along the
    first, and only samples that are neighbours there, and near along the others, are compared.

    Args:
        hidden: ``[L, N, D]`` activations, on devices or on the host (a memory map, say).
        allow_repeats: accept equal samples.

    Raises:
        DegenerateError: NaN or infinity, a constant layer, repeated samples.
    """
    num_layers, count, width = hidden.shape
    directions = np.random.default_rng(0).standard_normal((width, _DIRECTIONS)).astype(np.float32)
    means, lengths = [], np.empty((num_layers, count), np.float32)
    spread, projected, tolerance = np.empty(num_layers), np.zeros((count, _DIRECTIONS)), np.zeros(count)
    infinite = {}
    for layer in range(num_layers):
        mean, *facts = _facts(jnp.asarray(hidden[layer]), directions)
        own, raw, projection = processes.whole(facts)
        means.append(mean)
        lengths[layer] = own
        if not np.isfinite(raw).all():
            infinite[layer] = np.flatnonzero(~np.isfinite(raw))
            continue
        trace, centre = own.sum(dtype=np.float64), float(np.square(processes.whole(mean).astype(np.float64)).sum())
        spread[layer] = np.sqrt(trace / (trace + count * centre)) if trace else 0
        # Layers of any scale count alike; 10 standard deviations of the projection of a rounding error are enough.
        unit = np.sqrt(count / trace) if trace else 0
        projected += unit * projection.astype(np.float64)
        tolerance += unit * 10 * ROUNDING * np.sqrt(raw)
    if infinite:
        refuse_infinite(np.array(list(infinite)), np.unique(np.concatenate(list(infinite.values()))))
    refuse_constant(spread, count)
    if not allow_repeats:
        earlier, later = _repeats(hidden, projected, tolerance)
        refuse_repeats(earlier, later, count)
    return Survey(jnp.stack(means), lengths)


@jax.jit
def _facts(x: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mean, squared lengths about it, squared lengths, and projections ``[N, P]`` of a layer's samples ``[N, D]``."""
    x = x.astype(jnp.float32)
    mean = x[0]
    for _ in range(2):  # a sum of 1e5 float32 far from 0 is not exact; that of what is left of it is
        mean = mean + (x - mean).mean(axis=0)
    centred = x - mean
    projection = jnp.dot(centred, directions, precision=jax.lax.Precision.HIGHEST)
    return mean, jnp.square(centred).sum(axis=1), jnp.square(x).sum(axis=1), projection


def _repeats(hidden: Any, projected: np.ndarray, tolerance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (earlier, later) of samples that are equal in every layer up to rounding; each later sample once.

    Large constant dimensions make the tolerance large: of 20,000 samples some 20 neighbours are within it along one
    direction, none along all. What repeats is taken out at once, so that many copies of one are not all compared.
    """
    order = np.argsort(projected[:, 0], kind="stable")
    found: dict[int, int] = {}
    step = 1
    while True:
        one, two = order[:-step], order[step:]
        allowed = np.maximum(tolerance[one], tolerance[two])
        near = np.flatnonzero(np.abs(projected[two, 0] - projected[one, 0]) <= allowed)
        if not near.size:
            break
        pairs = np.sort(np.stack([one[near], two[near]]), axis=0)
        apart = np.abs(projected[pairs[0]] - projected[pairs[1]]).max(axis=1)
        pairs = pairs[:, apart <= allowed[near]]
        repeats = {second: first for first, second in pairs.T.tolist() if _equal(hidden, first, second)}
        found |= repeats
        if repeats:
            order, step = order[~np.isin(order, list(repeats))], 1
        else:
            step += 1
    later = np.array(sorted(found), np.int64)
    for second in later.tolist():  # of several copies, the first, which is found by now
        found[second] = found.get(found[second], found[second])
    return np.array([found[second] for second in later.tolist()], np.int64), later


def _equal(hidden: Any, first: int, second: int) -> bool:
    one, two = (processes.whole(take(hidden, sample, 1)[:, 0]).astype(np.float64) for sample in (first, second))
    return bool((np.linalg.norm(one - two, axis=1) <= ROUNDING * np.linalg.norm(two, axis=1)).all())
