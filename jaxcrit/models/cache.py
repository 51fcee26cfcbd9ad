"""The keys and values of tokens that a model has already seen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens already seen; slot s of the third axis holds position s.

    Attributes:
        keys: ``[L, B, S, K, head_dim]``.
        values: ``[L, B, S, K, head_dim]``.
        fresh: whether nothing is in it before this pass, whose tokens then need see no others; static.
    """

    keys: jax.Array
    values: jax.Array
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})

    def extend(
        self, layer: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Stores new tokens of one layer, and gives back all that the layer has.

        A row's tokens lie at its own positions, so right-padded prompts of mixed length need no shifting: what padding
        wrote is overwritten by the next tokens before anything attends that far. New tokens are written into the whole
        in place before the layer is read: a layer that is read, extended and written back costs 0.5 ms of CPU per row
        and step for 0.27 (embedded model, 64 rows, 64 positions).

        Args:
            layer: scalar.
            keys: ``[B, T, K, head_dim]``.
            values: ``[B, T, K, head_dim]``.
            positions: ``[B, T]``.

        Returns:
            The cache, and the layer's keys and values ``[B, S, K, head_dim]``.
        """
        at = (layer, jnp.arange(len(positions))[:, None], positions)
        stored = dataclasses.replace(
            self,
            keys=self.keys.at[at].set(keys.astype(self.keys.dtype)),
            values=self.values.at[at].set(values.astype(self.values.dtype)),
        )
        mine = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in (stored.keys, stored.values))
        return stored, *mine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The same of one layer, heads first: what a new token reads of each head is contiguous.

    Attributes:
        keys: ``[B, K, S, head_dim]``.
        values: ``[B, K, S, head_dim]``.
    """

    keys: jax.Array
    values: jax.Array

    def extend(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> LayerCache:
        """Stores new tokens ``[B, T, K, head_dim]`` at their positions ``[B, T]``."""
        return LayerCache(_store(self.keys, keys, positions), _store(self.values, values, positions))


def _store(into: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    new = new.astype(into.dtype)
    if positions.shape == (1, 1):  # a slice is written in place; a scatter of one row goes by index
        return jax.lax.dynamic_update_slice(into, new.swapaxes(1, 2), (0, 0, positions[0, 0], 0))
    return into.at[jnp.arange(len(positions))[:, None], :, positions].set(new)
