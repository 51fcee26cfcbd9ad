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
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, listed

Kernel = Literal["linear", "rbf"]
KERNELS: tuple[str, ...] = get_args(Kernel)

# Float32 products run as bfloat16 on TPU and TF32 on recent GPUs unless told otherwise.
_HIGHEST = jax.lax.Precision.HIGHEST
# XLA on CPU has no product that knows its result is symmetric. Four blocks of rows, multiplied from the diagonal down
# only, leave 10/16 of the work, and its product runs fastest where their size is a multiple of 16: 0.163 s for all
# Grams of L=32, N=300, D=4096 on one core, for 0.24 s whole.
_CPU_BLOCKS, _CPU_BLOCK_UNIT = 4, 16
# Samples whose rows are contracted at a time on CPU: one batch of all 300 spends 27 ms, mostly moving the Grams
# about, batches of ten 7 ms. Accelerators take all at once.
_CPU_ROWS = 10
# Equal rows, captured in batches of other shapes, differ by rounding: about 1e-6 of their length.
_ROUNDING = 1e-5


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
        rows: ``[N, L, L]`` float64, ``sum_i G0_l[m, i] G0_l'[m, i]``.
        weighted: ``[N, L, L]`` float64, ``sum_i G0_l[m, i] d_l'[i]``.
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

    def pairs(self, matrix: np.ndarray) -> np.ndarray:
        """The part of ``[..., L, L]`` that compares the two sides."""
        return matrix if self.num_left is None else matrix[..., : self.num_left, self.num_left :]


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
    hidden = _checked_shape(hidden, kernel)
    grams, health = _grams_jit(hidden, kernel, _on_one_cpu(hidden))
    _refuse_degenerate(health, hidden, allow_repeats)
    return grams


def gram_tables(grams: jax.Array | np.ndarray, other: jax.Array | np.ndarray | None = None) -> GramTables:
    """Contracts centred Grams to the tables of a sweep.

    Args:
        grams: ``[L, N, N]`` centred Grams.
        other: ``[L', N, N]`` Grams of a second model on the same samples in the same order.

    Returns:
        Tables of L layers, or of L + L' with ``num_left = L``.
    """
    sides = [jnp.asarray(grams)] if other is None else [jnp.asarray(grams), jnp.asarray(other)]
    _same_samples(sides)
    raw = _contract_jit(jnp.concatenate(sides), _on_one_cpu(*sides))
    return _on_host(raw, None if other is None else len(sides[0]))


def sweep(hidden: Any, *, kernel: Kernel = "linear", other: Any = None) -> GramTables:
    """Activations to tables in one jitted call; for callers who do not need the Grams.

    Args:
        hidden: ``[L, N, D]`` activations.
        kernel: ``linear`` or ``rbf``.
        other: ``[L', N, D']`` activations of a second model on the same samples in the same order.

    Raises:
        DegenerateError: as ``centred_grams``.
    """
    sides = [_checked_shape(side, kernel) for side in ([hidden] if other is None else [hidden, other])]
    _same_samples(sides)
    raw, healths = _sweep_jit(tuple(sides), kernel, _on_one_cpu(*sides))
    for health, side in zip(healths, sides, strict=True):
        _refuse_degenerate(health, side)
    return _on_host(raw, None if other is None else len(sides[0]))


def pack_upper(grams: jax.Array | np.ndarray) -> np.ndarray:
    """Keeps the upper triangle, diagonal included, row by row: ``[L, N, N]`` -> ``[L, N(N+1)/2]`` float32."""
    rows, columns = np.triu_indices(grams.shape[-1])
    return np.asarray(grams, np.float32)[:, rows, columns]


def unpack_upper(packed: np.ndarray) -> np.ndarray:
    """Undoes ``pack_upper``: ``[L, N(N+1)/2]`` -> ``[L, N, N]`` float32."""
    size = (int(np.sqrt(8 * packed.shape[-1] + 1)) - 1) // 2
    rows, columns = np.triu_indices(size)
    grams = np.empty((len(packed), size, size), np.float32)
    grams[:, rows, columns] = packed
    grams[:, columns, rows] = packed
    return grams


def _checked_shape(hidden: Any, kernel: str) -> jax.Array:
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r}: expected {listed(KERNELS)}")
    hidden = jnp.asarray(hidden)
    if hidden.ndim != 3 or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise UserError(f"expected activations [layers, samples, width] of floats, got {hidden.dtype}{hidden.shape}")
    if hidden.shape[1] < 4:
        raise DegenerateError(f"expected at least 4 samples, got {hidden.shape[1]}; give more prompts")
    return hidden


def _same_samples(sides: Sequence[jax.Array]) -> None:
    if len({side.shape[1] for side in sides}) > 1:
        raise UserError(f"expected the same samples on both sides, got {' and '.join(str(s.shape[1]) for s in sides)}")


def _on_one_cpu(*sides: jax.Array) -> bool:
    """Whether to compute in blocks: several devices part the rows themselves, accelerators would only launch more."""
    devices = {device for side in sides for device in side.devices()}
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b' of ``[M, D]`` and ``[N, D]``."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=_HIGHEST)


def _linear_gram(x: jax.Array, mean: jax.Array, on_one_cpu: bool) -> jax.Array:
    """(x - mean) (x - mean)' of ``[N, D]``."""
    if not on_one_cpu:
        return _product(x - mean, x - mean)
    size = -(-len(x) // (_CPU_BLOCKS * _CPU_BLOCK_UNIT)) * _CPU_BLOCK_UNIT
    # Blocks are centred one by one because XLA would copy every slice of a centred whole.
    blocks = [x[start : start + size] - mean for start in range(0, len(x), size)]
    lower = [[_product(block, earlier) for earlier in blocks[: k + 1]] for k, block in enumerate(blocks)]
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


def _contract(grams: jax.Array, on_one_cpu: bool) -> tuple[jax.Array, jax.Array]:
    """``[L, N, N]`` to rows and weighted of ``GramTables`` side by side, ``[N, L, 2L]``, and diagonals ``[L, N]``."""
    with jax.named_scope("gram_tables"):
        grams = grams.astype(jnp.float32)
        diagonals = jnp.diagonal(grams, axis1=1, axis2=2)
        _, exponents = jnp.frexp(diagonals.sum(axis=1))
        scale = jnp.ldexp(jnp.float32(1), 1 - exponents)[:, None]
        diagonals = diagonals * scale
        samples = jnp.arange(grams.shape[1])

        def contract(sample: jax.Array) -> jax.Array:
            rows = jnp.where(samples == sample, 0, grams[:, sample] * scale)
            return _product(rows, jnp.concatenate([rows, diagonals]))

        return jax.lax.map(contract, samples, batch_size=_CPU_ROWS if on_one_cpu else len(samples)), diagonals


def _sweep(
    sides: tuple[jax.Array, ...], kernel: Kernel, on_one_cpu: bool
) -> tuple[tuple[jax.Array, jax.Array], list[_Health]]:
    built = [_grams(side, kernel, on_one_cpu) for side in sides]
    return _contract(jnp.concatenate([grams for grams, _ in built]), on_one_cpu), [health for _, health in built]


_grams_jit = partial(jax.jit, static_argnums=(1, 2))(_grams)
_contract_jit = partial(jax.jit, static_argnums=1)(_contract)
_sweep_jit = partial(jax.jit, static_argnums=(1, 2))(_sweep)


def _on_host(raw: tuple[jax.Array, jax.Array], num_left: int | None) -> GramTables:
    both, diagonals = (np.asarray(table, np.float64) for table in jax.device_get(raw))
    rows, weighted = np.split(both, 2, axis=2)
    return GramTables((rows + rows.swapaxes(1, 2)) / 2, weighted, diagonals, num_left)


def _refuse_degenerate(health: _Health, hidden: jax.Array, allow_repeats: bool = False) -> None:
    trace, spread, near, nearest = (np.asarray(fact) for fact in jax.device_get(health))
    num_layers, count, _ = hidden.shape
    broken = np.flatnonzero(~np.isfinite(trace)).tolist()
    if broken:
        raise DegenerateError(
            f"layers {listed(broken)}: activations are NaN, infinite or too large to square in float32;"
            " check the weights, or run the model in a wider type",
            broken,
        )
    constant = np.flatnonzero(~(spread > _ROUNDING)).tolist()  # 0/0, a layer of zeros, counts
    if len(constant) == num_layers:
        raise DegenerateError(f"all {count} samples are identical in every layer; give different prompts", constant)
    if constant:
        raise DegenerateError(
            f"layers {listed(constant)} are constant: all {count} samples have the same activations there;"
            " leave these layers out, or tap another position",
            constant,
        )
    later = np.flatnonzero(near) if not allow_repeats else np.empty(0, np.int64)
    if later.size:
        first, second = hidden[:, nearest[later]].astype(jnp.float32), hidden[:, later].astype(jnp.float32)
        equal = jnp.linalg.norm(first - second, axis=2) <= _ROUNDING * jnp.linalg.norm(second, axis=2)
        later = later[np.asarray(equal.all(axis=0))]
    if later.size:
        pair = int(nearest[later[0]]), int(later[0])
        raise DegenerateError(
            f"{later.size} of {count} samples repeat an earlier one in every layer (first: samples {pair[0]} and"
            f" {pair[1]}, counted from 0); remove the duplicates",
            samples=pair,
        )
