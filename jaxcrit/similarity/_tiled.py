"""Grams of all layers in tiles of samples: exact at any N, never N x N in memory, and with the rows errors need.

Every tile ``[L, T, T]`` is contracted at once to the rows of `GramTables` of its samples and, since Grams are
symmetric, of its columns' samples too; the tiles' parts are added up in float64 on the host. The RBF kernel takes a
pass before for the means of its rows, which are not 0 as those of a linear kernel of centred features are.
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
    GramTables,
    Kernel,
    check_band,
    checked,
    contract_rows,
    on_one_cpu,
    power_of_two,
    product,
    tables_from,
)
from jaxcrit.similarity._survey import Progress, Survey, blocks, survey, take

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
    """Samples that a tile's rows or columns are of; all but the first two ``[L, T]``."""

    x: Any  # [L, T, D] activations
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
    progress: Progress | None = None,
) -> GramTables:
    """The tables of `sweep`, in memory of L T^2 for tiles of T samples beside the activations and the tables.

    Args:
        hidden: ``[L, N, D]`` activations, on one device or on the host (a memory map, say); see `sharded` for several.
        kernel: ``linear`` or ``rbf``.
        band: only pairs of layers at most so far apart; all by default.
        tile: T, at most N; default 1,024 or N.
        bandwidths: ``[L]`` of the RBF kernel, squared; default `sampled_bandwidths` of seed 0.
        allow_repeats: accept equal samples.
        progress: called with (tiles done, tiles in all).

    Raises:
        DegenerateError: as `centred_grams`.
        UserError: a band wider than the model, a tile larger than N.
    """
    hidden = checked(hidden, kernel)
    num_layers, count, _ = hidden.shape
    check_band(band, num_layers)
    size = block_size(tile, count, "tile")
    facts = survey(hidden, allow_repeats=allow_repeats)
    todo = blocks(count, size)
    pairs = [(a, b) for a in range(len(todo)) for b in range(a, len(todo))]
    steps, done = len(pairs) * (1 if kernel == "linear" else 2), 0

    def visit(contract: Any, layers: Layers, table: np.ndarray, means: np.ndarray, diagonals: np.ndarray) -> None:
        """Adds what ``contract`` makes of every tile to the ``[N, ...]`` table of its rows and of its columns."""
        nonlocal done

        def samples(k: int) -> Samples:
            start, mask = todo[k]
            own = (facts.lengths, means, diagonals)
            return Samples(take(hidden, start, size), mask, *(np.float32(of[:, start : start + size]) for of in own))

        for a, b in pairs:
            if a == b:
                rows = columns = samples(a)
            else:
                columns = samples(b)
            first = todo[a].start - todo[b].start
            parts = jax.device_get(contract(rows, columns, layers, first, both=a != b))
            for k, part in zip((a, b), parts, strict=False):
                table[todo[k].start : todo[k].start + size] += part
            done += 1
            if progress is not None:
                progress(done, steps)

    layers, means, diagonals = prepare(hidden, facts, kernel, bandwidths)
    if kernel == "rbf":
        sums = np.zeros((count, num_layers))
        visit(_row_sums, layers, sums, means, diagonals)
        layers, means, diagonals = centre_rbf(layers, sums)
    table = np.zeros((count, num_layers, 2 * num_layers))
    contract = partial(_contract, kernel=kernel, one_cpu=on_one_cpu(facts.mean), band=band)
    visit(contract, layers, table, means, diagonals)
    return tables_from(table, diagonals, band=band)


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

    def layer(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, z, mean = of
        centred = (
            jnp.where(mask[:, None], side.astype(jnp.float32) - mean, 0)
            for side, mask in ((x, rows.mask), (z, columns.mask))
        )
        return product(*centred)

    return jax.lax.map(layer, (rows.x, columns.x, layers.mean))


def rbf(inner: jax.Array, rows: Samples, columns: Samples, layers: Layers) -> jax.Array:
    """The RBF kernel less exp(-1/2), from inner products ``[L, R, C]``; 0 where masked."""
    distances = jnp.maximum(rows.lengths[:, :, None] + columns.lengths[:, None, :] - 2 * inner, 0)
    half = jnp.float32(0.5)
    kernel = jnp.exp(-half) * jnp.expm1(half - half * distances / layers.bandwidth[:, None, None])
    return jnp.where(rows.mask[:, None] & columns.mask, kernel, 0)


def centred_rbf(inner: jax.Array, rows: Samples, columns: Samples, layers: Layers) -> jax.Array:
    """The centred RBF Gram; 0 where masked."""
    means = rows.means[:, :, None] + columns.means[:, None, :] - layers.grand[:, None, None]
    return jnp.where(rows.mask[:, None] & columns.mask, rbf(inner, rows, columns, layers) - means, 0)


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
        grams = products(rows, columns, layers)
        if kernel == "rbf":
            grams = centred_rbf(grams, rows, columns, layers)
        own = contract_rows(grams, columns.diagonals, layers.scale, first, one_cpu, band)
        if not both:
            return (own,)
        return own, contract_rows(grams.swapaxes(1, 2), rows.diagonals, layers.scale, -first, one_cpu, band)


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
