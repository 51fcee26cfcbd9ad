"""Tiled sweeps of activations that lie on several devices, split by samples or by width.

Split by samples, each device makes the rows of its own samples' Grams; the columns come to it block by block around a
ring, which holds two blocks at a time, or all at once where they fit. Split by width, each device has a part of every
inner product, and their sums are scattered over the rows of a tile. Either way a device contracts rows of its own, and
only what tables are made of, ``[L, 2L]`` per sample, leaves it.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.similarity._features import add_exactly, block_size
from jaxcrit.similarity._grams import GramTables, Kernel, check_band, checked, contract_rows, tables_from
from jaxcrit.similarity._survey import blocks, survey
from jaxcrit.similarity._tiled import Layers, Samples, centre_rbf, centred_rbf, prepare, products, rbf

Exchange = Literal["ring", "gather"]
# Activations gathered on every device take at most so much; then one large message is cheaper than many.
GATHER_BYTES = 2**30


def shard(hidden: Any, mesh: Mesh, by: Literal["samples", "width"] = "samples") -> jax.Array:
    """Splits activations ``[L, N, D]`` over all devices of a mesh.

    Raises:
        UserError: N (D) does not divide over them.
    """
    size = hidden.shape[1 if by == "samples" else 2]
    if size % mesh.size:
        raise UserError(
            f"{size} {'samples' if by == 'samples' else 'dimensions'} do not divide over the {mesh.size} devices of the"
            f" mesh; take a number of devices that divides {size}, or split by"
            f" {'width' if by == 'samples' else 'samples'}"
        )
    spec = P(None, mesh.axis_names) if by == "samples" else P(None, None, mesh.axis_names)
    return jax.device_put(hidden, NamedSharding(mesh, spec))


def sharded(
    hidden: jax.Array,
    *,
    kernel: Kernel = "linear",
    band: int | None = None,
    tile: int | None = None,
    bandwidths: np.ndarray | None = None,
    exchange: Exchange | None = None,
    allow_repeats: bool = False,
) -> GramTables:
    """The tables of `tiled`, from activations that `shard` has split.

    Args:
        hidden: ``[L, N, D]`` activations, split by samples or by width.
        kernel: ``linear`` or ``rbf``.
        band: only pairs of layers at most so far apart; all by default.
        tile: T; at most a device's samples or, split by width, N and a multiple of the devices. Default about 1,024.
        bandwidths: ``[L]`` of the RBF kernel, squared; default `sampled_bandwidths` of seed 0.
        exchange: how samples reach other devices; by default gathered if that takes at most 1 GiB, else round a ring.
        allow_repeats: accept equal samples.

    Raises:
        DegenerateError: as `centred_grams`.
        UserError: a band wider than the model, or a tile that does not fit.
    """
    checked(hidden, kernel)
    num_layers, count, _ = hidden.shape
    check_band(band, num_layers)
    mesh, axes, by_width = _split(hidden)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    size = block_size(tile, count if by_width else count // parts, "tile")
    if by_width:
        if tile is None:
            size -= size % parts
        if size == 0 or size % parts:
            raise UserError(f"tile={size or count}: expected a multiple of {parts}, the number of devices")
    if exchange is None:
        exchange = "gather" if hidden.nbytes <= GATHER_BYTES else "ring"
    facts = survey(hidden, allow_repeats=allow_repeats)
    one_cpu = mesh.devices.flat[0].platform == "cpu"
    starts = [start for start, _ in blocks(count if by_width else count // parts, size)]
    if not by_width:
        starts = [device * (count // parts) + start for device in range(parts) for start in starts]

    def visit(sums: bool, layers: Layers, means: np.ndarray, diagonals: np.ndarray) -> np.ndarray:
        program = _program(mesh, axes, by_width, size, exchange, kernel, band, one_cpu, sums)
        rows = program(hidden, facts.lengths, np.float32(means), np.float32(diagonals), layers)
        slots = processes.whole(rows).sum(axis=0, dtype=np.float64)
        table = np.zeros((count, *slots.shape[2:]))
        for start, slot in zip(starts, slots, strict=True):
            table[start : start + size] += slot
        return table

    layers, means, diagonals = prepare(hidden, facts, kernel, bandwidths)
    if kernel == "rbf":
        layers, means, diagonals = centre_rbf(layers, visit(True, layers, means, diagonals))
    return tables_from(visit(False, layers, means, diagonals), diagonals, band=band)


def _split(hidden: jax.Array) -> tuple[Mesh, tuple[str, ...], bool]:
    """Mesh, the axes that activations are split over, and whether by width."""
    sharding = hidden.sharding
    if not isinstance(sharding, NamedSharding):
        raise UserError(f"expected activations split by samples or by width, got {sharding}; see shard")
    spec = (*sharding.spec, None, None, None)[:3]
    by_samples, by_width = (entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec[1:])
    if spec[0] is not None or bool(by_samples) == bool(by_width):
        raise UserError(f"expected activations split by samples or by width, got {spec}; see shard")
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh, by_samples or by_width, bool(by_width)


@lru_cache(maxsize=64)
def _program(mesh: Mesh, axes: tuple[str, ...], by_width: bool, *options: Any) -> Any:
    """The whole sweep as one program: pairs of floats ``[2, tiles, T, L, 2L]``, or ``sums`` ``[2, tiles, T, L]``."""
    over = P(None, None, axes) if by_width else P(None, axes)
    small = P() if by_width else P(None, axes)
    layers = Layers(P(None, axes) if by_width else P(), P(), P(), P())
    rows = P(None, None, axes) if by_width else P(None, axes)
    function = partial(_rows, axes, math.prod(mesh.shape[axis] for axis in axes), by_width, *options)
    return jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=(over, small, small, small, layers), out_specs=rows, check_vma=False
        )
    )


def _rows(
    axes: tuple[str, ...],
    parts: int,
    by_width: bool,
    size: int,
    exchange: Exchange,
    kernel: Kernel,
    band: int | None,
    one_cpu: bool,
    sums: bool,
    x: jax.Array,
    lengths: jax.Array,
    means: jax.Array,
    diagonals: jax.Array,
    layers: Layers,
) -> jax.Array:
    """One device's part; ``x`` is ``[L, N/parts, D]``, or by width ``[L, N, D/parts]``."""
    me = jax.lax.axis_index(axes)
    depth, count, _ = x.shape
    share = size // parts if by_width else size
    own = (x, lengths, means, diagonals)
    todo = blocks(count, size)

    def part(rows: Samples, columns: Samples, first: jax.Array) -> jax.Array:
        inner = products(rows, columns, layers)
        if by_width:
            inner = jax.lax.psum_scatter(inner, axes, scatter_dimension=1, tiled=True)
            mine = (jax.lax.dynamic_slice_in_dim(of, me * share, share, -1) for of in rows[2:])
            rows, first = Samples(*rows[:2], *mine), first + me * share
        if sums:
            return rbf(inner, rows, columns, layers).sum(axis=2).T
        if kernel == "rbf":
            inner = centred_rbf(inner, rows, columns, layers)
        return contract_rows(inner, columns.diagonals, layers.scale, first, one_cpu, band)

    def cut(of: tuple[jax.Array, ...], start: jax.Array, mask: jax.Array) -> Samples:
        return Samples(of[0], start, mask, *(jax.lax.dynamic_slice_in_dim(one, start, size, 1) for one in of[1:]))

    def against(total: jax.Array, block: tuple[jax.Array, ...], offset: Any) -> jax.Array:
        """Adds what a block of columns gives; own row 0 is its column ``offset``."""
        pairs = [(k, *a, *b) for k, a in enumerate(todo) for b in blocks(block[0].shape[1], size)]

        def step(total: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            k, start, mask, column, columns_mask = of
            update = part(cut(own, start, mask), cut(block, column, columns_mask), offset + start - column)
            return total.at[:, k].set(add_exactly(total[:, k], update)), None

        return jax.lax.scan(step, total, tuple(jnp.asarray(np.array(of)) for of in zip(*pairs, strict=True)))[0]

    total = jnp.zeros((2, len(todo), share, depth) if sums else (2, len(todo), share, depth, 2 * depth))
    if by_width:
        return against(total, own, 0)
    if exchange == "gather":
        return against(total, tuple(jax.lax.all_gather(of, axes, axis=1, tiled=True) for of in own), me * count)

    def turn(carry: tuple[jax.Array, Any], step: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        total, block = carry
        block = tuple(jax.lax.ppermute(of, axes, [(k, (k + 1) % parts) for k in range(parts)]) for of in block)
        owner = (me - step) % parts
        return (against(total, block, (me - owner) * count), block), None

    carry = (against(total, own, 0), own)
    return jax.lax.scan(turn, carry, jnp.arange(1, parts))[0][0]
