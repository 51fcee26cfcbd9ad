"""CKA from cross-covariances of features: 2 N D^2 operations per pair of layers, and memory that N does not enter.

``<G_l, G_l'> = |X_l' X_l'|_F^2`` for centred X ``[N, D]``, so a sweep is sums over samples, which arrive in blocks: of
activations that are stored (`features`), or one batch after another of activations that are never kept
(`FeatureSums`). Blocks are shifted by a pilot mean before any product, and products are added up in pairs of floats.
What the pilot misses of the mean is put right at the end: with y = x - pilot, q = |y|^2, v the mean of y and
C = sum y_l y_l'' of a pair of layers, the cross-covariance is ``C - N v v'``, and of the Grams' diagonals
``d.d' = sum q q' - 2 (sum q y').v' - 2 (sum q' y).v + 4 v C v' + |v'|^2 sum q + |v|^2 sum q' - 3 N |v|^2 |v'|^2``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.similarity._grams import DegenerateError, GramSums, check_band, checked, refuse_constant, refuse_infinite
from jaxcrit.similarity._survey import Progress, blocks, survey, take

# Samples whose products are added at a time: a rank-8 update of every accumulator would only move memory about.
BLOCK = 1024
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class _Moments(NamedTuple):
    """Sums over samples for pairs of layers (l, l') and for layers, each a pair of floats as in `add_exactly`."""

    products: jax.Array  # [2, P, D, D] y_l y_l''
    left: jax.Array  # [2, P, D] q_l' y_l
    right: jax.Array  # [2, P, D] q_l y_l'
    states: jax.Array  # [2, L, D] y_l


class FeatureSums:
    """Adds up the moments of activations as they come: 8 P D^2 bytes for P pairs of layers, whatever N.

    Example:
        >>> sums = FeatureSums(num_layers=3, width=8)
        >>> for seed in range(5):
        ...     sums.add(np.random.default_rng(seed).standard_normal((3, 20, 8), dtype=np.float32))
        >>> sums.tables().num_samples
        100
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        *,
        band: int | None = None,
        block: int = BLOCK,
        sharding: NamedSharding | None = None,
    ) -> None:
        """Makes the accumulators.

        Args:
            num_layers: L.
            width: D.
            band: only pairs of layers at most so far apart; all by default.
            block: samples that are gathered before their products are added.
            sharding: sharding of the products, see `product_sharding`; one device by default.

        Raises:
            UserError: a band wider than the model, or a block below 1.
        """
        check_band(band, num_layers)
        if block < 1:
            raise UserError(f"block={block}: expected at least 1 sample")
        self.block = block
        self._sums = _Sums(layer_pairs(num_layers, band), num_layers, width, sharding)
        self._buffer = jnp.zeros((num_layers, block, width), jnp.float32, device=_everywhere(sharding))
        self._filled, self._samples = 0, np.zeros(block, np.int64)
        self._pilot, self._scale = jnp.zeros((num_layers, width)), jnp.ones(num_layers)

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return self._sums.count + self._filled

    def add(self, states: Any, samples: np.ndarray | None = None) -> None:
        """Adds samples.

        Args:
            states: ``[L, B, D]`` of any float type.
            samples: ``[B]`` int, what errors call each; negative for what is none. By default counted as they come.

        Raises:
            DegenerateError: NaN or infinity, by layer and sample.
        """
        samples = self.num_samples + np.arange(states.shape[1]) if samples is None else samples
        kept = np.flatnonzero(samples >= 0)
        while kept.size:
            now, kept = np.split(kept, [self.block - self._filled])
            places = np.full(states.shape[1], self.block, np.int32)  # past the end, where the scatter drops it
            places[now] = self._filled + np.arange(now.size, dtype=np.int32)
            self._buffer = _gather(self._buffer, states, places)
            self._samples[places[now]] = samples[now]
            self._filled += now.size
            if self._filled == self.block:
                self._flush()

    def tables(self) -> GramSums:
        """The sums that CKA is made from, over the samples so far; more may follow.

        Raises:
            DegenerateError: fewer than 4 samples, NaN or infinity, or a constant layer.
        """
        if self.num_samples < 4:
            raise DegenerateError(f"expected at least 4 samples, got {self.num_samples}; give more prompts")
        self._flush()
        tables, shift = self._sums.tables()
        mean = np.asarray(self._pilot, np.float64) * np.asarray(self._scale, np.float64)[:, None] + shift
        with np.errstate(invalid="ignore"):
            spread = np.sqrt(tables.trace / (tables.trace + self.num_samples * np.square(mean).sum(axis=1)))
        refuse_constant(spread, self.num_samples)
        return tables

    def _flush(self) -> None:
        if not self._filled:
            return
        mask = np.arange(self.block) < self._filled
        if not self._sums.count:
            self._pilot, self._scale = _pilot(self._buffer, mask)
        finite = np.isfinite(self._sums.add(self._buffer, mask, self._pilot, self._scale))
        if not finite.all():
            refuse_infinite(np.flatnonzero(~finite.all(axis=1)), np.sort(self._samples[~finite.all(axis=0)]))
        self._filled = 0


def features(
    hidden: Any,
    *,
    band: int | None = None,
    block: int | None = None,
    memory: int = 4 * 2**30,
    sharding: NamedSharding | None = None,
    allow_repeats: bool = False,
    progress: Progress | None = None,
) -> GramSums:
    """Linear CKA's sums from stored activations, some pairs of layers at a time.

    Args:
        hidden: ``[L, N, D]`` activations, on devices or on the host.
        band: only pairs of layers at most so far apart; all by default.
        block: samples per product, at most N; default about 1,024, or N.
        memory: bytes that accumulators may take; at least one pair is worked on.
        sharding: sharding of the products, see `product_sharding`; one device by default.
        allow_repeats: accept equal samples.
        progress: called with (blocks done, blocks in all).

    Raises:
        DegenerateError: as `centred_grams`.
        UserError: a band wider than the model, a block larger than N.
    """
    num_layers, count, width = checked(hidden).shape
    check_band(band, num_layers)
    size = block_size(block, count, "block")
    facts = survey(hidden, allow_repeats=allow_repeats)
    scale = _scale(jnp.asarray(facts.lengths).mean(axis=1))
    first, second = layer_pairs(num_layers, band)
    at_once = max(1, memory // (8 * width**2))
    parts = [(first[k : k + at_once], second[k : k + at_once]) for k in range(0, len(first), at_once)]
    todo = blocks(count, size)
    results = []
    for done, pairs in enumerate(parts):
        sums = _Sums(pairs, num_layers, width, sharding)
        for k, (start, mask) in enumerate(todo):
            sums.add(take(hidden, start, size), mask, facts.mean, scale)
            if progress is not None:
                progress(done * len(todo) + k + 1, len(parts) * len(todo))
        results.append(sums.tables()[0])
    cross, aligned = (np.full((num_layers, num_layers), np.nan) for _ in range(2))
    for (i, j), of in zip(parts, results, strict=True):
        for whole, part in ((cross, of.cross), (aligned, of.aligned)):
            whole[i, j] = whole[j, i] = part[i, j]
    return GramSums(cross, aligned, results[0].trace, count)


def layer_pairs(num_layers: int, band: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (l, l') with l <= l' and, with a band, l' - l within it."""
    first, second = np.triu_indices(num_layers)
    near = second - first <= (num_layers if band is None else band)
    return first[near].astype(np.int32), second[near].astype(np.int32)


def product_sharding(mesh: jax.sharding.Mesh, width: int) -> NamedSharding:
    """Rows of every ``[D, D]`` product over all devices of the mesh, so that nothing of that size is replicated.

    Raises:
        UserError: the width does not divide over the mesh.
    """
    if width % mesh.size:
        raise UserError(
            f"width {width} does not divide over the {mesh.size} devices of the mesh; take a number of devices that"
            f" divides {width}"
        )
    return NamedSharding(mesh, PartitionSpec(None, None, mesh.axis_names, None))


def block_size(asked: int | None, count: int, name: str, default: int = 0) -> int:
    """A block or tile of samples, refused where it is larger than there are samples.

    Where none is asked for or given, about 1,024 that part the samples evenly: what blocks overlap is computed twice.
    """
    if asked is not None and not 1 <= asked <= count:
        raise UserError(f"{name}={asked}: expected 1 to {count}, the number of samples")
    return asked or min(default or -(-count // -(-count // BLOCK)), count)


class _Sums:
    """Moments of some pairs of layers, on the devices; those of lengths alone on the host, in float64."""

    def __init__(
        self, pairs: tuple[np.ndarray, np.ndarray], num_layers: int, width: int, sharding: NamedSharding | None
    ) -> None:
        count, self.everywhere = len(pairs[0]), _everywhere(sharding)
        products = jnp.zeros((2, count, width, width), device=sharding)
        small = (jnp.zeros((2, of, width), device=self.everywhere) for of in (count, count, num_layers))
        self.pairs, self.moments, self.count = pairs, _Moments(products, *small), 0
        self.lengths, self.squares = np.zeros((num_layers, num_layers)), np.zeros(num_layers)

    def add(self, x: jax.Array, mask: np.ndarray, pilot: jax.Array, scale: jax.Array) -> np.ndarray:
        """Adds a block ``[L, B, D]``; returns its raw squared lengths ``[L, B]``, which are finite or tell why not."""
        self.moments, *found = _accumulate(self.moments, x, mask, pilot, scale, *self.pairs, self.everywhere)
        lengths, raw = processes.whole(found)
        lengths = lengths.astype(np.float64).sum(axis=0)
        self.lengths += lengths @ lengths.T
        self.squares += lengths.sum(axis=1)
        self.count += int(mask.sum())
        return raw

    def tables(self) -> tuple[GramSums, np.ndarray]:
        """The sums of a sweep, NaN for other pairs, and the mean ``[L, D]`` of y."""
        first, second = self.pairs
        left, right, states = (of.sum(axis=0, dtype=np.float64) for of in processes.whole(self.moments[1:]))
        mean = states / self.count
        norm = np.square(mean).sum(axis=1)
        rows, turned = processes.whole(_reduce(self.moments, np.float32(mean), first, second, np.float32(self.count)))
        product = np.asarray(rows, np.float64).sum(axis=(0, 2))
        diagonal = (
            self.lengths[first, second]
            - 2 * (right * mean[second]).sum(axis=1)
            - 2 * (left * mean[first]).sum(axis=1)
            + 4 * np.asarray(turned, np.float64).sum(axis=1)
            + norm[second] * self.squares[first]
            + norm[first] * self.squares[second]
            - 3 * self.count * norm[first] * norm[second]
        )
        cross, aligned = (np.full((len(mean), len(mean)), np.nan) for _ in range(2))
        cross[first, second] = cross[second, first] = product - diagonal
        aligned[first, second] = aligned[second, first] = diagonal
        return GramSums(cross, aligned, self.squares - self.count * norm, self.count), mean


def _everywhere(sharding: NamedSharding | None) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def add_exactly(sums: jax.Array, update: jax.Array) -> jax.Array:
    """Adds to pairs of floats ``[2, ...]``, a sum and what rounding took of it, by Knuth's two-sum."""
    main, rest = sums
    total = main + update
    part = total - main
    return jnp.stack([total, rest + ((main - (total - part)) + (update - part))])


def _square_sum(x: jax.Array) -> jax.Array:
    """Squares summed along the last axis, as a pair of floats ``[2, ...]``.

    The debiased estimator is the difference of two sums of these: rounded, they alone put a value of four samples
    1e-5 off.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    # Of so few digits that its square is exact, and the same whether or not the compiler joins it with a sum.
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    main, rest = jnp.square(high), (x - high) * (x + high)
    while main.shape[-1] > 1:
        odd = main.shape[-1] % 2
        if odd:
            main, rest = (jnp.pad(of, [(0, 0)] * (of.ndim - 1) + [(0, 1)]) for of in (main, rest))
        half = main.shape[-1] // 2
        main, rest = add_exactly(jnp.stack([main[..., :half], rest[..., :half] + rest[..., half:]]), main[..., half:])
    return jnp.stack([main[..., 0], rest[..., 0]])


def _scale(square: jax.Array) -> jax.Array:
    """Power of two that brings a length, given squared, near 1."""
    return jnp.ldexp(jnp.float32(1), -(jnp.frexp(square)[1] // 2))


@partial(jax.jit, donate_argnames="buffer")
def _gather(buffer: jax.Array, states: jax.Array, places: jax.Array) -> jax.Array:
    return buffer.at[:, places].set(states.astype(jnp.float32), mode="drop")


@jax.jit
def _pilot(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean ``[L, D]`` and scale ``[L]`` of the first block."""
    kept = jnp.where(mask[:, None], x, 0)
    return kept.sum(axis=1) / mask.sum(), _scale(jnp.square(kept).sum(axis=(1, 2)) / mask.sum())


@partial(jax.jit, donate_argnames="moments", static_argnames="everywhere")
def _accumulate(
    moments: _Moments,
    x: jax.Array,
    mask: jax.Array,
    pilot: jax.Array,
    scale: jax.Array,
    first: jax.Array,
    second: jax.Array,
    everywhere: NamedSharding | None = None,
) -> tuple[_Moments, jax.Array, jax.Array]:
    """Adds a block ``[L, B, D]``; returns squared lengths of y, pairs of floats ``[2, L, B]``, and of x ``[L, B]``.

    Where the products are split over devices, a block is kept whole on each, ``everywhere``: left alone, the compiler
    splits it too, by width, and gathers one side of every pair again, as many bytes as a block for each pair of layers.
    """

    def whole(of: jax.Array) -> jax.Array:
        return of if everywhere is None else jax.lax.with_sharding_constraint(of, everywhere)

    with jax.named_scope("feature_moments"):
        x = jnp.where(mask[:, None], x.astype(jnp.float32), 0)
        y = whole(jnp.where(mask[:, None], (x - pilot[:, None]) * scale[:, None, None], 0))
        lengths = _square_sum(y)
        q = lengths.sum(axis=0)

        def pair(p: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            one, two = whole(y[first[p]]), whole(y[second[p]])
            updates = _product(one.T, two), _product(q[second[p]], one), _product(q[first[p]], two)
            # One update of one array: of two, XLA would copy one whole at every step.
            return tuple(of.at[:, p].set(add_exactly(of[:, p], new)) for of, new in zip(sums, updates, strict=True))

        products, left, right = jax.lax.fori_loop(0, len(first), pair, tuple(moments[:3]))
        states = add_exactly(moments.states, y.sum(axis=1))
        return _Moments(products, left, right, states), lengths, jnp.square(x).sum(axis=-1)


@jax.jit
def _reduce(
    moments: _Moments, mean: jax.Array, first: jax.Array, second: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each pair, by rows: squares of the cross-covariance, pairs of floats ``[2, P, D]``, and ``v * (C v')``."""

    def pair(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        v, w = mean[first[p]], mean[second[p]]
        main, rest = moments.products[:, p]
        return _square_sum((main - count * jnp.outer(v, w)) + rest), v * _product(main, w)

    squares, turned = jax.lax.map(pair, jnp.arange(len(first)))
    return squares.swapaxes(0, 1), turned
