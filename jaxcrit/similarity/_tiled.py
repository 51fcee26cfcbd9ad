"""Grams of all layers in tiles of samples: exact at any N, never N x N in memory, and with the rows errors need.

Every tile ``[L, T, T]`` is contracted at once to the rows of `GramTables` of its samples and, since Grams are
symmetric, of its columns' samples too, or to sums over both; the tiles' parts are added up in float64 on the host. The
RBF kernel takes a pass before for the means of its rows, which are not 0 as those of a linear kernel of centred
features are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.similarity._features import block_size
from jaxcrit.similarity._grams import (
    ROUNDING,
    GramSums,
    Kernel,
    Tables,
    check_band,
    checked,
    layer_products,
    on_one_cpu,
    power_of_two,
    product,
    tables_from,
)
from jaxcrit.similarity._survey import Progress, Survey, blocks, survey, take

# Bytes of a tile of all layers on CPU: it is written and read several times, and should stay in the cache meanwhile.
# 30 layers of 3,000 samples of width 576 take 1.7 times as long by tiles of 1,024 as by those of 384.
_CPU_TILE, _CPU_TILE_UNIT = 20 * 2**20, 16
# Samples of a tile that are contracted at a time on CPU, where their rows are kept and where their sum is.
_CPU_ROWS, _CPU_SUMMED = 24, 4
# Pairs of samples whose median distance is the bandwidth: 1e5 move CKA by about 1e-5 at N=1e4.
BANDWIDTH_PAIRS = 100_000
# The RBF kernel is taken without exp(-1/2), which centring removes, to save digits; this is then its diagonal.
_RBF_DIAGONAL = float(np.exp(-0.5) * np.expm1(0.5))


class Layers(NamedTuple):
    """What tiles need to know of each layer; all but the mean ``[L]``."""

    mean: Any  # [L, D]
    bandwidth: Any  # of the RBF kernel, squared
    grand: Any  # mean of the RBF kernel
    scale: Any  # of the Gram


class Samples(NamedTuple):
    """Samples that a tile's rows or columns are of; all but the first three ``[L, T]``."""

    x: Any  # [L, M, D] activations, of which theirs are T from ``start`` on
    start: Any
    mask: Any  # [T]
    lengths: Any  # squared, about the mean
    means: Any  # of the RBF kernel's rows
    diagonals: Any  # of the centred Gram, scaled


def tiled(
    hidden: Any,
    *,
    kernel: Kernel = "linear",
    band: int | None = None,
    tile: int | None = None,
    bandwidths: np.ndarray | None = None,
    allow_repeats: bool = False,
    sums: bool = False,
    progress: Progress | None = None,
) -> Tables:
    """The tables of `sweep`, in memory of L T^2 for tiles of T samples beside the activations and the tables.

    Args:
        hidden: ``[L, N, D]`` activations, on one device or on the host (a memory map, say); see `sharded` for several.
        kernel: ``linear`` or ``rbf``.
        band: only pairs of layers at most so far apart; all by default.
        tile: T, at most N; by default what stays in a CPU's cache, or 1,024.
        bandwidths: ``[L]`` of the RBF kernel, squared; default `sampled_bandwidths` of seed 0.
        allow_repeats: accept equal samples.
        sums: whether `GramSums` will do, all that CKA itself takes: a third less time where N and L are large.
        progress: called with (tiles done, tiles in all).

    Raises:
        DegenerateError: as `centred_grams`.
        UserError: a band wider than the model, a tile larger than N.
    """
    hidden = checked(hidden, kernel)
    num_layers, count, _ = hidden.shape
    check_band(band, num_layers)
    facts = survey(hidden, allow_repeats=allow_repeats)
    one_cpu = on_one_cpu(facts.mean)
    size = block_size(tile, count, "tile", _default_tile(num_layers, count) if one_cpu else 0)
    todo = blocks(count, size)
    pairs = [(a, b) for a in range(len(todo)) for b in range(a, len(todo))]
    steps, done = len(pairs) * (1 if kernel == "linear" else 2), 0

    def visit(contract: Any, layers: Layers, add: Any, means: np.ndarray, diagonals: np.ndarray) -> None:
        """Gives ``add`` what ``contract`` makes of every tile: block numbers of rows and columns, and parts."""
        nonlocal done

        def samples(k: int) -> Samples:
            start, mask = todo[k]
            own = (np.float32(of[:, start : start + size]) for of in (facts.lengths, means, diagonals))
            here = isinstance(hidden, jax.Array)
            return Samples(hidden if here else take(hidden, start, size), start if here else 0, mask, *own)

        for a, b in pairs:
            if a == b:
                rows = columns = samples(a)
            else:
                columns = samples(b)
            first = todo[a].start - todo[b].start
            add(a, b, jax.device_get(contract(rows, columns, layers, first, both=a != b)))
            done += 1
            if progress is not None:
                progress(done, steps)

    def added(table: np.ndarray) -> Any:
        """Adds parts to the ``[N, ...]`` table of a tile's rows and of its columns."""

        def add(a: int, b: int, parts: tuple[np.ndarray, ...]) -> None:
            for k, part in zip((a, b), parts, strict=False):
                table[todo[k].start : todo[k].start + size] += part

        return add

    layers, means, diagonals = prepare(hidden, facts, kernel, bandwidths)
    if kernel == "rbf":
        totals = np.zeros((count, num_layers))
        visit(_row_sums, layers, added(totals), means, diagonals)
        layers, means, diagonals = centre_rbf(layers, totals)
    options = {"kernel": kernel, "one_cpu": one_cpu, "band": band}
    if not sums:
        table = np.zeros((count, num_layers, 2 * num_layers))
        visit(partial(_contract, **options), layers, added(table), means, diagonals)
        return tables_from(table, diagonals, band=band)
    cross = np.zeros((num_layers, num_layers))

    def add(a: int, b: int, part: np.ndarray) -> None:
        nonlocal cross
        cross += (1 if a == b else 2) * part.sum(axis=0, dtype=np.float64)

    visit(partial(_contract_sums, **options), layers, add, means, diagonals)
    far = np.abs(np.subtract.outer(np.arange(num_layers), np.arange(num_layers))) > (
        num_layers if band is None else band
    )
    return GramSums(np.where(far, np.nan, (cross + cross.T) / 2), diagonals @ diagonals.T, diagonals.sum(axis=1), count)


def _default_tile(num_layers: int, count: int) -> int:
    """T on CPU: all layers' tiles stay in the cache, and the samples part evenly."""
    most = max(64, int((_CPU_TILE / (4 * num_layers)) ** 0.5))
    even = -(-count // -(-count // most))
    return -(-even // _CPU_TILE_UNIT) * _CPU_TILE_UNIT


def sampled_bandwidths(hidden: Any, *, pairs: int = BANDWIDTH_PAIRS, seed: int = 0) -> np.ndarray:
    """The RBF kernel's squared bandwidth of each layer: lower median of non-zero squared distances of sampled pairs.

    Args:
        hidden: ``[L, N, D]`` activations.
        pairs: how many are drawn; where there are no more, all of them are taken and the median is exact.
        seed: seed of the draw.

    Returns:
        ``[L]`` float64.
    """
    count = hidden.shape[1]
    if count * (count - 1) // 2 <= pairs:
        first, second = np.triu_indices(count, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(0, count, pairs)
        second = (first + rng.integers(1, count, pairs)) % count
    size = min(len(first), 4096)
    found = []
    for layer in range(hidden.shape[0]):
        x = jnp.asarray(hidden[layer])
        squares = np.empty(len(first), np.float32)
        for start, _ in blocks(len(first), size):
            part = slice(start, start + size)
            squares[part], lengths = _distances(x, first[part], second[part])
            squares[part][squares[part] <= ROUNDING**2 * np.asarray(lengths)] = 0  # equal samples
        squares = np.sort(squares[squares > 0])
        found.append(float(squares[(len(squares) - 1) // 2]))
    return np.array(found)


def prepare(
    hidden: Any, facts: Survey, kernel: Kernel, bandwidths: np.ndarray | None
) -> tuple[Layers, np.ndarray, np.ndarray]:
    """Layers, means of the kernel's rows and scaled diagonals ``[L, N]``, before any tile of the kernel was seen."""
    if kernel == "linear":
        return _layers(facts.mean, np.ones(len(facts.lengths)), np.zeros_like(facts.lengths), facts.lengths)
    bandwidths = sampled_bandwidths(hidden) if bandwidths is None else np.asarray(bandwidths)
    zeros = np.zeros_like(facts.lengths)
    return _layers(facts.mean, bandwidths, zeros, zeros)


def centre_rbf(layers: Layers, sums: np.ndarray) -> tuple[Layers, np.ndarray, np.ndarray]:
    """The same once the sums of the kernel's rows ``[N, L]`` are known."""
    means = sums.T / len(sums)
    diagonals = _RBF_DIAGONAL - 2 * means + means.mean(axis=1, keepdims=True)
    return _layers(layers.mean, layers.bandwidth, means, diagonals)


def _layers(
    mean: Any, bandwidth: Any, means: np.ndarray, diagonals: np.ndarray
) -> tuple[Layers, np.ndarray, np.ndarray]:
    scale = np.asarray(power_of_two(jnp.asarray(np.float32(diagonals.sum(axis=1, dtype=np.float64)))))
    return Layers(mean, np.float32(bandwidth), np.float32(means.mean(axis=1)), scale), means, diagonals * scale[:, None]


def products(rows: Samples, columns: Samples, layers: Layers) -> jax.Array:
    """``[L, R, C]`` inner products of centred activations, 0 where masked."""

    def layer(of: tuple[jax.Array, jax.Array]) -> jax.Array:
        return product(*(jnp.where(side.mask[:, None], _centred(side, *of), 0) for side in (rows, columns)))

    return jax.lax.map(layer, (jnp.arange(len(layers.mean)), layers.mean))


def _centred(samples: Samples, layer: jax.Array, mean: jax.Array) -> jax.Array:
    """One layer's centred activations ``[T, D]``: cut out where they are used, so that no tile of them is copied."""
    sizes = (1, len(samples.mask), samples.x.shape[2])
    return jax.lax.dynamic_slice(samples.x, (layer, samples.start, 0), sizes)[0].astype(jnp.float32) - mean


def rbf(inner: jax.Array, rows: Samples, columns: Samples, layers: Layers) -> jax.Array:
    """The RBF kernel less exp(-1/2), from inner products ``[L, R, C]``, or of one layer; 0 where masked."""
    distances = jnp.maximum(rows.lengths[..., :, None] + columns.lengths[..., None, :] - 2 * inner, 0)
    half = jnp.float32(0.5)
    kernel = jnp.exp(-half) * jnp.expm1(half - half * distances / layers.bandwidth[..., None, None])
    return jnp.where(rows.mask[:, None] & columns.mask, kernel, 0)


def centred_rbf(inner: jax.Array, rows: Samples, columns: Samples, layers: Layers) -> jax.Array:
    """The centred RBF Gram; 0 where masked."""
    means = rows.means[..., :, None] + columns.means[..., None, :] - layers.grand[..., None, None]
    return jnp.where(rows.mask[:, None] & columns.mask, rbf(inner, rows, columns, layers) - means, 0)


def _tile(
    rows: Samples, columns: Samples, layers: Layers, first: jax.Array, kernel: Kernel, weigh: bool
) -> tuple[jax.Array, ...]:
    """Scaled Grams without their diagonals, ``[L, R, C]``; to ``weigh``, their products with diagonals too.

    These are ``[L, R, L]`` of the columns' diagonals and ``[L, C, L]`` of the rows', made while a layer's tile is in
    the cache.
    """
    kept = rows.mask[:, None] & columns.mask
    kept &= jnp.arange(len(rows.mask))[:, None] + first != jnp.arange(len(columns.mask))

    def layer(of: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        index, one, own, other = of
        inner = product(_centred(rows, index, one.mean), _centred(columns, index, one.mean))
        if kernel == "rbf":
            inner = centred_rbf(inner, Samples(*rows[:3], *own), Samples(*columns[:3], *other), one)
        gram = jnp.where(kept, inner * one.scale, 0)
        return (gram, product(gram, columns.diagonals), product(gram.T, rows.diagonals)) if weigh else (gram,)

    return jax.lax.map(layer, (jnp.arange(len(layers.mean)), layers, rows[3:], columns[3:]))


@partial(jax.jit, static_argnames=("kernel", "one_cpu", "band", "both"))
def _contract(
    rows: Samples,
    columns: Samples,
    layers: Layers,
    first: jax.Array,
    *,
    kernel: Kernel,
    one_cpu: bool,
    band: int | None,
    both: bool,
) -> tuple[jax.Array, ...]:
    """Parts of the table, ``[T, L, 2L]``, of the rows' samples and, of ``both``, of the columns'."""
    with jax.named_scope("tile"):
        grams, *weighted = _tile(rows, columns, layers, first, kernel, weigh=True)
        found = []
        for axis, of in zip((1, 2) if both else (1,), weighted, strict=False):

            def contract(sample: jax.Array, axis: int = axis) -> jax.Array:
                row = jax.lax.dynamic_index_in_dim(grams, sample, axis, keepdims=False)
                return layer_products(row, (row,), band)

            count = grams.shape[axis]
            own = jax.lax.map(contract, jnp.arange(count), batch_size=min(_CPU_ROWS, count) if one_cpu else count)
            found.append(jnp.concatenate([own, of.swapaxes(0, 1)], axis=2))
        return tuple(found)


@partial(jax.jit, static_argnames=("kernel", "one_cpu", "band", "both"))
def _contract_sums(
    rows: Samples,
    columns: Samples,
    layers: Layers,
    first: jax.Array,
    *,
    kernel: Kernel,
    one_cpu: bool,
    band: int | None,
    both: bool,
) -> jax.Array:
    """Inner products of layers' tiles, ``[S, L, L]``; the sum over S, short sums over samples, is the tile's."""
    del both
    with jax.named_scope("tile"):
        (grams,) = _tile(rows, columns, layers, first, kernel, weigh=False)
        depth, count, width = grams.shape
        size = max(of for of in range(1, _CPU_SUMMED + 1) if count % of == 0) if one_cpu else 1

        def contract(part: jax.Array) -> jax.Array:
            cut = jax.lax.dynamic_slice(grams, (0, part * size, 0), (depth, size, width)).reshape(depth, -1)
            return layer_products(cut, (cut,), band)

        parts = count // size
        return jax.lax.map(contract, jnp.arange(parts), batch_size=1 if one_cpu else parts)


@partial(jax.jit, static_argnames="both")
def _row_sums(
    rows: Samples, columns: Samples, layers: Layers, first: jax.Array, *, both: bool
) -> tuple[jax.Array, ...]:
    """Sums of the RBF kernel, ``[T, L]``, over the columns and, of ``both``, over the rows."""
    del first  # a sample's distance from itself counts
    kernel = rbf(products(rows, columns, layers), rows, columns, layers)
    return tuple(kernel.sum(axis=axis).T for axis in ((2, 1) if both else (2,)))


@jax.jit
def _distances(x: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    one, two = x[first].astype(jnp.float32), x[second].astype(jnp.float32)
    return jnp.square(one - two).sum(axis=1), jnp.square(one).sum(axis=1) + jnp.square(two).sum(axis=1)
