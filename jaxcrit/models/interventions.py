"""Interventions on the residual stream, as data of two edits.

`edit` adds a vector and projects directions out, at every position; `patch` puts given vectors at given positions.
Which layers, which vectors and how strongly is data: a sweep over layers, components and controls, the empty
intervention among them, compiles once. `jaxcrit.models.generation.generate` applies `edit` from the last prompt token
on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.models.sites import Edit, Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intervention:
    """What `edit` does after each block; all leaves ``[L, ...]`` float32.

    Attributes:
        active: ``[L]`` bool; where False the stream passes bit for bit.
        shift: ``[L, B, D]`` added to every edited position of a sample.
        mean: ``[L, D]`` point about which is projected.
        basis: ``[L, k, D]`` orthonormal directions projected out; rows of zeros do nothing.
    """

    active: jax.Array | np.ndarray
    shift: jax.Array | np.ndarray
    mean: jax.Array | np.ndarray
    basis: jax.Array | np.ndarray


def _change(site: Site, before: jax.Array, after: jax.Array, data: Intervention, positions: jax.Array) -> jax.Array:
    x, highest = after.astype(jnp.float32), jax.lax.Precision.HIGHEST
    along = jnp.einsum("btd,kd->btk", x - data.mean, data.basis, precision=highest)
    changed = x + data.shift[:, None] - jnp.einsum("btk,kd->btd", along, data.basis, precision=highest)
    return jnp.where(data.active, changed.astype(after.dtype), after)


edit = Edit(_change, ("block",))  # of an `Intervention`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patch:
    """What `patch` puts where; all leaves ``[L, ...]``.

    Attributes:
        at: ``[L, B, K]`` int32 positions in each row, all different; -1 for none.
        active: by site, ``[L]`` bool; where False the stream passes bit for bit.
        values: by site, ``[L, B, K, D]``: at ``attn`` and ``mlp`` what the half is to add there, at ``block`` the
            stream itself.
    """

    at: jax.Array | np.ndarray
    active: Mapping[str, jax.Array | np.ndarray]
    values: Mapping[str, jax.Array | np.ndarray]


def _put(site: Site, before: jax.Array, after: jax.Array, data: Patch, positions: jax.Array) -> jax.Array:
    if site not in data.active:
        return after
    here = positions[..., None] == data.at[:, None]  # [B, T, K]; a sum with one term, for a product would round
    put = jnp.where(here[..., None], data.values[site][:, None], 0).sum(axis=2).astype(after.dtype)
    return jnp.where(data.active[site] & here.any(axis=-1)[..., None], put + (0 if site == "block" else before), after)


patch = Edit(_put, ("attn", "mlp", "block"))  # of a `Patch`


def intervention(
    shape: tuple[int, int, int],
    *,
    shifts: Mapping[int, np.ndarray] | None = None,
    projections: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    rank: int = 1,
) -> Intervention:
    """Lays out an intervention; without shifts and projections, the empty one.

    Args:
        shape: (L, B, D).
        shifts: by layer, ``[D]`` or ``[B, D]`` to add.
        projections: by layer, a mean ``[D]`` and orthonormal directions ``[k, D]`` to remove about it.
        rank: the most k; part of what is compiled for.

    Example:
        >>> intervention((2, 1, 4), shifts={1: np.ones(4)}).active.tolist()
        [False, True]
    """
    layers, batch, width = shape
    found = Intervention(
        np.zeros(layers, bool),
        np.zeros((layers, batch, width), np.float32),
        np.zeros((layers, width), np.float32),
        np.zeros((layers, rank, width), np.float32),
    )
    for layer, shift in (shifts or {}).items():
        found.active[layer], found.shift[layer] = True, shift
    for layer, (mean, basis) in (projections or {}).items():
        found.active[layer], found.mean[layer], found.basis[layer, : len(basis)] = True, mean, basis
    return found
