"""What a model loses when keys and values of a prompt's beginning come from another model, in part or as a whole.

A variant says for each layer where the keys and values of the prefix come from: from the sender, or from a run of the
receiver's blocks that began at what enters some lower layer in the sender (from the receiver's own prefill where that
is layer 0). What such a run gives at a layer depends on where it began alone, never on where it ends, so at most L
runs, (L+1)/2 prefills, serve every set of layers there is. All variants go up together, a layer at a time, and those
that have had the same keys and values so far are one stream; no more than one layer's keys and values are held.

Sender and receiver, reference and variant go through the same compiled programs: where nothing differs, no bit does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.core import processes
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.batches import Batch, make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import divergence
from jaxcrit.evidence.answers import answers
from jaxcrit.evidence.rows import sample_losses
from jaxcrit.models.cache import Cache
from jaxcrit.models.decoder import Block, Context, Decoder, layer_windows, logits, run_span
from jaxcrit.models.generation import cache_sharding
from jaxcrit.models.mixed import enter_step, runs_of
from jaxcrit.models.model import Bars, Model
from jaxcrit.parallel.mesh import batch_rows, batch_sharding

SENDER = -1  # source of a layer's keys and values; any other is the layer where a run of the receiver's blocks began
MEASURES = ("kl", "top1", "first", "answer")
DISTANCES = ("keys_apart", "keys", "values_apart", "values", "identical")
_PRECISION = "highest"  # differences between variants are small
_MULTIPLE = 8  # of the width of what follows a prefix
# Programs that do not wait for each other may meet on a mesh in another order on each CPU device, and then for ever.
_done = jax.block_until_ready


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch on the devices.

    Attributes:
        prefix: ``[B, Tp]`` int32 tokens that the sender reads, right padded.
        heads: ``[B]`` int32 real tokens of each prefix.
        suffix: ``[B, Tq]`` int32 rest of the prompt and answer.
        ends: ``[B]`` int32 real tokens of each row as a whole.
        at: ``[B, A]`` int32 places in the suffix that tokens of the answer are predicted from.
        scored: ``[B, A]`` bool, which of these there are; none in a row that fills up.
    """

    prefix: jax.Array
    heads: jax.Array
    suffix: jax.Array
    ends: jax.Array
    at: jax.Array
    scored: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Damage:
    """What every variant does to every row, beside the receiver over its own cache.

    Attributes:
        measures: ``[4, V, N]`` float64: KL(own || variant) in nats, mean over the scored places of a row; share of
            these where the likeliest token stays the same; whether the first one changes; whether any does.
        distances: ``[5, L, N]`` float64: squared norm of the sender's keys less the receiver's, of the receiver's; the
            same of values; whether both are equal to the bit.
        batches: number of batches.
    """

    measures: np.ndarray
    distances: np.ndarray
    batches: int


def sources(num_layers: int, layers: Iterable[int]) -> np.ndarray:
    """Sources ``[L]`` where these layers are recomputed, each run of them begun at the sender's stream."""
    found = np.full(num_layers, SENDER)
    for start, stop in runs_of(layers):
        found[start:stop] = start
    return found


def one_reused(num_layers: int, layer: int) -> np.ndarray:
    """Sources ``[L]`` of the receiver's own cache with one layer of the sender's: nothing passes on in the prefix."""
    return np.where(np.arange(num_layers) == layer, SENDER, 0)


def planned(plan: np.ndarray) -> dict[str, int]:
    """How often blocks are run on a batch for variants ``[V, L]``: on prefixes, by each model, and on suffixes."""
    depth = plan.shape[1]
    starts = [start for start in range(depth) if (plan == start).any()]
    own = sum(int(np.flatnonzero((plan == start).any(axis=0)).max()) + 1 - start for start in starts)
    suffix = sum(len(np.unique(plan[:, : layer + 1], axis=0)) for layer in range(depth))
    return {"sender": depth, "receiver": own, "suffix": suffix}


def walk(
    receiver: Decoder,
    sender: Decoder,
    rows: Rows,
    plan: np.ndarray,
    mesh: Mesh,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Runs all variants on one batch.

    Args:
        receiver: model that answers.
        sender: model of the same shape.
        rows: the batch.
        plan: ``[V, L]`` int, sources of each variant; one of them the receiver's own cache, zeros.
        mesh: devices.
        progress: called with the number of block evaluations just done.

    Returns:
        By variant, the stream behind the last block at the scored places, ``[B, A, D]``; by layer, `DISTANCES`
        ``[5, B]`` float32 of the keys and values over the real tokens of each prefix.
    """
    config, room = receiver.config, rows.prefix.shape[1] + rows.suffix.shape[1]
    with jax.default_matmul_precision(_PRECISION):
        at = np.broadcast_to(np.arange(rows.prefix.shape[1], dtype=np.int32), rows.prefix.shape)
        at = jax.device_put(at, batch_sharding(mesh))
        theirs, before = enter_step(sender, rows.prefix, at, rows.heads, mesh)
        own, _ = enter_step(receiver, rows.prefix, at, rows.heads, mesh)
        x, behind = enter_step(receiver, rows.suffix, places(rows, mesh), rows.ends, mesh)
        runs: dict[int, jax.Array] = {}  # by their start, streams over the prefix
        streams = [(x, np.arange(len(plan)))]  # over the suffix, each with the variants it is so far
        distances = []
        for layer in range(config.num_layers):
            if (plan == layer).any():
                runs[layer] = theirs if layer else own
            runs = {start: run for start, run in runs.items() if (plan[:, layer:] == start).any()}
            which, kept = np.int32(layer), {}
            theirs, kept[SENDER] = _done(read_step(sender.blocks, which, theirs, before, room, mesh))
            for start, run in runs.items():
                runs[start], kept[start] = _done(read_step(receiver.blocks, which, run, before, room, mesh))
            if 0 in kept:
                distances.append(_done(apart_step(kept[SENDER], kept[0], rows.heads, mesh)))
            above = []
            while streams:  # each is let go when it has been read
                x, variants = streams.pop()
                for source in np.unique(plan[variants, layer]):
                    y = _done(answer_step(receiver.blocks, which, x, behind, kept[int(source)], mesh))
                    above.append((y, variants[plan[variants, layer] == source]))
            streams = above
            if progress is not None:
                progress(1 + len(runs) + len(above))
        found: list[Any] = [None] * len(plan)
        while streams:
            x, variants = streams.pop()
            picked = _done(pick_step(x, rows.at))
            for variant in variants:
                found[variant] = picked
    return found, distances


def measure(
    receiver: Decoder,
    sender: Decoder,
    rows: Rows,
    plan: np.ndarray,
    mesh: Mesh,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`MEASURES` of every variant ``[4, V, B]`` and `DISTANCES` ``[5, L, B]`` of one batch; arguments as of `walk`."""
    hidden, distances = walk(receiver, sender, rows, plan, mesh, progress)
    (own,) = np.flatnonzero((plan == 0).all(axis=1))[:1]
    with jax.default_matmul_precision(_PRECISION):
        measures = [_done(compare_step(receiver, hidden[own], one, rows.scored, mesh)) for one in hidden]
    found = processes.whole((measures, distances))
    return tuple(np.stack(one, axis=1).astype(np.float64) for one in found)  # type: ignore[return-value]


def damage(
    receiver: Model,
    sender: Model,
    plan: np.ndarray,
    examples: Sequence[Example],
    answer: Callable[[Batch], dict[int, Sequence[int]]],
    longest: int,
    *,
    batch_size: int,
    directory: RunDirectory | None,
    partial: str,
    bars: Bars | None,
) -> Damage:
    """`measure` over all rows; what is done outlives an interruption.

    Args:
        receiver: model that answers.
        sender: model of the same shape, on the same mesh.
        plan: ``[V, L]`` int, sources of each variant.
        examples: N rows with prefixes.
        answer: function that gives a batch's answers as tokens, by row.
        longest: tokens of an answer, at most; 0 where answers are those of the rows.
        batch_size: rows at a time.
        directory: directory of the run; None keeps nothing.
        partial: file that keeps what is done.
        bars: maker of progress bars.

    Raises:
        Preempted: told to leave; what is done is kept.
    """
    mesh, depth = receiver.mesh, receiver.config.num_layers
    models = receiver.decoder(bars), sender.decoder(bars)

    def take(batch: Any, _: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        rows = rows_of(batch, examples, answer(batch), widths[batch.tokens.shape[1]], mesh)
        measures, distances = measure(*models, rows, plan, mesh, step)
        values = np.concatenate([measures.reshape(-1, len(batch.rows)), distances.reshape(-1, len(batch.rows))])
        return values, (batch.rows < len(examples)).astype(np.int64)

    heads = [
        dataclasses.replace(one, token_ids=one.token_ids[: one.prefix_length], prompt_length=one.prefix_length)
        for one in examples
    ]
    batches = make_batches(heads, batch_rows(batch_size, mesh))
    widths: dict[int, tuple[int, int]] = {}
    for batch in batches:
        width = batch.tokens.shape[1]
        for row in batch.rows[batch.rows < len(examples)]:
            tokens, reply = reply_length(examples[row], longest)
            widest, most = widths.get(width, (0, 0))
            widths[width] = max(widest, -(-tokens // _MULTIPLE) * _MULTIPLE), max(most, reply)
    found, _, count = sample_losses(
        examples,
        batch_size,
        receiver,
        directory,
        take,
        len(MEASURES) * len(plan) + len(DISTANCES) * depth,
        sum(planned(plan).values()),
        bars,
        batches=[(batch.rows, batch) for batch in batches],
        partial=partial,
    )
    cut = len(MEASURES) * len(plan)
    return Damage(
        found[:cut].reshape(len(MEASURES), len(plan), -1), found[cut:].reshape(len(DISTANCES), depth, -1), count
    )


def reply_length(example: Example, longest: int) -> tuple[int, int]:
    """Tokens behind a row's prefix, and of them the answer's, at most; ``longest`` as of `damage`."""
    reply = longest or len(example.token_ids) - example.prompt_length
    return example.prompt_length - example.prefix_length + reply, max(1, reply)


def own_answers(
    model: Model, decoder: Decoder, examples: Sequence[Example], max_new_tokens: int, stop: Sequence[int]
) -> Callable[[Batch], dict[int, Sequence[int]]]:
    """Function that lets the model answer a batch's whole prompts greedily; what it has answered it remembers."""
    known: dict[int, Sequence[int]] = {}

    def answer(batch: Batch) -> dict[int, Sequence[int]]:
        rows = [row for row in batch.rows.tolist() if row < len(examples)]
        if not all(row in known for row in rows):
            prompts = [examples[row].token_ids[: examples[row].prompt_length] for row in rows]
            width = -(-max(map(len, prompts)) // _MULTIPLE) * _MULTIPLE
            tokens, lengths = np.zeros((len(batch.rows), width), np.int32), np.ones(len(batch.rows), np.int32)
            for slot, prompt in enumerate(prompts):
                tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
            whole = Batch(tokens, lengths, batch.rows)
            found = answers(model, decoder, whole, len(examples), max_new_tokens, stop=stop)
            known.update({one.row: one.token_ids for one in found})
        return known

    return answer


def rows_of(
    batch: Batch, examples: Sequence[Example], replies: dict[int, Sequence[int]], widths: tuple[int, int], mesh: Mesh
) -> Rows:
    """A batch of prefixes with what follows them, on the devices.

    Args:
        batch: prefixes; its rows are those in front.
        examples: N rows with prefixes.
        replies: answer of each row as tokens; where it is empty, the first token is scored all the same.
        widths: tokens behind a prefix, and places scored, at most.
        mesh: devices.
    """
    size = len(batch.rows)
    suffix, ends = np.zeros((size, widths[0]), np.int32), batch.lengths + 1
    at, scored = np.zeros((size, widths[1]), np.int32), np.zeros((size, widths[1]), bool)
    for slot, row in enumerate(batch.rows):
        if row == len(examples):
            continue
        one, reply = examples[row], replies[int(row)]
        rest = one.token_ids[one.prefix_length : one.prompt_length]
        count, places = len(rest) + len(reply), max(1, len(reply))
        suffix[slot, :count] = [*rest, *reply]
        ends[slot] = one.prefix_length + count
        at[slot, :places], scored[slot, :places] = len(rest) - 1 + np.arange(places), True
    given = Rows(batch.tokens, batch.lengths, suffix, ends.astype(np.int32), at, scored)  # type: ignore[arg-type]
    return jax.device_put(given, batch_sharding(mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def places(rows: Rows, mesh: Mesh) -> jax.Array:
    """Positions of the suffix's tokens, ``[B, Tq]``: behind each row's own prefix."""
    at = rows.heads[:, None] + jnp.arange(rows.suffix.shape[1], dtype=jnp.int32)
    return jax.lax.with_sharding_constraint(at, batch_sharding(mesh))


@functools.partial(jax.jit, static_argnames=("room", "mesh"))
def read_step(
    blocks: Block, layer: jax.Array, x: jax.Array, context: Context, room: int, mesh: Mesh
) -> tuple[jax.Array, Cache]:
    """One layer over a prefix: the stream behind it, and its keys and values ``[1, B, room, K, head_dim]``."""
    config = blocks.config
    empty = jnp.zeros((1, len(x), room, config.num_kv_heads, config.head_dim), x.dtype)
    x, kept = _layer(blocks, layer, x, context, Cache(empty, empty), mesh)
    return x, jax.lax.with_sharding_constraint(kept, cache_sharding(config, mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def answer_step(blocks: Block, layer: jax.Array, x: jax.Array, context: Context, cache: Cache, mesh: Mesh) -> jax.Array:
    """One layer over a suffix, behind a prefix whose keys and values are in the cache."""
    return _layer(blocks, layer, x, context, cache, mesh)[0]


def _layer(
    blocks: Block, layer: jax.Array, x: jax.Array, context: Context, cache: Cache, mesh: Mesh
) -> tuple[jax.Array, Cache]:
    windows = layer_windows(blocks.config)
    mine = None if windows is None else windows[layer][None]
    out = run_span(blocks, layer[None], x, context, 0, 1, windows=mine, cache=cache)
    return jax.lax.with_sharding_constraint(out.hidden, batch_sharding(mesh)), out.cache


@functools.partial(jax.jit, static_argnames="mesh")
def apart_step(theirs: Cache, own: Cache, heads: jax.Array, mesh: Mesh) -> jax.Array:
    """`DISTANCES` ``[5, B]`` of one layer's keys and values, over the real tokens of each prefix."""
    real = (jnp.arange(own.keys.shape[2]) < heads[:, None])[None, :, :, None, None]
    found, same = [], jnp.ones(len(heads), bool)
    for one, other in ((theirs.keys, own.keys), (theirs.values, own.values)):
        for array in (one - other, other):
            squares = jnp.square(array.astype(jnp.float32))
            found.append(jnp.sum(jnp.where(real, squares, 0), axis=(0, 2, 3, 4)))
        same &= jnp.all((one == other) | ~real, axis=(0, 2, 3, 4))
    return _everywhere(jnp.stack([*found, same.astype(jnp.float32)]), mesh)


@jax.jit
def pick_step(x: jax.Array, at: jax.Array) -> jax.Array:
    """The stream ``[B, T, D]`` at places ``[B, A]``."""
    return jnp.take_along_axis(x, at[..., None], axis=1)


@functools.partial(jax.jit, static_argnames="mesh")
def compare_step(decoder: Decoder, own: jax.Array, other: jax.Array, scored: jax.Array, mesh: Mesh) -> jax.Array:
    """`MEASURES` ``[4, B]`` of the stream ``[B, A, D]`` of a variant beside that of the receiver over its own cache."""
    ours, theirs = (logits(decoder, hidden).astype(jnp.float32) for hidden in (own, other))
    same = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
    count = jnp.maximum(scored.sum(axis=1), 1)
    apart = jnp.where(scored, divergence(ours, theirs), 0).sum(axis=1) / count
    found = [apart, (same & scored).sum(axis=1) / count, ~same[:, 0], (~same & scored).any(axis=1)]
    return _everywhere(jnp.stack([one.astype(jnp.float32) for one in found]), mesh)


def _everywhere(array: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def compiled_layers() -> int:
    """How many programs the blocks have compiled to in this process: one on prefixes and one on suffixes a bucket."""
    return read_step._cache_size() + answer_step._cache_size()  # type: ignore[attr-defined]
