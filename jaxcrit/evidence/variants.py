"""The loss of many variants of one model, each a change from some layer on: what they share is run once.

A variant that departs from the reference at layer s has the reference's hidden state in front of s. The variants are
run in the order of s; the reference's state is carried upwards beside them, a layer at a time, and a variant runs only
the layers from s on. All single layers, or all windows of layers, then cost about half of a full forward pass each, and
the reference's own loss nothing more. Which block runs where, and from where, is data: one compile per batch shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.evaluation.losses import response_exact
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block, Context, layer_windows, look_up, run_span
from jaxcrit.models.sites import Edit
from jaxcrit.training.objectives import TokenBatch

_PRECISION = "highest"  # differences between variants are small; only this makes float32 exact on TPU and recent GPUs


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One model of a sweep.

    Attributes:
        slots: ``[L, 2]`` int32, whose attention and whose MLP runs at each layer.
        edits: data of the edit, arrays ``[L, ...]``, or None.
        start: first layer at which it differs from the reference; L where it is the reference.
    """

    slots: np.ndarray
    edits: Any = None
    start: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Swept:
    """Losses of one batch.

    Attributes:
        losses: ``[V, B]`` float32, nats summed over each row's response.
        exact: ``[V, B]`` bool, whether greedy decoding would give the row's response.
        tokens: ``[B]`` int, of each row's response; 0 for a row that fills up the batch.
        evaluations: how many times a block was run on the batch.
    """

    losses: np.ndarray
    exact: np.ndarray
    tokens: np.ndarray
    evaluations: int


def sweep(
    blocks: Block,
    outside: Mapping[str, jax.Array],
    reference: Variant,
    variants: Sequence[Variant],
    batch: TokenBatch,
    *,
    edit: Edit | None = None,
    offset: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> Swept:
    """Runs all variants on one batch.

    Memory: the weights and, of the batch, the reference's hidden state and one variant's, ``[B, T, D]`` each.

    Args:
        blocks: stack that the slots point into.
        outside: ``embed``, ``norm`` and, where not tied, ``head``; of all variants.
        reference: what the variants are departures from; its ``start`` has no meaning.
        variants: in any order.
        batch: on the devices.
        edit: see `jaxcrit.models.decoder.run`; its function stays the same object, or it compiles anew.
        offset: ``[B, T, D]`` added to the embeddings of every variant and of the reference.
        progress: called with the number of block evaluations just done.
    """
    config, depth = blocks.config, blocks.config.num_layers
    tokens, lengths = batch.tokens, batch.lengths
    rows = everywhere = None
    if isinstance(tokens.sharding, NamedSharding):  # of several processes, each sees its own devices only
        rows, everywhere = tokens.sharding, NamedSharding(tokens.sharding.mesh, PartitionSpec())
    losses: list[Any] = [None] * len(variants)
    exact: list[Any] = [None] * len(variants)
    at = evaluations = 0
    with jax.default_matmul_precision(_PRECISION):
        state, context = enter(outside["embed"], tokens, lengths, config, rows, offset)

        def span(variant: Variant, x: jax.Array, start: int, stop: int) -> jax.Array:
            nonlocal evaluations
            if start == stop:
                return x
            evaluations += stop - start
            return span_step(blocks, variant.slots, x, context, np.int32(start), np.int32(stop), variant.edits, edit)

        for place in sorted(range(len(variants)), key=lambda place: variants[place].start):
            variant, before = variants[place], evaluations
            state, at = span(reference, state, at, variant.start), variant.start
            hidden = span(variant, state, at, depth)
            losses[place], counts, exact[place] = loss_step(outside, hidden, batch, config, everywhere)
            if progress is not None:
                losses[place].block_until_ready()
                progress(evaluations - before)
    summed, right, counted = jax.device_get((jnp.stack(losses), jnp.stack(exact), counts))
    return Swept(summed, right, counted.astype(np.int64), evaluations)


def own_slots(num_layers: int) -> np.ndarray:
    """Slots ``[L, 2]`` of a model in whose stack every layer stands at its own place."""
    layers = np.arange(num_layers, dtype=np.int32)
    return np.stack([layers, layers], axis=1)


def planned_evaluations(variants: Sequence[Variant], num_layers: int) -> int:
    """How often `sweep` runs a block on a batch: every variant's own layers, and the reference's up to the last."""
    return sum(num_layers - variant.start for variant in variants) + max(variant.start for variant in variants)


def evaluation_counts(
    variants: Sequence[Variant], num_layers: int, batches: int, others: Mapping[str, int]
) -> dict[str, Any]:
    """What a sweep of all batches cost, as ``run.json`` has it; ``others`` are block evaluations beside it, by name."""
    planned = planned_evaluations(variants, num_layers)
    each = {"sweep": planned, "forward_passes": planned / num_layers, "a_pass_each": len(variants) * num_layers}
    return {**each, **others, "batches": batches}


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def enter(
    table: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    config: ModelConfig,
    rows: NamedSharding | None,
    offset: jax.Array | None = None,
) -> tuple[jax.Array, Context]:
    """What the first block is given: embeddings ``[B, T, D]`` of tokens ``[B, T]``, placed as ``rows``; the context.

    An ``offset`` ``[B, T, D]`` is added to the embeddings.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = look_up(table, tokens, config)
    x = x if offset is None else x + offset.astype(x.dtype)
    if rows is not None:  # XLA left to itself splits the width, as the table is split, and keeps all rows everywhere
        x = jax.lax.with_sharding_constraint(x, rows)
    return x, Context(positions, *config.rope.cos_sin(positions, lengths))


@functools.partial(jax.jit, static_argnames="edit")
def span_step(
    blocks: Block, slots: Any, x: jax.Array, context: Context, start: Any, stop: Any, edits: Any, edit: Edit | None
) -> jax.Array:
    """One variant's layers ``start`` to ``stop`` on a batch; arguments as of `run_span`."""
    windows = layer_windows(blocks.config)
    out = run_span(blocks, jnp.asarray(slots), x, context, start, stop, windows=windows, edit=edit, edits=edits)
    return out.hidden


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def loss_step(
    outside: Mapping[str, jax.Array],
    hidden: jax.Array,
    batch: TokenBatch,
    config: ModelConfig,
    sharding: NamedSharding | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[B]`` losses summed over each row's response, ``[B]`` tokens of it, and whether it is exact."""
    head = outside.get("head", outside["embed"])
    mesh = None if sharding is None else sharding.mesh
    given = (hidden, outside["norm"], head, batch.tokens, batch.learn)
    losses, counted, exact = response_exact(*given, config, mesh, batch.scored)
    sums = losses.sum(axis=1), counted.sum(axis=1), exact
    return sums if sharding is None else jax.lax.with_sharding_constraint(sums, sharding)


def compiled_spans() -> int:
    """How many programs the blocks have compiled to in this process: one per batch shape, model shape and edit."""
    return span_step._cache_size()  # type: ignore[attr-defined]
