"""A prompt's beginning read by one model and answered by another: some layers' keys and values reused, some recomputed.

The sender reads the prefix. Each run of layers to recompute begins at what enters its first layer in the sender (at the
receiver's own embeddings where that is layer 0) and goes through the receiver's blocks; all other layers keep the
sender's keys and values. The receiver then reads the rest of the prompt over that cache and answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.models.cache import Cache
from jaxcrit.models.decoder import Block, Context, Decoder, Output, embed, layer_windows, run_span
from jaxcrit.models.generation import Prefilled, cache_sharding, empty_cache
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import batch_sharding

_ENTERING = Tap(lambda site, before, after, positions: before, ("block",))


def runs_of(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of neighbours among layers, each as its first layer and the one behind its last.

    Example:
        >>> runs_of([3, 4, 7])
        [(3, 5), (7, 8)]
    """
    found: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer:
            found[-1] = found[-1][0], layer + 1
        else:
            found.append((layer, layer + 1))
    return found


def mixed_prefill(
    receiver: Decoder,
    sender: Decoder,
    tokens: np.ndarray,
    lengths: np.ndarray,
    prefix: np.ndarray,
    recompute: Iterable[int],
    max_new_tokens: int,
    mesh: Mesh,
) -> Prefilled:
    """Prompts for `jaxcrit.models.generation.decode`, over a mixed cache.

    Args:
        receiver: model that answers.
        sender: model of the same shape that has read the beginnings.
        tokens: ``[B, T]`` int prompts, right padded.
        lengths: ``[B]`` int, real tokens of each prompt.
        prefix: ``[B]`` int, tokens of each that the sender has read; fewer than ``lengths``.
        recompute: layers whose keys and values are the receiver's own work.
        max_new_tokens: room for new tokens.
        mesh: devices; rows are split over them.
    """
    rows, depth = batch_sharding(mesh), receiver.config.num_layers
    left = int((lengths - prefix).max())
    at = prefix[:, None] + np.arange(min(tokens.shape[1], 1 << (left - 1).bit_length()))  # few widths to compile for
    rest = np.take_along_axis(tokens, np.minimum(at, tokens.shape[1] - 1), axis=1)
    start = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    given = (tokens, start, prefix, rest, at, lengths)
    whole, start, heads, rest, at, ends = (jax.device_put(np.asarray(array, np.int32), rows) for array in given)
    cache = empty_cache(receiver, *tokens.shape, max_new_tokens, mesh)
    read = span_step(sender.blocks, *enter_step(sender, whole, start, heads, mesh), cache, 0, depth, mesh)
    cache = read.cache
    own, context = enter_step(receiver, whole, start, heads, mesh)
    for first, stop in runs_of(recompute):
        x = own if first == 0 else read.taps["block"][first]
        cache = span_step(receiver.blocks, x, context, cache, first, stop, mesh).cache
    last = span_step(receiver.blocks, *enter_step(receiver, rest, at, ends, mesh), cache, 0, depth, mesh)
    return Prefilled(whole, ends, last.cache, max_new_tokens, mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def enter_step(
    decoder: Decoder, tokens: jax.Array, positions: jax.Array, lengths: jax.Array, mesh: Mesh
) -> tuple[jax.Array, Context]:
    """What enters the first block, ``[B, T, D]``, and the context of tokens at these positions.

    Args:
        decoder: the model.
        tokens: ``[B, T]`` int32.
        positions: ``[B, T]`` int32.
        lengths: ``[B]`` int32 real tokens of each whole sequence (longrope asks).
        mesh: devices.
    """
    x = jax.lax.with_sharding_constraint(embed(decoder, tokens), batch_sharding(mesh))
    return x, Context(positions, *decoder.config.rope.cos_sin(positions, lengths))


@functools.partial(jax.jit, static_argnames="mesh")
def span_step(blocks: Block, x: jax.Array, context: Context, cache: Cache, start: int, stop: int, mesh: Mesh) -> Output:
    """Layers ``start`` to ``stop`` over a cache; tap ``block`` is what entered each, ``[L, B, T, D]``."""
    slots, windows = jnp.arange(blocks.config.num_layers), layer_windows(blocks.config)
    out = run_span(blocks, slots, x, context, start, stop, windows=windows, cache=cache, tap=_ENTERING)
    kept = jax.lax.with_sharding_constraint(out.cache, cache_sharding(blocks.config, mesh))
    return dataclasses.replace(out, cache=kept)
