"""The decoder: one file to read top to bottom, for every family; what differs between them is data in ModelConfig.

Weights are matrices [out, in] as in the checkpoint, so that loading and export change nothing (contracting the last
axis costs the same on CPU: 14.7 ms against 14.7 ms for 1024x768 by 2048x768). Those of attention are too: as
[heads, head_dim, in] each would be transposed for its product, in every layer and pass.
Blocks are stacked [L, ...] and run by one `jax.lax.scan` over slots of the stack.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxcrit.models.attention import attend, attend_by_scores, choose_attention
from jaxcrit.models.cache import Cache, LayerCache
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.mixture import give, kept_shares
from jaxcrit.models.rope import rotate
from jaxcrit.models.sites import Edit, Site, Tap, Visit, visitor
from jaxcrit.models.weights import HALVES, Weight, halves, placement, table
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding

Stored = tuple[Cache, jax.Array] | LayerCache
_EVERYTHING = 2**30  # a window wider than any context
_ACTIVATIONS: dict[str, Any] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    Attributes:
        positions: ``[B, T]`` int32, position of each token in its sequence; one after the other within a segment.
        cos: ``[B, T, R/2]`` float32; ``[B, K, T, R/2]`` where layers rotate in K ways.
        sin: likewise.
        segments: ``[B, T]`` int32 or None; tokens see only their own segment (packed rows).
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    segments: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a run of blocks gives.

    Attributes:
        hidden: ``[B, T, D]``, residual stream after the last block, before the final norm.
        taps: by site, what the tap returned there; that of a site inside the blocks is stacked over the blocks run.
        cache: the cache with this pass's tokens in it, or those of each layer; None without one.
    """

    hidden: jax.Array
    taps: dict[str, Any]
    cache: Any


class Block(nnx.Module):
    """One decoder block; with a leading axis on every weight, a stack of them.

    Attributes:
        weights: by name, as in `jaxcrit.models.weights.table`; all `nnx.Param`. A linear layer may have a low-rank
            adapter beside it: to ``q`` belong ``q_lora_a`` ``[rank, in]`` and ``q_lora_b`` ``[out, rank]``.
        config: static.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any]):
        self.config = config
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))

    def weight(self, name: str, like: jax.Array) -> jax.Array | None:
        """A weight in the dtype of the activations (float32 masters compute in bfloat16 so), None where absent."""
        param = getattr(self, name, None)
        return None if param is None else param[...].astype(like.dtype)

    def beside(self, weights: Mapping[str, Any]) -> Block:
        """The block with further weights."""
        own = {name: value.get_value() for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        return Block(self.config, {**own, **weights})

    def linear(self, x: jax.Array, name: str) -> jax.Array:
        """The linear layer of that name, ``[B, T, in]`` to ``[B, T, out]``."""
        y = jnp.einsum("bti,oi->bto", x, self.weight(name, x))
        lower = self.weight(f"{name}_lora_a", x)
        if lower is not None:
            low = jnp.einsum("bti,ri->btr", x, lower)
            y += jnp.einsum("btr,or->bto", low, self.weight(f"{name}_lora_b", x))
        bias = self.weight(f"{name}_bias", x)
        return y if bias is None else y + bias

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        window: jax.Array | None = None,
        cache: Stored | None = None,
        visit: Visit | None = None,
    ) -> tuple[jax.Array, Stored | None]:
        """Runs the block.

        Args:
            x: ``[B, T, D]`` residual stream.
            context: positions, rotations, segments.
            window: how many tokens back attention sees; None sees all. ``[2]`` with the number of the layer's rotation
                where there are several, see `layer_windows`.
            cache: keys and values of all blocks, and which of them is this one; or this block's own.
            visit: function ``(site, before, after) -> after``, called at ``attn``, ``router``, ``ff``, ``mlp`` and
                ``block``.

        Returns:
            The residual stream after the block, ``[B, T, D]``, and the cache with this pass's tokens.
        """
        visit = visit or _untouched
        with jax.named_scope("attention"):
            mixed, cache = self.attention(self.norm(x, "attn_norm"), context, window, cache)
            middle = visit("attn", x, x + self.added(mixed, "attn_post_norm"))
        with jax.named_scope("mlp"):
            mapped = self.mlp(self.norm(middle, "mlp_norm"), visit)
            after = visit("mlp", middle, middle + self.added(mapped, "mlp_post_norm"))
        return visit("block", x, after), cache

    def attention(
        self,
        x: jax.Array,
        context: Context,
        window: jax.Array | None,
        cache: Stored | None,
    ) -> tuple[jax.Array, Stored | None]:
        """Grouped-query attention with rotary positions; arguments as of the call."""
        q, k, v = self.qkv(x)
        if self.config.qk_norm == "all":
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k, v = (part.reshape(*part.shape[:2], -1, self.config.head_dim) for part in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        cos, sin = context.cos, context.sin
        if self.config.rope.others:
            window, turn = window  # type: ignore[misc]
            cos, sin = (jax.lax.dynamic_index_in_dim(part, turn, axis=1, keepdims=False) for part in (cos, sin))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scale, cap = self.config.attention_scale, self.config.attention_cap
        form, alone = "reference", (k, v)
        if isinstance(cache, LayerCache):
            cache = cache.extend(k, v, context.positions)
            visible = self.visible(context, jnp.arange(cache.keys.shape[2])[None, :], window)
            return self.out(attend_by_scores(q, cache.keys, cache.values, visible, scale, cap)), cache
        if cache is None or cache[0].fresh:
            rows, length, heads, head_dim = q.shape
            packed = context.segments is not None
            how = self.config.attention
            form, _ = choose_attention(how, q.dtype, rows, length, heads, head_dim, packed, cap is not None)
        key_positions = context.positions
        if cache is not None:
            stored, layer = cache
            stored, k, v = stored.extend(layer, k, v, context.positions)
            cache = (stored, layer)
            key_positions = jnp.arange(k.shape[1])[None, :]
        if form != "reference":
            windows, mesh, given = self.config.windows, self.config.attention.mesh, context.segments
            mixed = attend(
                form, q, *alone, windows=windows, window=window, segments=given, mesh=mesh, scale=scale, cap=cap
            )
            return self.out(mixed), cache
        visible = self.visible(context, key_positions, window)
        return self.out(attend_by_scores(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible, scale, cap)), cache

    def qkv(self, x: jax.Array) -> Sequence[jax.Array]:
        """Queries ``[B, T, H head_dim]``, keys and values ``[B, T, K head_dim]``, head behind head."""
        return [self.linear(x, name) for name in ("q", "k", "v")]

    def out(self, mixed: jax.Array) -> jax.Array:
        """What attention adds to the stream, ``[B, T, D]``, from what its heads give, ``[B, T, H, head_dim]``."""
        return self.linear(mixed.reshape(*mixed.shape[:2], -1), "o")

    def gate_up(self, x: jax.Array) -> Sequence[jax.Array]:
        """The two inner projections of the MLP, each ``[B, T, F]``."""
        return [self.linear(x, name) for name in ("gate", "up")]

    @staticmethod
    def visible(context: Context, key_positions: jax.Array, window: jax.Array | None) -> jax.Array:
        """``[B, T, S]`` bool, which keys ``[B or 1, S]`` a token sees: those before it, in its window and segment."""
        distance = context.positions[:, :, None] - key_positions[:, None, :]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        if context.segments is not None:
            visible &= context.segments[:, :, None] == context.segments[:, None, :]
        return visible

    def mlp(self, x: jax.Array, visit: Visit | None = None) -> jax.Array:
        """Gated MLP: down(act(gate x) * up x), ``[B, T, D]`` to ``[B, T, D]``; ``visit`` as of the call."""
        if self.config.experts:
            return self.mixture(x, visit or _untouched)
        gate, up = self.gate_up(x)
        inner = _ACTIVATIONS[self.config.activation](gate) * up
        return self.linear((visit or _untouched)("ff", inner, inner), "down")

    def mixture(self, x: jax.Array, visit: Visit) -> jax.Array:
        """What the experts give, ``[B, T, D]`` to ``[B, T, D]``; see `jaxcrit.models.mixture`."""
        scores = jnp.einsum("btd,ed->bte", x, self.weight("router", x)).astype(jnp.float32)
        shares = visit("router", scores, jax.nn.softmax(scores))
        chosen, weights = kept_shares(shares, self.config)
        experts = tuple(self.weight(name, x) for name in ("gate", "up", "down"))
        act = _ACTIVATIONS[self.config.activation]
        return give(x, chosen, weights.astype(x.dtype), experts, act, self.config.attention)  # type: ignore[arg-type]

    def added(self, x: jax.Array, name: str) -> jax.Array:
        """What a half adds to the stream: its output under the norm of that name, scaled."""
        x = self.norm(x, name)
        return x if self.config.residual_scale == 1 else x * self.config.residual_scale

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """RMSNorm with the weight of that name; x itself where a block has no such norm."""
        param = getattr(self, name, None)
        return x if param is None else rms_norm(x, param[...], self.config)


def _untouched(site: Site, before: jax.Array, after: jax.Array) -> jax.Array:
    return after


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, head; the head is None where it is tied to the embedding.

    No parameter object is shared between two places, so the module is a plain pytree (NNX tree mode).
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any]):
        """Builds the module of the arrays (or abstract shapes) of `jaxcrit.models.weights.table`, by path."""
        self.config = config
        inside = {path.removeprefix("blocks."): value for path, value in weights.items() if path.startswith("blocks.")}
        self.blocks = Block(config, inside)
        self.embed = nnx.Param(weights["embed"])
        self.norm = nnx.Param(weights["norm"])
        self.head = None if config.tied else nnx.Param(weights["head"])

    def weights(self) -> dict[str, Any]:
        """The arrays (or abstract shapes) by weight-table path: what checkpoints store."""
        blocks = {f"blocks.{name}": value for name, value in vars(self.blocks).items()}
        found = {**blocks, **vars(self)}
        return {path: value.get_value() for path, value in found.items() if isinstance(value, nnx.Param)}


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, then scaled as transformers does for the family."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_offset is None:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    return ((weight.astype(jnp.float32) + config.norm_offset) * normed).astype(x.dtype)


def abstract(config: ModelConfig, dtype: Any = np.float32, mesh: AnyMesh | None = None) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` leaves: shapes without memory, with their shardings on a mesh."""

    def like(row: Weight) -> jax.ShapeDtypeStruct:
        shape = row.shape(config)
        place = None if mesh is None else NamedSharding(mesh, placement(row.axes, config, mesh, row.path))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return Decoder(config, {row.path: like(row) for row in table(config)})


def layer_windows(config: ModelConfig, layers: Sequence[int] | None = None) -> jax.Array | None:
    """Attention windows ``[n]`` int32 of the layers to run, None where no layer has one.

    In a model whose layers rotate in several ways ``[n, 2]``: behind each window the number of the layer's rotation.
    """
    layers = range(config.num_layers) if layers is None else layers
    chosen = [config.windows[layer] for layer in layers]
    windows = [_EVERYTHING if window is None else window for window in chosen]
    if config.rope.others:
        turns = [config.rotations[layer] for layer in layers]
        return jnp.asarray(list(zip(windows, turns, strict=True)), jnp.int32).reshape(-1, 2)
    return None if all(window is None for window in chosen) else jnp.asarray(windows, jnp.int32)


def run(
    stack: Block,
    slots: jax.Array | None,
    x: jax.Array,
    context: Context,
    *,
    windows: jax.Array | None = None,
    cache: Cache | None = None,
    edit: Edit | None = None,
    edits: Any = None,
    adapters: Mapping[str, jax.Array] | None = None,
    past: LayerCache | None = None,
    tap: Tap | None = None,
    remat: bool = False,
) -> Output:
    """Runs blocks of a stack in the order of ``slots``: one scan, so one compiled body whatever the depth.

    The block of a slot is taken inside the loop body (slicing the stack beforehand would copy it). The
    order is data: substitution, ablation and early exit change ``slots`` and compile nothing anew.

    Args:
        stack: block weights with a leading axis.
        slots: ``[n]`` int32, which block of the stack runs at each step, or ``[n, 2]``, whose attention and whose
            MLP; None runs all of them in their order, and a gradient of the stack is then written layer by layer
            instead of summed whole at every step.
        x: ``[B, T, D]`` residual stream that enters.
        context: positions, rotations, segments.
        windows: attention windows of the steps, as of `layer_windows`.
        cache: keys and values by step ``[n, B, S, K, head_dim]``, or None.
        edit: changes the stream at sites inside the blocks; ablations and interventions are such edits.
        edits: its data, a tree of arrays ``[n, ...]``; each step's slice is handed to ``edit``.
        adapters: further weights of the steps ``[n, ...]`` by name, each step's put beside its block's own.
        past: in place of ``cache``, what earlier tokens left in each step, ``[n, B, K, S, head_dim]``: read, not handed
            back, so that a gradient does not carry it.
        tap: reads the stream at sites inside the blocks; what it returns is stacked, nothing else is kept.
        remat: recompute block activations in the backward pass instead of keeping them.

    Returns:
        Output with taps ``[n, ...]`` by site.
    """

    def step(carry: tuple[jax.Array, Cache | None], inputs: Any) -> Any:
        x, cache = carry
        index, block, window, data, further, before = inputs
        if slots is not None:
            block = _take(stack, block)
        if further is not None:
            block = block.beside(further)
        mine = before if cache is None else (cache, index)
        visit, found = visitor(edit, data, tap, context.positions)
        x, mine = block(x, context, window, mine, visit)
        return (x, None if cache is None else mine[0]), found

    body = jax.checkpoint(step) if remat else step
    count = (jax.tree.leaves(stack)[0] if slots is None else slots).shape[0]
    steps = (jnp.arange(count), stack if slots is None else slots, windows, edits, adapters, past)
    (x, cache), taps = jax.lax.scan(body, (x, cache), steps)
    return Output(x, taps, cache)


def run_each(
    blocks: Sequence[Block],
    x: jax.Array,
    context: Context,
    *,
    windows: jax.Array | None = None,
    caches: Sequence[LayerCache],
    edit: Edit | None = None,
    edits: Any = None,
) -> Output:
    """Runs blocks that have their own arrays, each with its own cache; other arguments as of `run`."""
    kept = []
    for layer, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        window, data = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (windows, edits))
        visit, _ = visitor(edit, data, None, context.positions)
        x, mine = block(x, context, window, cache, visit)
        kept.append(mine)
    return Output(x, {}, tuple(kept))


def run_span(
    stack: Block,
    slots: jax.Array,
    x: jax.Array,
    context: Context,
    start: jax.Array | int,
    stop: jax.Array | int,
    *,
    windows: jax.Array | None = None,
    cache: Cache | None = None,
    edit: Edit | None = None,
    edits: Any = None,
    tap: Tap | None = None,
) -> Output:
    """Runs steps ``start`` to ``stop`` (half-open) of an order; the bounds are data too, so any span compiles once.

    It has no gradient: a loop of unknown length is not differentiable in reverse.

    Args:
        stack: see `run`.
        slots: slots of the whole order; see `run`.
        x: ``[B, T, D]`` residual stream that enters step ``start``.
        context: see `run`.
        start: int32 scalar.
        stop: int32 scalar; none runs where it is not above ``start``.
        windows: windows of the whole order; see `run`.
        cache: keys and values of the whole order; see `run`.
        edit: see `run`.
        edits: edits of the whole order; see `run`.
        tap: see `run`.

    Returns:
        Output with taps of the whole order ``[n, ...]``, zeros at steps that are not run.
    """

    def block(index: jax.Array, x: jax.Array, cache: Cache | None) -> Any:
        slot, window, data = (
            jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)
            for tree in (slots, windows, edits)
        )
        visit, found = visitor(edit, data, tap, context.positions)
        mine: Any = None if cache is None else (cache, index)
        x, mine = _take(stack, slot)(x, context, window, mine, visit)
        return x, None if mine is None else mine[0], found

    def step(index: jax.Array, carry: tuple[jax.Array, Cache | None, dict[str, Any]]) -> Any:
        x, cache, kept = carry
        x, cache, found = block(index, x, cache)
        return x, cache, jax.tree.map(lambda whole, one: whole.at[index].set(one), kept, found)

    tapped = {} if tap is None else jax.eval_shape(block, jnp.int32(0), x, cache)[2]
    kept = jax.tree.map(lambda one: jnp.zeros((len(slots), *one.shape), one.dtype), tapped)
    x, cache, kept = jax.lax.fori_loop(start, stop, step, (x, cache, kept))
    return Output(x, kept, cache)


def _take(stack: Block, slot: jax.Array) -> Block:
    """The block at a slot; of two slots, attention from the first and MLP from the second."""
    if slot.ndim == 0:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), stack)
    weights = {name: value.get_value() for name, value in vars(stack).items() if isinstance(value, nnx.Param)}
    half = halves(stack.config)
    taken = {}
    for name, value in weights.items():
        mine = slot[HALVES.index(half[name.partition("_lora_")[0]])]  # an adapter belongs where its linear layer does
        taken[name] = jax.lax.dynamic_index_in_dim(value, mine, keepdims=False)
    return Block(stack.config, taken)


def embed(decoder: Decoder, tokens: jax.Array, dtype: Any = None) -> jax.Array:
    """Token embeddings ``[B, T, D]`` in the compute dtype (default: the weights' own)."""
    return look_up(decoder.embed[...], tokens, decoder.config, dtype)


def look_up(table: jax.Array, tokens: jax.Array, config: ModelConfig, dtype: Any = None) -> jax.Array:
    """What enters the first block, ``[B, T, D]``: rows of the table ``[V, D]``, scaled."""
    x = table[tokens].astype(dtype or table.dtype)
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, x.dtype)


def forward(
    decoder: Decoder,
    tokens: jax.Array,
    *,
    lengths: jax.Array | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Any = None,
    blocks: Sequence[Block] | None = None,
    offset: jax.Array | None = None,
    edit: Edit | None = None,
    edits: Any = None,
    tap: Tap | None = None,
    remat: bool = False,
    dtype: Any = None,
    mesh: AnyMesh | None = None,
) -> Output:
    """Runs tokens through the embedding and all blocks.

    Args:
        decoder: the model.
        tokens: ``[B, T]`` int32, right padded; padding never reaches a real token, for attention is causal.
        lengths: ``[B]`` int32 real tokens of each sequence (longrope asks); default T.
        positions: ``[B, T]`` int32; default 0..T-1.
        segments: ``[B, T]`` int32 for packed rows.
        cache: keys and values to read and extend.
        blocks: the decoder's blocks apart, which then take its stack's place; the cache is one of each layer.
        offset: ``[B, T, D]`` added to the embeddings, or None.
        edit: see `run`; acts at ``embed`` too, behind the offset.
        edits: see `run`; ``[L, ...]``.
        tap: see `run`; reads ``embed`` too, and what it returns there is not stacked.
        remat: see `run`.
        dtype: compute dtype.
        mesh: splits the rows of the residual stream over it; XLA left to itself splits the width as the weights are
            split and keeps all rows everywhere (Llama-2-7B, 32 x 1024, v5e:4x4: 2.15 GiB a device for 1.14).

    Returns:
        Output; apply `logits` to its hidden state for next-token logits.
    """
    batch, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if lengths is None:
        lengths = jnp.full((batch,), length, jnp.int32)
    config = decoder.config
    context = Context(positions, *config.rope.cos_sin(positions, lengths), segments)
    with jax.named_scope("embed"):
        x = embed(decoder, tokens, dtype)
        x = x if offset is None else x + offset.astype(x.dtype)
        if mesh is not None:
            x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
        visit, found = visitor(edit, edits, tap, positions)
        x = visit("embed", x, x)
    windows = layer_windows(config)
    if blocks is not None:
        return run_each(blocks, x, context, windows=windows, caches=cache, edit=edit, edits=edits)
    slots = jnp.arange(config.num_layers, dtype=jnp.int32)
    out = run(
        decoder.blocks, slots, x, context, windows=windows, cache=cache, edit=edit, edits=edits, tap=tap, remat=remat
    )
    return dataclasses.replace(out, taps={**found, **out.taps})


def logits(decoder: Decoder, hidden: jax.Array) -> jax.Array:
    """Final norm and head: ``[..., D]`` residual stream to ``[..., V]`` logits."""
    normed = rms_norm(hidden, decoder.norm[...], decoder.config)
    head = decoder.embed if decoder.head is None else decoder.head
    return shaped(jnp.einsum("...d,vd->...v", normed, head[...].astype(hidden.dtype)), decoder.config)


def shaped(scores: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of what the head gives: divided and softly capped where the model does so."""
    scores = scores if config.logit_divisor == 1 else scores / config.logit_divisor
    return scores if config.logit_cap is None else config.logit_cap * jnp.tanh(scores / config.logit_cap)
