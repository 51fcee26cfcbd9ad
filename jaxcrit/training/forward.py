"""The forward pass over a bank: blocks of several groups, in the order of their layers.

Two forms compute the same numbers (bit for bit on the model below, to a last bit where XLA fuses otherwise):

- ``runs``: layers of one group that follow each other are one scan. Right for a few runs; XLA inlines a scan of one
  step, and on CPU the recomputation inside is then lost (a scattered five of 32 layers: 242 MiB of temporaries).
- ``gaps``: up to the lowest trained layer one scan, then one scan over the trained layers, each followed by the
  frozen ones up to the next, padded to the longest such gap with steps that do nothing (104 MiB, same time; the
  model is that of tests/training/test_memory.py). Gradients come out stacked, not summed over the scan, which is
  what makes one scan that picks its block by `lax.cond` (130 MiB) 1.4 times slower.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.models.decoder import Block, Context, layer_windows, look_up, run
from jaxcrit.models.partition import FROZEN, Arrays, Bank, Partition, Run
from jaxcrit.models.sites import Edit, Site, Tap, Visit, visitor
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding

Form = Literal["runs", "gaps"]
Edited = tuple[Edit, Any]  # an edit and its data, arrays [L, ...]


def choose_form(partition: Partition) -> Form:
    """``gaps`` where trained layers are scattered, unless padding the gaps would keep more than it saves."""
    trained = [layer for layer, group in enumerate(partition.groups) if group != FROZEN]
    islands = sum(run.group != FROZEN for run in partition.runs())
    if len(partition.trained) > 1 or islands < 3:
        return "runs"
    return "gaps" if len(trained) * max(_gaps(partition)) <= 2 * len(partition.groups) else "runs"


def hidden_states(
    partition: Partition,
    bank: Bank,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    dtype: Any,
    remat: bool = True,
    form: Form | None = None,
    mesh: AnyMesh | None = None,
    stop: int | None = None,
    edit: Edited | None = None,
    offset: jax.Array | None = None,
) -> jax.Array:
    """Runs tokens through the model, or through its first layers.

    Args:
        partition: partition of the bank.
        bank: all groups.
        tokens: ``[B, T]`` int32, right padded.
        lengths: ``[B]`` int32 true lengths.
        dtype: compute dtype.
        remat: recompute blocks in the backward pass instead of keeping their insides.
        form: see above; default `choose_form`.
        mesh: splits the residual stream over it; XLA left to itself splits the width and keeps all rows.
        stop: layers to run, from the first on, always as ``runs``; default all of them.
        edit: changes the stream at sites inside the blocks, and its data; it is part of what gradients are taken of.
        offset: ``[B, T, D]`` added to the embeddings, or None.

    Returns:
        ``[B, T, D]``, the residual stream after the last block that runs.
    """
    if stop is None and (form or choose_form(partition)) == "gaps":
        x, context = _entering(partition, bank, tokens, lengths, dtype, mesh, offset)
        return _gap_form(partition, bank, x, context, remat, edit)
    stop = partition.config.num_layers if stop is None else stop
    how: dict[str, Any] = {"dtype": dtype, "remat": remat, "mesh": mesh, "edit": edit, "offset": offset}
    return layer_states(partition, bank, tokens, lengths, [stop - 1], **how)[0][stop - 1]


def layer_states(
    partition: Partition,
    bank: Bank,
    tokens: jax.Array,
    lengths: jax.Array,
    layers: Collection[int],
    *,
    dtype: Any,
    remat: bool = True,
    mesh: AnyMesh | None = None,
    edit: Edited | None = None,
    offset: jax.Array | None = None,
    tap: Tap | None = None,
) -> tuple[dict[int, jax.Array], list[dict[str, Any]]]:
    """Residual stream after some layers from one pass up to the highest, as ``runs``; and what a tap read on the way.

    Args:
        partition: partition of the bank.
        bank: all groups.
        tokens: ``[B, T]`` int32, right padded.
        lengths: ``[B]`` int32 true lengths.
        layers: 0-based; -1 for the embeddings.
        dtype: see `hidden_states`.
        remat: see `hidden_states`.
        mesh: see `hidden_states`.
        edit: see `hidden_states`.
        offset: see `hidden_states`.
        tap: reads the stream at sites inside the blocks.

    Returns:
        States ``[B, T, D]`` by layer; and by run of layers, in order, what the tap returned at its sites ``[n, ...]``.
    """
    x, context = _entering(partition, bank, tokens, lengths, dtype, mesh, offset)
    how: dict[str, Any] = {"remat": remat, "edit": edit}
    found, taps, start = dict[int, jax.Array](), list[dict[str, Any]](), 0
    for stretch in _stretches(partition, layers, apart=tap is not None and "block" in tap.sites):
        alone = len(stretch) == 1
        x, read = _run_form(partition, bank, x, context, start, stretch.start + alone, tap=tap, **how)
        taps, start = [*taps, *read], stretch.stop
        if alone:
            found[stretch[0]] = x
            continue
        span = (stretch.start, stretch.stop)
        x, (inside,) = _run_form(partition, bank, x, context, *span, tap=_with_states(tap), **how)
        found |= dict(zip(stretch, inside.pop("block"), strict=True))
        taps.append(inside)
    return found, taps


def _stretches(partition: Partition, layers: Collection[int], *, apart: bool) -> list[range]:
    """Layers to read, those that follow each other within a run as one: a scan gives the states of all its steps.

    Cut into a scan for each layer, the run's weights would have a gradient of full size for each of them: 23.4 GiB of
    temporary memory instead of 2.2 for all 30 layers of SmolLM2-135M's shape, 4 rows of 64 tokens.

    Args:
        partition: gives the runs.
        layers: see `layer_states`.
        apart: whether each layer is to stay by itself.
    """
    run_of = {layer: number for number, run in enumerate(partition.runs()) for layer in run.layers}
    found: list[range] = []
    for layer in sorted(layers):
        before = found[-1] if found else range(0)
        if not apart and before and before.stop == layer and run_of.get(before[-1]) == run_of[layer]:
            found[-1] = range(before.start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def _with_states(tap: Tap | None) -> Tap:
    """A tap that reads the stream behind each block too."""
    if tap is None:
        return Tap(lambda site, before, after, positions: after, ("block",))

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> Any:
        return after if site == "block" else tap.read(site, before, after, positions)

    return Tap(read, (*tap.sites, "block"))


def _entering(
    partition: Partition,
    bank: Bank,
    tokens: jax.Array,
    lengths: jax.Array,
    dtype: Any,
    mesh: AnyMesh | None,
    offset: jax.Array | None,
) -> tuple[jax.Array, Context]:
    """The stream that enters the first block, and what all blocks share."""
    config = partition.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    context = Context(positions, *config.rope.cos_sin(positions, lengths))
    with jax.named_scope("embed"):
        x = look_up(outside(bank, "embed"), tokens, config, dtype)
        x = x if offset is None else x + offset.astype(x.dtype)
        if mesh is not None:
            x = jax.lax.with_sharding_constraint(x, _between_blocks(mesh, tokens.shape[1]))
    return x, context


def outside(bank: Bank, path: str) -> jax.Array:
    """A weight outside the blocks, whichever group it is in."""
    return next(entries[path] for entries in bank.values() if path in entries)


def _between_blocks(mesh: AnyMesh, length: int) -> NamedSharding:
    """Rows over ``data`` and ``fsdp``, positions over ``tensor``: what the backward pass needs is split by all."""
    rows = batch_sharding(mesh).spec[0]
    return NamedSharding(mesh, PartitionSpec(rows, None if length % mesh.shape["tensor"] else "tensor"))


def _run_form(
    partition: Partition,
    bank: Bank,
    x: jax.Array,
    context: Context,
    start: int,
    stop: int,
    *,
    remat: bool,
    edit: Edited | None = None,
    tap: Tap | None = None,
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """The stream after layers ``start`` to ``stop`` (half-open), and what the tap returned, run by run."""
    rest = _stack(partition, bank[FROZEN])
    taps: list[dict[str, Any]] = []
    for whole in partition.runs():
        low, high = max(whole.layers.start, start), min(whole.layers.stop, stop)
        if low >= high:
            continue
        part = Run(whole.group, whole.slot + low - whole.layers.start, range(low, high))
        how: dict[str, Any] = {"windows": layer_windows(partition.config, part.layers), "remat": remat, "tap": tap}
        if edit is not None:
            how |= {"edit": edit[0], "edits": _of_layers(edit, part.layers)}
        if part.group == FROZEN:
            out = run(rest, jnp.asarray(part.slots), x, context, **how)
            x, taps = out.hidden, [*taps, out.taps]
            continue
        own = _own(partition, bank[part.group])
        if len(part.layers) < len(partition.members(part.group)):
            own = jax.tree.map(lambda leaf, part=part: leaf[part.slots[0] : part.slots[-1] + 1], own)
        if isinstance(own, Block):
            out = run(own, None, x, context, **how)
        else:
            base = jnp.asarray(part.layers)
            out = run(rest, base, x, context, adapters=own, **how)
        x, taps = out.hidden, [*taps, out.taps]
    return x, taps


def _gap_form(
    partition: Partition, bank: Bank, x: jax.Array, context: Context, remat: bool, edit: Edited | None
) -> jax.Array:
    config, (group,) = partition.config, partition.trained
    trained, frozen = partition.members(group), partition.blocks(FROZEN)
    own, rest = _own(partition, bank[group]), _stack(partition, bank[FROZEN])
    below = range(trained[0])
    if below:
        windows = layer_windows(config, below)
        how: dict[str, Any] = {} if edit is None else {"edit": edit[0], "edits": _of_layers(edit, below)}
        x = run(rest, jnp.arange(len(below)), x, context, windows=windows, remat=remat, **how).hidden
    gaps = _gaps(partition)
    longest = max(gaps)
    steps = np.arange(longest)
    live = steps < np.asarray(gaps)[:, None]
    # The slot of the first frozen layer behind each trained one: those before it are not among them, unless by adapter.
    first = [layer + 1 if partition.lora else layer - i for i, layer in enumerate(trained)]
    slots = np.minimum(np.asarray(first)[:, None] + steps, len(frozen) - 1)
    windows = layer_windows(config, trained)
    between = None if windows is None else layer_windows(config, frozen)
    edits = _of_layers(edit, trained), _of_layers(edit, frozen)

    def visits(data: Any) -> Visit | None:
        return None if edit is None else visitor(edit[0], data, None, context.positions)[0]

    def frozen_block(slot: jax.Array) -> Block:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), rest)

    def skip_or_run(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        slot, real = at

        def through(x: jax.Array) -> jax.Array:
            window, data = jax.tree.map(lambda leaf: leaf[slot], (between, edits[1]))
            return frozen_block(slot)(x, context, window, visit=visits(data))[0]

        return jax.lax.cond(real, through, lambda x: x, x), None

    def trained_then_gap(x: jax.Array, step: Any) -> tuple[jax.Array, None]:
        own, layer, window, slots, real, data = step

        def through(own: Any, x: jax.Array) -> jax.Array:
            block = own if isinstance(own, Block) else frozen_block(layer).beside(own)
            return block(x, context, window, visit=visits(data))[0]

        x = kept(through)(own, x)
        return jax.lax.scan(kept(skip_or_run), x, (slots, real))[0], None

    def kept(function: Any) -> Any:
        return jax.checkpoint(function) if remat else function

    each = (own, jnp.asarray(trained), windows, jnp.asarray(slots), jnp.asarray(live), edits[0])
    return jax.lax.scan(trained_then_gap, x, each)[0]


def _of_layers(edit: Edited | None, layers: Sequence[int]) -> Any:
    """The data of an edit, of some layers."""
    at = np.asarray(layers, np.int32)
    return None if edit is None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[at], edit[1])


def _gaps(partition: Partition) -> list[int]:
    """By trained layer, how many frozen ones follow before the next."""
    trained = [layer for layer, group in enumerate(partition.groups) if group != FROZEN]
    return [after - layer - 1 for layer, after in zip(trained, [*trained[1:], len(partition.groups)], strict=True)]


def _own(partition: Partition, entries: Arrays) -> Block | dict[str, jax.Array]:
    """What a trained group has of its layers: the blocks, or their adapters."""
    return _stack(partition, entries) if partition.lora is None else partition.lora.scaled(entries)


def _stack(partition: Partition, entries: Arrays) -> Block:
    inside = {path.removeprefix("blocks."): value for path, value in entries.items() if path.startswith("blocks.")}
    return Block(partition.config, inside)
