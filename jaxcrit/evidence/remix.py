"""What a mixture answers where shares of its experts are given from outside, at a prompt's last token or from it on.

Nothing changes in front of the last prompt token, nor below the lowest layer whose shares are given: `read_step` runs
all of that once and leaves the stream that enters that layer, and the keys and values above it. Every variant then runs
the answer alone, through those layers alone. The model as it is and all variants go through one compiled program, so
that where nothing is given, or a row's own shares are put back, no bit differs.

An answer is exact where greedy decoding would give it: every token is the likeliest after those before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import response_exact
from jaxcrit.models.cache import Cache, LayerCache
from jaxcrit.models.decoder import Context, Decoder, Output, embed, layer_windows, run
from jaxcrit.models.mixture import OVERRIDE, Override
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding

PRECISION = "highest"  # differences between variants are small
RATE = 2.0  # length of the first step of descent, in logarithms of shares; it falls to 0 by a cosine
_TINY, _NEVER = 1e-20, 2**30
_MULTIPLE = 4  # of the places of an answer
# Programs that do not wait for each other may meet on a mesh in another order on each CPU device, and then for ever.
done = jax.block_until_ready


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows with answers, on the devices.

    Attributes:
        tokens: ``[B, T]`` int32, right padded.
        lengths: ``[B]`` int32, real tokens.
        prompts: ``[B]`` int32, those of the prompt.
    """

    tokens: Any
    lengths: Any
    prompts: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """What is the same in all variants of a batch; n layers from the lowest on that may change.

    Attributes:
        x: ``[B, A, D]`` stream that enters the lowest of them, at the last prompt token and at the answer's.
        past: keys and values of the whole rows, ``[n, B, K, T, head_dim]``; those of the answer are overwritten.
        context: positions and rotations of these places.
        tokens: ``[B, A]`` int32 tokens at these places.
        learn: ``[B, A]`` bool, tokens of the answer.
    """

    x: jax.Array
    past: LayerCache
    context: Context
    tokens: jax.Array
    learn: jax.Array


_SHARES = Tap(lambda site, before, after, positions: after[:, 0].astype(jnp.float32), ("router",))


def rows_of(examples: Sequence[Example | None], width: int, mesh: Mesh) -> Rows:
    """Rows on the devices; None fills up."""
    tokens, lengths = np.zeros((len(examples), width), np.int32), np.ones(len(examples), np.int32)
    prompts = np.ones(len(examples), np.int32)
    for slot, one in enumerate(examples):
        if one is not None:
            lengths[slot], prompts[slot] = len(one.token_ids), one.prompt_length
            tokens[slot, : lengths[slot]] = one.token_ids
    return jax.device_put(Rows(tokens, lengths, prompts), batch_sharding(mesh))


def places_of(examples: Sequence[Example]) -> int:
    """Places that hold the last prompt token and the answer of each row."""
    return -(-max(1 + len(one.token_ids) - one.prompt_length for one in examples) // _MULTIPLE) * _MULTIPLE


@functools.partial(jax.jit, static_argnames=("first", "places", "mesh"))
def read_step(decoder: Decoder, rows: Rows, *, first: int, places: int, mesh: Mesh) -> tuple[Read, jax.Array]:
    """Runs rows as they are.

    Args:
        decoder: the model.
        rows: the batch.
        first: lowest layer whose shares may change.
        places: A, see `places_of`.
        mesh: devices.

    Returns:
        What variants go on from; and ``[B, D]`` float32, the stream behind layer ``L // 2``, mean over the prompt.
    """
    config, depth = decoder.config, decoder.config.num_layers
    at = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1], dtype=jnp.int32), rows.tokens.shape)
    behind = rows.prompts[:, None] - 1 + jnp.arange(places, dtype=jnp.int32)
    whole, tail = (Context(spots, *config.rope.cos_sin(spots, rows.lengths)) for spots in (at, behind))
    inside = (at < rows.prompts[:, None])[..., None]

    def mean(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.where(inside, after.astype(jnp.float32), 0).sum(axis=1) / rows.prompts[:, None]

    tap = Tap(mean, ("block",))
    below = jax.lax.with_sharding_constraint(embed(decoder, rows.tokens), batch_sharding(mesh))
    means = []
    if first:
        out = _through(decoder, below, whole, 0, first, tap=tap)
        below, means = out.hidden, [out.taps["block"]]
    kept = (depth - first, *rows.tokens.shape, config.num_kv_heads, config.head_dim)
    room = Cache(jnp.zeros(kept, below.dtype), jnp.zeros(kept, below.dtype), fresh=True)
    out = _through(decoder, below, whole, first, depth, cache=room, tap=tap)
    past = LayerCache(out.cache.keys.swapaxes(2, 3), out.cache.values.swapaxes(2, 3))
    x = jnp.take_along_axis(below, behind[..., None], axis=1, mode="clip")
    tokens = jnp.take_along_axis(rows.tokens, behind, axis=1, mode="clip")
    learn = (jnp.arange(places) > 0) & (behind < rows.lengths[:, None])
    x, tokens, learn, states = jax.lax.with_sharding_constraint(
        (x, tokens, learn, jnp.concatenate([*means, out.taps["block"]])[depth // 2]), batch_sharding(mesh)
    )
    return Read(x, past, tail, tokens, learn), states


def answered(
    decoder: Decoder, read: Read, shares: jax.Array, on: jax.Array, every: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One variant: ``[B]`` mean loss of each answer in nats, ``[B]`` whether it is exact, ``[n, B, E]`` its shares.

    Args:
        decoder: the model.
        read: rows that answer.
        shares: ``[n, B, E]`` float32, given in place of the router's.
        on: ``[n]`` bool, layers where they are.
        every: bool, whether at every place of the answer rather than at the last prompt token alone.
        mesh: devices.

    Returns:
        Its shares are those at the last prompt token, given or the router's own.
    """
    config, depth = decoder.config, decoder.config.num_layers
    first = depth - len(on)
    begin = jnp.broadcast_to(read.context.positions[:, 0], shares.shape[:2])
    given = Override(shares, on, begin, jnp.where(every, _NEVER, begin + 1))
    how: dict[str, Any] = {"past": read.past, "edit": OVERRIDE, "edits": given, "tap": _SHARES}
    out = _through(decoder, read.x, read.context, first, depth, **how)
    head = decoder.embed if decoder.head is None else decoder.head
    asked = (out.hidden, decoder.norm[...], head[...], read.tokens, read.learn, config, mesh)
    losses, counted, exact = response_exact(*asked)
    return losses.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1), exact, out.taps["router"]


@functools.partial(jax.jit, static_argnames="mesh")
def variant_step(
    decoder: Decoder, read: Read, shares: jax.Array, on: jax.Array, every: jax.Array, *, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`answered`, of which every process sees all rows."""
    found = answered(decoder, read, shares, on, every, mesh)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def limited(own: Any, proposed: Any, moved: Any) -> Any:
    """Shares ``[..., E]`` in which some experts take the proposed ones' proportions and the rest keep their own.

    The mass of those that move stays. A row whose proposal is its own stays as it is to the bit.

    Args:
        own: ``[..., E]``, sum 1.
        proposed: ``[..., E]``, not all 0 where ``moved``.
        moved: ``[..., E]`` bool, experts that move.
    """
    inside = jnp.where(moved, proposed, 0)
    mass = jnp.where(moved, own, 0).sum(axis=-1, keepdims=True)
    scale = mass / jnp.maximum(inside.sum(axis=-1, keepdims=True), _TINY)
    return jnp.where(moved, inside * scale, own)


@functools.partial(jax.jit, static_argnames="mesh")
def descend_step(
    decoder: Decoder,
    read: Read,
    own: jax.Array,
    moved: jax.Array,
    weights: jax.Array,
    on: jax.Array,
    every: jax.Array,
    steps: jax.Array,
    *,
    mesh: Mesh,
) -> jax.Array:
    """Shares ``[n, B, E]`` by descent on the answers of k other rows each, under the row's shares.

    With u the logarithm of the shares, each of the steps is ``u <- u - r g / |g|``: g is the gradient of the weighted
    mean loss of the k rows, |g| its length over all layers of a row, and r falls from `RATE` to 0 by a cosine.

    Args:
        decoder: the model.
        read: the other rows, ``[B k]``, those of a row side by side.
        own: ``[n, B, E]`` shares to begin with.
        moved: ``[n, B, E]`` bool, experts that move, see `limited`.
        weights: ``[B, k]``.
        on: ``[n]`` bool, layers that move.
        every: bool, see `answered`.
        steps: number of steps, int32.
        mesh: devices.
    """

    def loss(u: jax.Array) -> jax.Array:
        shares = jnp.repeat(limited(own, jax.nn.softmax(u, axis=-1), moved), weights.shape[1], axis=1)
        losses, _, _ = answered(decoder, read, shares, on, every, mesh)
        return (losses.reshape(weights.shape) * weights).sum()

    def step(number: jax.Array, u: jax.Array) -> jax.Array:
        slope = jnp.where(on[:, None, None] & moved, jax.grad(loss)(u), 0)
        length = jnp.sqrt(jnp.square(slope).sum(axis=(0, 2), keepdims=True))
        rate = RATE * (1 + jnp.cos(jnp.pi * number / steps)) / 2
        return u - rate * slope / jnp.maximum(length, _TINY)

    u = jax.lax.fori_loop(0, steps, step, jnp.log(jnp.maximum(own, _TINY)))
    found = limited(own, jax.nn.softmax(u, axis=-1), moved)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def _through(decoder: Decoder, x: jax.Array, context: Context, start: int, stop: int, **given: Any) -> Output:
    """Runs layers ``start`` to ``stop``, half-open."""
    layers = np.arange(start, stop, dtype=np.int32)
    windows = layer_windows(decoder.config, layers.tolist())
    return run(decoder.blocks, jnp.asarray(layers), x, context, windows=windows, **given)
