"""CKA without each unit of resampling, where a unit is several samples: all tokens of a prompt."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.similarity._cka import Bias, normalised
from jaxcrit.similarity._grams import Grams, GramTables, PackedGrams

# The debiased estimator needs 4 samples beside a unit; an error over two units would be one difference.
MIN_UNITS, MIN_SAMPLES = 3, 4
_HIGHEST = jax.lax.Precision.HIGHEST


def cka_without_units(grams: Grams, tables: GramTables, units: np.ndarray) -> dict[Bias, np.ndarray]:
    """CKA of all pairs with each unit's samples deleted together, exactly.

    Samples of one unit are alike, so deleting them one at a time would take their number for evidence. With K the
    Gram, K0 without its diagonal d, S the samples of a unit and R the n others, deleting leaves

    - ``<K0_RR, K0'_RR> = <K0, K0'> - 2 sum_{m in S} r_m + <K0_SS, K0'_SS>`` (r = ``tables.rows``),
    - row sums ``u = -d - K0[:, S] 1`` over R, and their inner products,

    of which the debiased product is ``cross + t t'/((n-1)(n-2)) - 2/(n-2) u.u'`` with t = sum u, and the biased one
    ``cross + d.d' - 2/n v.v' + s s'/n^2`` with v = u + d and s = sum v. Every Gram is passed over once: 2 L^2 N^2
    floating-point operations, as for ``gram_tables``.

    Args:
        grams: ``[L, N, N]`` centred Grams; of two models one after the other.
        tables: tables of these Grams.
        units: ``[N]`` int, which unit each sample belongs to, 0 to U-1.

    Returns:
        By estimator ``[U, L, L]`` float64, or ``[U, L, L']`` where two models are compared.

    Raises:
        UserError: fewer than 3 units, or one that leaves fewer than 4 samples.
    """
    units = np.asarray(units)
    counts = np.bincount(units)
    num_units, num_samples, num_layers = len(counts), len(units), len(tables.diagonals)
    if num_units < MIN_UNITS or num_samples - counts.max() < MIN_SAMPLES:
        raise UserError(
            f"expected at least {MIN_UNITS} prompts, and {MIN_SAMPLES} samples beside each, got {num_units} prompts of"
            f" {num_samples} samples in all; give more prompts"
        )
    members = np.argsort(units, kind="stable")
    places = np.full((num_units, counts.max()), num_samples)  # past the end where a unit has fewer samples
    places[units[members], np.arange(num_samples) - np.repeat(np.cumsum(counts) - counts, counts)] = members
    if isinstance(grams, PackedGrams):
        rows_of, diagonals = grams.rows, grams.diagonals
    else:
        rows_of, diagonals = partial(_take, jnp.asarray(grams)), np.diagonal(grams, axis1=1, axis2=2)
    # The tables are of Grams scaled to a trace in [1, 2).
    scale = (tables.diagonals.sum(axis=1) / diagonals.sum(axis=1, dtype=np.float64)).astype(np.float32)
    parts = []
    for place in places:
        rows = rows_of(np.minimum(place, num_samples - 1))
        parts.append(jax.device_get(_delete_unit(rows, diagonals * scale[:, None], scale, place)))
    within, aligned, totals = (np.asarray(part, np.float64) for part in map(np.stack, zip(*parts, strict=True)))
    touched = np.zeros((num_units, num_layers, num_layers))
    np.add.at(touched, units, tables.rows)
    cross = tables.cross - touched - touched.swapaxes(1, 2) + within
    n = (num_samples - counts)[:, None, None]
    u, v = slice(None, num_layers), slice(num_layers, None)
    diagonal = tables.diagonals.T[:, :, None] * tables.diagonals.T[:, None, :]
    removed = np.zeros_like(touched)
    np.add.at(removed, units, diagonal)
    outer = totals[:, :, None] * totals[:, None, :]
    products: dict[Bias, np.ndarray] = {
        "biased": cross + diagonal.sum(axis=0) - removed - 2 / n * aligned[:, v, v] + outer[:, v, v] / n**2,
        "debiased": cross + outer[:, u, u] / ((n - 1) * (n - 2)) - 2 / (n - 2) * aligned[:, u, u],
    }
    return {bias: tables.pairs(normalised(values)) for bias, values in products.items()}


@jax.jit
def _take(grams: jax.Array, samples: jax.Array) -> jax.Array:
    return grams[:, samples]


@jax.jit
def _delete_unit(
    rows: jax.Array, diagonals: jax.Array, scale: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``<K0_SS, K0'_SS>`` ``[L, L]``, and inner products ``[2L, 2L]`` and sums ``[2L]`` of u and v of one unit.

    Args:
        rows: ``[L, S, N]`` of the unit's samples.
        diagonals: ``[L, N]``, scaled.
        scale: ``[L]``, what the Grams are multiplied by.
        place: ``[S]`` of the unit's samples; N where there is none.
    """
    num_samples = rows.shape[2]
    with jax.named_scope("delete_units"):
        inside = jnp.zeros(num_samples, bool).at[place].set(True, mode="drop")
        rows = jnp.where((place < num_samples)[:, None], rows * scale[:, None, None], 0)
        rows = jnp.where(jnp.arange(num_samples) == place[:, None], 0, rows)
        block = jnp.where(inside, rows, 0).reshape(len(rows), -1)
        u = jnp.where(inside, 0, -diagonals - rows.sum(axis=1))
        both = jnp.concatenate([u, u + jnp.where(inside, 0, diagonals)])
        within = jnp.matmul(block, block.T, precision=_HIGHEST)
        return within, jnp.matmul(both, both.T, precision=_HIGHEST), both.sum(axis=1)
