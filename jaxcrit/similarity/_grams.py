"""Centred Grams of every layer, and the few tables that all CKA statistics of a sweep are made from.

A layer's activations X ``[N, D]`` enter every statistic of this package through its centred Gram ``G = H K H``
``[N, N]`` only (H = I - 11'/N, K the kernel matrix), so each is built once and all pairs come from one contraction:
2 L N^2 D + 4 L^2 N^2 floating-point operations instead of the L^2 (12 N^2 D + 24 N^3) of one HSIC after another.

What leaves the device is ``GramTables``: per pair of layers and sample the inner product of the Grams' rows, without
their diagonals. Those sums are short (N terms of float32); everything that follows from them is done in float64 on the
host, because the debiased estimator subtracts sums that nearly cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, listed

Kernel = Literal["linear", "rbf"]
KERNELS: tuple[str, ...] = get_args(Kernel)

# Float32 products run as bfloat16 on TPU and TF32 on recent GPUs unless told otherwise.
HIGHEST = jax.lax.Precision.HIGHEST
# XLA on CPU has no product that knows its result is symmetric. Four blocks of rows, multiplied from the diagonal down
# only, leave 10/16 of the work, and its product runs fastest where their size is a multiple of 16: 0.163 s for all
# Grams of L=32, N=300, D=4096 on one core, for 0.24 s whole.
_CPU_BLOCKS, _CPU_BLOCK_UNIT = 4, 16
# Samples whose rows are contracted at a time on CPU: one batch of all 300 spends 27 ms, mostly moving the Grams
# about, batches of five 5 ms. Accelerators take all at once.
_CPU_ROWS = 5
# Bytes of packed Grams that are unpacked at a time.
_UNPACKED = 2**26
# Layers contracted at a time with those of their band: narrower products run slower, wider ones compute what is far.
_STRIP = 16
# Equal rows, captured in batches of other shapes, differ by rounding: about 1e-6 of their length.
ROUNDING = 1e-5


class DegenerateError(UserError):
    """Activations that no similarity can be computed from.

    Attributes:
        layers: positions in the first axis of the activations that are at fault.
        samples: samples at fault, where it is about samples.
    """

    def __init__(self, message: str, layers: Sequence[int] = (), samples: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(int(layer) for layer in layers)
        self.samples = tuple(int(sample) for sample in samples)


@dataclasses.dataclass(frozen=True, eq=False)
class GramTables:
    """Sums over the centred Grams G_l of a sweep; G0 is G without its diagonal d.

    Each Gram is divided by a power of two that brings its trace into [1, 2), so that float32 neither overflows nor
    underflows; CKA does not depend on it. Where two models are compared, the second's layers follow the first's.

    Attributes:
        rows: ``[N, L, L]``, ``sum_i G0_l[m, i] G0_l'[m, i]``, symmetric up to rounding; NaN outside a sweep's band.
            Float32 as the device made it where a row is one product; float64 where it is a sum of tiles.
        weighted: ``[N, L, L]`` of the same type, ``sum_i G0_l[m, i] d_l'[i]``.
        diagonals: ``[L, N]`` float64, ``d_l[m]``; the row sums of G0_l are their negatives.
        num_left: layers of the first model where two are compared, None where a model is compared with itself.
    """

    rows: np.ndarray
    weighted: np.ndarray
    diagonals: np.ndarray
    num_left: int | None = None

    @property
    def num_samples(self) -> int:
        """N."""
        return self.diagonals.shape[1]

    @cached_property
    def cross(self) -> np.ndarray:
        """``<G0_l, G0_l'>``, ``[L, L]`` float64."""
        total = self.rows.sum(axis=0, dtype=np.float64)
        return (total + total.T) / 2

    @cached_property
    def aligned(self) -> np.ndarray:
        """``d_l . d_l'``, ``[L, L]`` float64."""
        return self.diagonals @ self.diagonals.T

    @cached_property
    def trace(self) -> np.ndarray:
        """``sum_m d_l[m]``, ``[L]`` float64."""
        return self.diagonals.sum(axis=1)

    def pairs(self, matrix: np.ndarray) -> np.ndarray:
        """The part of ``[..., L, L]`` that compares the two sides."""
        return matrix if self.num_left is None else matrix[..., : self.num_left, self.num_left :]


@dataclasses.dataclass(frozen=True, eq=False)
class GramSums:
    """What is left of `GramTables` where no row of a Gram was ever there: sums over all samples.

    Enough for CKA of either bias, its null mean and participation ratios; not for errors by deletion of samples.

    Attributes:
        cross: ``[L, L]`` float64, ``<G0_l, G0_l'>``; NaN outside the band of a banded sweep.
        aligned: ``[L, L]`` float64, ``d_l . d_l'``.
        trace: ``[L]`` float64, the sum of d_l.
        num_samples: N.
    """

    cross: np.ndarray
    aligned: np.ndarray
    trace: np.ndarray
    num_samples: int

    def pairs(self, matrix: np.ndarray) -> np.ndarray:
        """The matrix itself: of one model with itself."""
        return matrix


Tables = GramTables | GramSums


class PackedGrams:
    """Symmetric Grams ``[L, N, N]`` kept as their upper triangles; what is read is unpacked, never the whole.

    Layers are read by index, or in turn; samples by `rows`.

    Attributes:
        parts: one or more ``[L_k, N(N+1)/2]`` float32, row by row with the diagonal; their layers follow each other.
        shape: L, N, N.
    """

    def __init__(self, *parts: np.ndarray) -> None:
        count = (int(np.sqrt(8 * parts[0].shape[-1] + 1)) - 1) // 2
        rows = np.arange(count)
        self.parts, self.shape = parts, (sum(map(len, parts)), count, count)
        self._starts = rows * count - rows * (rows - 1) // 2  # where each row begins

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> np.ndarray:
        """One layer, ``[N, N]``."""
        for part in self.parts:
            if layer < len(part):
                break
            layer -= len(part)
        gram, count = np.empty(self.shape[1:], np.float32), self.shape[1]
        for row, start in enumerate(self._starts):
            gram[row, row:] = gram[row:, row] = part[layer, start : start + count - row]
        return gram

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[layer] for layer in range(len(self)))

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Rows of some samples in all layers, ``[L, S, N]``."""
        others = np.arange(self.shape[1])
        low, high = np.minimum(samples[:, None], others), np.maximum(samples[:, None], others)
        places = self._starts[low] + high - low
        return np.concatenate([part[:, places] for part in self.parts])

    @property
    def diagonals(self) -> np.ndarray:
        """``[L, N]``."""
        return np.concatenate([part[:, self._starts] for part in self.parts])


class _Health(NamedTuple):
    """Facts about activations from which degenerate ones are told; two of [L], two of [N]."""

    trace: jax.Array
    spread: jax.Array  # of the rows about their mean, relative to their length
    near: jax.Array  # whether an earlier sample is near in every layer
    nearest: jax.Array  # the first such sample


def centred_grams(hidden: Any, kernel: Kernel = "linear", *, allow_repeats: bool = False) -> jax.Array:
    """Builds the centred Gram of each layer.

    Features are centred in float32 before any product: with the large constant dimensions of language models the
    Gram of raw activations has no correct digits left (the debiased value comes out as NaN or 0 where it is 0.14).
    The RBF kernel is the paper's, ``exp(-|x - y|^2 / (2 m))`` with m the (lower) median of the layer's non-zero squared
    distances; the constant exp(-1/2), which centring removes, is left out of it from the start to save digits.

    Args:
        hidden: ``[L, N, D]`` activations of any float type (float64 is rounded to float32).
        kernel: ``linear`` or ``rbf``.
        allow_repeats: accept equal samples; every token of a prompt is a sample, say, and prompts begin alike.

    Returns:
        ``[L, N, N]`` float32.

    Raises:
        DegenerateError: fewer than 4 samples, NaN or infinity, a constant layer, repeated samples.
    """
    hidden = jnp.asarray(checked(hidden, kernel))
    grams, health = _grams_jit(hidden, kernel, on_one_cpu(hidden))
    _refuse_degenerate(health, hidden, allow_repeats)
    return grams


Grams = jax.Array | np.ndarray | PackedGrams


def gram_tables(grams: Grams, other: Grams | None = None, *, band: int | None = None) -> GramTables:
    """Contracts centred Grams to the tables of a sweep.

    Args:
        grams: ``[L, N, N]`` centred Grams; packed ones some rows at a time.
        other: ``[L', N, N]`` Grams of a second model on the same samples in the same order, packed like the first.
        band: only pairs of layers at most so far apart; all by default, and with ``other``.

    Returns:
        Tables of L layers, or of L + L' with ``num_left = L``.
    """
    sides: list[Any] = [
        one if isinstance(one, PackedGrams) else jnp.asarray(one) for one in (grams, other) if one is not None
    ]
    _same_samples(sides)
    check_band(band, sum(map(len, sides)))
    if isinstance(sides[0], PackedGrams):
        raw = _contract_packed(PackedGrams(*(part for side in sides for part in side.parts)), band)
    else:
        raw = _contract_jit(jnp.concatenate(sides), on_one_cpu(*sides), band)
    return tables_from(*raw, num_left=None if other is None else len(sides[0]), band=band)


def _contract_packed(packed: PackedGrams, band: int | None) -> tuple[np.ndarray, np.ndarray]:
    diagonals = packed.diagonals
    scale = power_of_two(jnp.asarray(diagonals.sum(axis=1)))
    scaled, (depth, count, _) = jnp.asarray(diagonals) * scale[:, None], packed.shape
    size = min(count, max(1, _UNPACKED // (4 * depth * count)))
    both = np.empty((count, depth, 2 * depth), np.float32)
    for start in range(0, count, size):
        first = min(start, count - size)
        rows = jnp.asarray(packed.rows(first + np.arange(size)))
        both[first : first + size] = _rows_jit(rows, scaled, scale, first, on_one_cpu(rows), band)
    return both, np.asarray(scaled)


def sweep(hidden: Any, *, kernel: Kernel = "linear", other: Any = None, band: int | None = None) -> GramTables:
    """Activations to tables in one jitted call; for callers who do not need the Grams.

    Args:
        hidden: ``[L, N, D]`` activations.
        kernel: ``linear`` or ``rbf``.
        other: ``[L', N, D']`` activations of a second model on the same samples in the same order.
        band: only pairs of layers at most so far apart; all by default, and with ``other``.

    Raises:
        DegenerateError: as ``centred_grams``.
        UserError: a band wider than the model.
    """
    sides = [jnp.asarray(checked(side, kernel)) for side in ([hidden] if other is None else [hidden, other])]
    _same_samples(sides)
    check_band(band, sum(map(len, sides)))
    raw, healths = _sweep_jit(tuple(sides), kernel, on_one_cpu(*sides), band)
    for health, side in zip(healths, sides, strict=True):
        _refuse_degenerate(health, side)
    return tables_from(*raw, num_left=None if other is None else len(sides[0]), band=band)


def pack_upper(grams: jax.Array | np.ndarray) -> np.ndarray:
    """Keeps the upper triangle, diagonal included, row by row: ``[L, N, N]`` -> ``[L, N(N+1)/2]`` float32."""
    grams = np.asarray(grams)
    count = grams.shape[-1]
    packed = np.empty((len(grams), count * (count + 1) // 2), np.float32)
    for row, start in enumerate(PackedGrams(packed)._starts):
        packed[:, start : start + count - row] = grams[:, row, row:]
    return packed


def checked(hidden: Any, kernel: str = "linear") -> jax.Array | np.ndarray:
    """Refuses what are no activations ``[L, N, D]`` of 4 samples or more, or no kernel."""
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r}: expected {listed(KERNELS)}")
    array: jax.Array | np.ndarray = hidden if isinstance(hidden, jax.Array) else np.asarray(hidden)
    if array.ndim != 3 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"expected activations [layers, samples, width] of floats, got {array.dtype}{array.shape}")
    if array.shape[1] < 4:
        raise DegenerateError(f"expected at least 4 samples, got {array.shape[1]}; give more prompts")
    return array


def _same_samples(sides: Sequence[Any]) -> None:
    if len({side.shape[1] for side in sides}) > 1:
        raise UserError(f"expected the same samples on both sides, got {' and '.join(str(s.shape[1]) for s in sides)}")


def on_one_cpu(*sides: jax.Array) -> bool:
    """Whether to compute in blocks: several devices part the rows themselves, accelerators would only launch more."""
    devices = {device for side in sides for device in side.devices()}
    return len(devices) == 1 and devices.pop().platform == "cpu"


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b' of ``[M, D]`` and ``[N, D]``."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=HIGHEST)


def _linear_gram(x: jax.Array, mean: jax.Array, on_one_cpu: bool) -> jax.Array:
    """(x - mean) (x - mean)' of ``[N, D]``."""
    if not on_one_cpu:
        return product(x - mean, x - mean)
    size = -(-len(x) // (_CPU_BLOCKS * _CPU_BLOCK_UNIT)) * _CPU_BLOCK_UNIT
    # Blocks are centred one by one because XLA would copy every slice of a centred whole.
    blocks = [x[start : start + size] - mean for start in range(0, len(x), size)]
    lower = [[product(block, earlier) for earlier in blocks[: k + 1]] for k, block in enumerate(blocks)]
    return jnp.block([row + [lower[j][k].T for j in range(k + 1, len(blocks))] for k, row in enumerate(lower)])


def _centre(gram: jax.Array) -> jax.Array:
    means = gram.mean(axis=0)
    return gram - means[:, None] - means[None, :] + means.mean()


def _lower_median(values: jax.Array, kept: jax.Array) -> jax.Array:
    """The lower median of the kept, positive float32 values.

    Bisects on the bits, which order positive floats: 31 counts of N^2 instead of a sort, and the same on shards.
    """
    bits = jnp.where(kept, jax.lax.bitcast_convert_type(values, jnp.int32), jnp.iinfo(jnp.int32).max)
    wanted = (kept.sum() + 1) // 2

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits <= middle).sum() >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = jnp.int32(0), jnp.int32(jnp.iinfo(jnp.int32).max)
    low, _ = jax.lax.fori_loop(0, 31, halve, start)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _rbf(gram: jax.Array, distances: jax.Array) -> jax.Array:
    """``exp(-d2 / (2 median)) - exp(-1/2)``, centred; d2 ``[N, N]``, rounding noise in it counts as zero."""
    lengths = jnp.diagonal(gram)
    nonzero = distances > 1e-6 * (lengths[:, None] + lengths[None, :])
    median = _lower_median(distances, nonzero & jnp.triu(jnp.ones_like(nonzero), 1))
    half = jnp.float32(0.5)
    return _centre(jnp.exp(-half) * jnp.expm1(half - half * distances / median))


def _grams(hidden: jax.Array, kernel: Kernel, on_one_cpu: bool) -> tuple[jax.Array, _Health]:
    """One layer at a time: batching the product with the centring fused in is five times slower on CPU."""
    count = hidden.shape[1]

    def layer(near: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        x = x.astype(jnp.float32)
        mean = x.mean(axis=0)
        # The mean itself is rounded; centring the Gram once more takes out what that leaves.
        gram = _centre(_linear_gram(x, mean, on_one_cpu))
        lengths = jnp.diagonal(gram)
        sums = lengths[:, None] + lengths[None, :]
        distances = jnp.maximum(sums - 2 * gram, 0)
        trace = lengths.sum()
        spread = jnp.sqrt(trace / (trace + count * (mean * mean).sum()))
        # The Gram's rounding hides relative distances below 1e-3; near is a hundredth, to be looked at again.
        near &= distances <= 1e-4 * sums
        return near, (gram if kernel == "linear" else _rbf(gram, distances), trace, spread)

    with jax.named_scope("centred_grams"):
        earlier = jnp.tril(jnp.ones((count, count), bool), -1)
        near, (grams, trace, spread) = jax.lax.scan(layer, earlier, hidden)
        return grams, _Health(trace, spread, near.any(axis=1), near.argmax(axis=1))


def contract_rows(
    grams: jax.Array, diagonals: jax.Array, scale: jax.Array, first: Any, on_one_cpu: bool, band: int | None
) -> jax.Array:
    """Rows and weighted of ``GramTables`` side by side, of a part ``[L, R, C]`` of the Grams: ``[R, L, 2L]`` float32.

    Args:
        grams: rows of the Grams.
        diagonals: ``[L, C]`` of the columns' samples, scaled.
        scale: ``[L]``, what the Grams are multiplied by.
        first: column of the part that is row 0's own sample; none where it is outside.
        on_one_cpu: see `on_one_cpu`.
        band: band of pairs of layers; what is outside is 0 or accidental.
    """
    count, width = grams.shape[1:]
    columns = jnp.arange(width)

    def contract(sample: jax.Array) -> jax.Array:
        rows = jnp.where(columns == sample + first, 0, grams[:, sample] * scale[:, None])
        return layer_products(rows, (rows, diagonals), band)

    return jax.lax.map(contract, jnp.arange(count), batch_size=_CPU_ROWS if on_one_cpu else count)


def layer_products(rows: jax.Array, sides: Sequence[jax.Array], band: int | None) -> jax.Array:
    """Inner products of every layer's row ``[L, C]`` with those of each of S sides, ``[L, S L]``.

    With a band, what is outside of it is 0 or accidental.
    """
    if band is None:
        return product(rows, jnp.concatenate(sides))
    depth, strips = len(rows), []
    for start in range(0, depth, _STRIP):
        low, high = max(0, start - band), min(depth, start + _STRIP + band)
        near = jnp.stack([side[low:high] for side in sides])
        strip = jnp.einsum("lc,skc->lsk", rows[start : start + _STRIP], near, precision=HIGHEST)
        strips.append(jnp.pad(strip, ((0, 0), (0, 0), (low, depth - high))).reshape(-1, len(sides) * depth))
    return jnp.concatenate(strips)


def power_of_two(trace: jax.Array) -> jax.Array:
    """What brings a trace into [1, 2)."""
    return jnp.ldexp(jnp.float32(1), 1 - jnp.frexp(trace)[1])


def _contract(grams: jax.Array, on_one_cpu: bool, band: int | None) -> tuple[jax.Array, jax.Array]:
    """``[L, N, N]`` to rows and weighted side by side, ``[N, L, 2L]``, and diagonals ``[L, N]``."""
    with jax.named_scope("gram_tables"):
        grams = grams.astype(jnp.float32)
        diagonals = jnp.diagonal(grams, axis1=1, axis2=2)
        scale = power_of_two(diagonals.sum(axis=1))
        diagonals = diagonals * scale[:, None]
        return contract_rows(grams, diagonals, scale, 0, on_one_cpu, band), diagonals


def _sweep(
    sides: tuple[jax.Array, ...], kernel: Kernel, on_one_cpu: bool, band: int | None
) -> tuple[tuple[jax.Array, jax.Array], list[_Health]]:
    built = [_grams(side, kernel, on_one_cpu) for side in sides]
    return _contract(jnp.concatenate([grams for grams, _ in built]), on_one_cpu, band), [health for _, health in built]


_grams_jit = partial(jax.jit, static_argnums=(1, 2))(_grams)
_contract_jit = partial(jax.jit, static_argnums=(1, 2))(_contract)
_rows_jit = partial(jax.jit, static_argnums=(4, 5))(contract_rows)
_sweep_jit = partial(jax.jit, static_argnums=(1, 2, 3))(_sweep)


def tables_from(both: Any, diagonals: Any, *, num_left: int | None = None, band: int | None = None) -> GramTables:
    """Tables from what `contract_rows` gives for all samples, ``[N, L, 2L]``, and diagonals ``[L, N]``."""
    rows, weighted = np.split(np.asarray(both), 2, axis=2)
    if band is not None:
        layers = np.arange(len(diagonals))
        far = np.abs(layers[:, None] - layers[None, :]) > band
        rows, weighted = np.where(far, np.nan, rows), np.where(far, np.nan, weighted)
    return GramTables(rows, weighted, np.asarray(diagonals, np.float64), num_left)


def check_band(band: int | None, num_layers: int) -> None:
    """Refuses a band that is not from 1 to L-1."""
    if band is not None and not 1 <= band < num_layers:
        raise UserError(
            f"band={band}: expected 1 to {num_layers - 1}, the distances there are between {num_layers} layers"
        )


def _refuse_degenerate(health: _Health, hidden: jax.Array, allow_repeats: bool = False) -> None:
    trace, spread, near, nearest = (np.asarray(fact) for fact in jax.device_get(health))
    count = hidden.shape[1]
    broken = np.flatnonzero(~np.isfinite(trace))
    if broken.size:
        lengths = jnp.square(hidden[broken].astype(jnp.float32)).sum(axis=2)
        refuse_infinite(broken, np.flatnonzero(~np.isfinite(lengths).all(axis=0)))
    refuse_constant(spread, count)
    later = np.flatnonzero(near) if not allow_repeats else np.empty(0, np.int64)
    if later.size:
        first, second = hidden[:, nearest[later]].astype(jnp.float32), hidden[:, later].astype(jnp.float32)
        equal = jnp.linalg.norm(first - second, axis=2) <= ROUNDING * jnp.linalg.norm(second, axis=2)
        later = later[np.asarray(equal.all(axis=0))]
        refuse_repeats(nearest[later], later, count)


def refuse_infinite(layers: np.ndarray, samples: np.ndarray) -> NoReturn:
    """Names layers and samples whose activations have no finite square."""
    where = f" in samples {listed(samples[:8].tolist())}{', ...' if len(samples) > 8 else ''}" if len(samples) else ""
    raise DegenerateError(
        f"layers {listed(layers.tolist())}: activations are NaN, infinite or too large to square in float32{where};"
        " check the weights, or run the model in a wider type",
        layers.tolist(),
        samples.tolist(),
    )


def refuse_constant(spread: np.ndarray, count: int) -> None:
    """Refuses layers whose ``count`` samples differ by rounding only.

    Args:
        spread: ``[L]`` of the samples about their mean, relative to their length.
        count: N.
    """
    constant = np.flatnonzero(~(spread > ROUNDING)).tolist()  # 0/0, a layer of zeros, counts
    if len(constant) == len(spread):
        raise DegenerateError(f"all {count} samples are identical in every layer; give different prompts", constant)
    if constant:
        raise DegenerateError(
            f"layers {listed(constant)} are constant: all {count} samples have the same activations there;"
            " leave these layers out, or tap another position",
            constant,
        )


def refuse_repeats(earlier: np.ndarray, later: np.ndarray, count: int) -> None:
    """Refuses samples ``later`` that repeat ``earlier`` ones, if there are any."""
    if later.size:
        pair = int(earlier[0]), int(later[0])
        raise DegenerateError(
            f"{later.size} of {count} samples repeat an earlier one in every layer (first: samples {pair[0]} and"
            f" {pair[1]}, counted from 0); remove the duplicates",
            samples=pair,
        )
