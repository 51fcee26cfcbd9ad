"""ablation: test loss of a model with a block, or its attention or MLP, put out of action. High where it is needed.

``skip``: nothing is added to the residual stream there: what leaves the site is what entered it. Zeroing the site's
weights and biases (arXiv 2506.22638) is the same function, bit for bit.
``mean``: what is added is the same for every token: the mean, over all real tokens of the same rows, prompts included,
of what the site adds in the intact model. So a site counts only for what it tells tokens apart by.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcrit.core import processes
from jaxcrit.criteria.substitution import Sites
from jaxcrit.evidence.variants import Batch, Variant, enter
from jaxcrit.models.decoder import Block, layer_windows, run
from jaxcrit.models.sites import Edit, Site, Tap

METHODS = ("skip", "mean")
_SITE: dict[Sites, Site] = {"blocks": "block", "attn": "attn", "mlp": "mlp"}
# Biases are there in some models only; without them and these, a half adds nothing.
_LAST = {"blocks": ("o", "o_bias", "down", "down_bias"), "attn": ("o", "o_bias"), "mlp": ("down", "down_bias")}


@functools.cache
def ablate(sites: Sites) -> Edit:
    """The edit of a sweep; its data are ``[L]`` bool, which layers are out of action, and ``[L, D]``, what they add."""

    def change(
        site: Site, before: jax.Array, after: jax.Array, data: tuple[jax.Array, jax.Array], positions: jax.Array
    ) -> jax.Array:
        out, shift = data
        return jnp.where(out, before + shift.astype(before.dtype), after)

    return Edit(change, (_SITE[sites],))


def intact(num_layers: int, width: int) -> Variant:
    """The model as it is."""
    edits = (np.zeros(num_layers, bool), jnp.zeros((num_layers, width)))
    return Variant(_order(num_layers), edits, start=num_layers)


def variants(num_layers: int, shift: jax.Array) -> list[Variant]:
    """The model with each layer in turn out of action; ``shift`` ``[L, D]`` is what it adds, zeros to skip it."""
    return [
        Variant(_order(num_layers), (np.arange(num_layers) == layer, shift), start=layer) for layer in range(num_layers)
    ]


def update_sums(
    blocks: Block, outside: Mapping[str, jax.Array], batch: Batch, sites: Sites
) -> tuple[np.ndarray, int, int]:
    """What each layer's site adds to the stream of the intact model, summed over the real tokens of a batch.

    Returns:
        ``[L, D]`` float64, the number of tokens, and the number of block evaluations.
    """
    rows = batch[0].sharding if isinstance(batch[0].sharding, NamedSharding) else None
    sums, count = processes.whole(_update_sums(blocks, outside["embed"], *batch, sites, rows))
    return sums.astype(np.float64), int(count), blocks.config.num_layers


def silenced(weights: Mapping[str, jax.Array], layer: int, sites: Sites) -> dict[str, jax.Array]:
    """Weights by path with one layer's site skipped: its last projections zero, which leaves nothing to add."""
    paths = [path for path in (f"blocks.{name}" for name in _LAST[sites]) if path in weights]
    return {**weights, **{path: _zeroed(weights[path], np.int32(layer)) for path in paths}}


@jax.jit
def _zeroed(stack: jax.Array, layer: Any) -> jax.Array:
    return stack.at[layer].set(0)


@functools.partial(jax.jit, static_argnames=("sites", "rows"))
def _update_sums(
    blocks: Block,
    table: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    learn: jax.Array,
    sites: Sites,
    rows: NamedSharding | None,
) -> tuple[jax.Array, jax.Array]:
    x, context = enter(table, tokens, lengths, blocks.config, rows)
    filled = learn.any(axis=1)  # a row that fills up the batch has nothing to learn
    real = ((jnp.arange(tokens.shape[1]) < lengths[:, None]) & filled[:, None]).astype(jnp.float32)

    def added(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.einsum("btd,bt->d", (after - before).astype(jnp.float32), real)

    site, windows = _SITE[sites], layer_windows(blocks.config)
    taps = run(blocks, None, x, context, windows=windows, tap=Tap(added, (site,))).taps
    return taps[site], real.sum()


def _order(num_layers: int) -> np.ndarray:
    layers = np.arange(num_layers, dtype=np.int32)
    return np.stack([layers, layers], axis=1)
