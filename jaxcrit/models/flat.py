"""Blocks laid out for generation on a CPU, where a step of a few tokens is bound by memory: each weight is read once.

In a stack, every step would copy each layer's weights out of it. Here each block has its own arrays, the projections
that read the same input are one matrix, and keys and values lie heads first, as products read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcrit.models.cache import Cache, LayerCache
from jaxcrit.models.decoder import Block


class FlatBlock(Block):
    """A decoder block in which q, k and v are one matrix ``attn_in``, gate and up one matrix ``mlp_in``."""

    def qkv(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values from one product."""
        config = self.config
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ends = np.cumsum(counts)[:-1] * config.head_dim
        return jnp.split(self.linear(x, "attn_in"), ends, axis=-1)

    def gate_up(self, x: jax.Array) -> list[jax.Array]:
        """Both inner projections from one product."""
        return jnp.split(self.linear(x, "mlp_in"), 2, axis=-1)


def flat_blocks(stack: Block) -> tuple[FlatBlock, ...]:
    """The blocks of a stack, each with its own arrays."""
    weights = {name: value.get_value() for name, value in vars(stack).items() if isinstance(value, nnx.Param)}

    def block(layer: int) -> FlatBlock:
        own: dict[str, Any] = {name: value[layer] for name, value in weights.items()}

        def joined(name: str, parts: Sequence[str]) -> None:
            for end in ("", "_bias"):
                if parts[0] + end in own:
                    own[name + end] = jnp.concatenate([own.pop(part + end) for part in parts])

        joined("attn_in", ("q", "k", "v"))
        if not stack.config.experts:
            joined("mlp_in", ("gate", "up"))
        return FlatBlock(stack.config, own)

    return tuple(block(layer) for layer in range(stack.config.num_layers))


def flat_cache(cache: Cache) -> tuple[LayerCache, ...]:
    """The layers of a cache, heads first."""
    heads_first = (part.swapaxes(2, 3) for part in (cache.keys, cache.values))
    return tuple(LayerCache(keys, values) for keys, values in zip(*heads_first, strict=True))
