"""Generation with a key/value cache: one compiled prefill and one compiled loop per (batch, prompt length, new tokens).

The prefill fills the cache; the loop begins with the last prompt token, so every token whose successor is wanted
passes through one and the same compiled step. An edit (`jaxcrit.models.interventions`) acts in that step alone, that is
from the last prompt token on, and one prefill serves any number of edits.
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

from jaxcrit.core.errors import UserError
from jaxcrit.models.cache import Cache
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.flat import flat_blocks, flat_cache
from jaxcrit.models.sampling import Sampling, pick
from jaxcrit.models.sites import Edit, Site
from jaxcrit.parallel.mesh import RULES, AnyMesh, batch_sharding, spec_for

GREEDY = Sampling()
# New tokens from which on blocks are taken apart.
APART = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts, and what the model's layers keep of them.

    Attributes:
        tokens: ``[B, T]`` int32, right padded.
        lengths: ``[B]`` int32.
        cache: cache of ``T + max_new_tokens`` positions.
        max_new_tokens: there is room for.
        mesh: devices, or None for wherever the model is.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Cache
    max_new_tokens: int
    mesh: Mesh | None


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """Continuations.

    Attributes:
        token_ids: new tokens of each prompt; the ending token is not part of them.
        stopped: ``[B]`` bool, whether an ending token came; else ``max_new_tokens`` were reached.
        scores: ``[B, V]`` float32 logits of the first new token, on the device.
    """

    token_ids: list[list[int]]
    stopped: np.ndarray
    scores: jax.Array


def generate(
    decoder: Decoder,
    tokens: np.ndarray,
    lengths: np.ndarray,
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    samples: np.ndarray | None = None,
    edit: Edit | None = None,
    edits: Any = None,
    mesh: Mesh | None = None,
) -> Generated:
    """Continues every prompt.

    A row's answer depends on its prompt, the seed and its number in ``samples`` alone, never on the batch around it.
    Models with longrope take the other frequencies as soon as a row's own sequence passes the boundary, and its cache
    is then computed anew (as transformers does for Phi-3, there by the longest row of a batch).

    Args:
        decoder: the model.
        tokens: ``[B, T]`` int prompts, right padded.
        lengths: ``[B]`` int, real tokens of each prompt.
        max_new_tokens: how many to add at most.
        stop: token ids that end a continuation.
        sampling: how tokens are picked; greedily by default.
        seed: seed of the draws.
        samples: ``[B]`` int, a number for each row that its draws follow from; default 0..B-1. A negative one marks a
            row that only fills up the batch, and for which nobody waits.
        edit: changes the residual stream of the last prompt token and of each new one; see `run`.
        edits: its data, leaves ``[L, ...]``.
        mesh: rows are split over its ``data`` and ``fsdp`` axes; None leaves them where the model is.

    Raises:
        UserError: prompt and new tokens do not fit the model's context.
    """
    prompts = prefill(decoder, tokens, lengths, max_new_tokens, mesh=mesh)
    return decode(decoder, prompts, stop=stop, sampling=sampling, seed=seed, samples=samples, edit=edit, edits=edits)


def prefill(
    decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int, *, mesh: Mesh | None = None
) -> Prefilled:
    """Runs the prompts; arguments and errors as of `generate`."""
    longest = int(np.max(lengths)) + max_new_tokens
    if longest > decoder.config.max_length:
        raise UserError(
            f"prompt and new tokens need {longest} positions, the model has {decoder.config.max_length}; lower"
            " --max_new_tokens, or cut the prompts with --truncate=left"
        )
    prompts, ends = (jax.device_put(np.asarray(array, np.int32), _rows(mesh)) for array in (tokens, lengths))
    return Prefilled(prompts, ends, prefill_step(decoder, prompts, ends, max_new_tokens, mesh), max_new_tokens, mesh)


def decode(
    decoder: Decoder,
    prompts: Prefilled,
    *,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    samples: np.ndarray | None = None,
    edit: Edit | None = None,
    edits: Any = None,
    first: Any = None,
) -> Generated:
    """Continues prompts that have been run. The prompts can be continued again.

    ``first`` is the data of the edit at the last prompt token, which the first new token is read from (default:
    ``edits``, which is that of the tokens after it); other arguments as of `generate`.
    """
    numbers = np.arange(len(prompts.lengths)) if samples is None else samples
    places = jax.device_put(np.asarray(numbers, np.int32), _rows(prompts.mesh))
    new, done, scores = decode_step(
        decoder,
        prompts.tokens,
        prompts.lengths,
        prompts.cache,
        np.asarray(stop, np.int32),
        jax.random.key(seed),
        places,
        edits,
        first=edits if first is None else first,
        max_new_tokens=prompts.max_new_tokens,
        sampling=sampling,
        edit=edit,
        mesh=prompts.mesh,
        apart=blocks_apart(prompts.max_new_tokens, prompts.mesh),
    )
    rows = []
    for row in np.asarray(new):
        ends = np.flatnonzero(np.isin(row, np.asarray(stop)))
        rows.append([int(token) for token in (row[: ends[0]] if len(ends) else row)])
    return Generated(rows, np.asarray(done), scores)


def blocks_apart(max_new_tokens: int, mesh: Mesh | None) -> bool:
    """Whether the loop runs over `flat_blocks`: on one CPU, and for tokens enough to be worth their compile.

    The number of tokens asked for decides alone, so that the same request always runs the same program.
    """
    one = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
    return one and max_new_tokens >= APART


def compiled_programs() -> tuple[int, int]:
    """How many prefills and how many loops have compiled in this process: at most one of each per bucket."""
    return prefill_step._cache_size(), decode_step._cache_size()  # type: ignore[attr-defined]


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def prefill_step(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, max_new_tokens: int, mesh: Mesh | None
) -> Cache:
    """The cache of prompts ``[B, T]`` with room for the new tokens."""
    empty = dataclasses.replace(empty_cache(decoder, *tokens.shape, max_new_tokens, mesh), fresh=True)
    found = forward(decoder, tokens, lengths=lengths, cache=empty, mesh=mesh).cache
    assert found is not None
    return dataclasses.replace(found, fresh=False)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "sampling", "edit", "mesh", "apart"))
def decode_step(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    stop: jax.Array,
    key: jax.Array,
    samples: jax.Array,
    edits: Any,
    *,
    first: Any = None,
    max_new_tokens: int,
    sampling: Sampling,
    edit: Edit | None,
    mesh: Mesh | None,
    apart: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New tokens ``[B, new]``, whether each row was ended by a stop token, and the first scores ``[B, V]``."""
    batch, length = tokens.shape
    rows, boundary = jnp.arange(batch), decoder.config.rope.boundary or 0
    crosses = 0 < boundary < length + max_new_tokens
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, samples)
    vocabulary = decoder.config.vocab_size
    blocks = flat_blocks(decoder.blocks) if apart else None
    kept = flat_cache(cache) if apart else cache

    def rerun(step: jax.Array, new: jax.Array, cache: Any) -> Any:
        """The cache of rows that pass the boundary now, computed anew with the frequencies of long sequences."""
        at = lengths[:, None] + jnp.arange(max_new_tokens)
        so_far = jnp.pad(tokens, ((0, 0), (0, max_new_tokens))).at[rows[:, None], at].set(new)
        some = None if edit is None else _from_position(edit, lengths - 1)
        known = {"cache": cache, "blocks": blocks, "edit": some, "edits": (first, edits), "mesh": mesh}
        out = forward(decoder, so_far, lengths=lengths + step, **known)
        passes = (lengths + step == boundary + 1)[:, None, None, None]
        return jax.tree.map(lambda fresh, old: jnp.where(passes, fresh, old), out.cache, cache)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, _, _, done, _, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, cache, done, new, seen, begun = state
        if crosses:
            passing = (step > 0) & jnp.any(lengths + step == boundary + 1)
            cache = jax.lax.cond(passing, rerun, lambda _, __, cache: cache, step, new, cache)
        positions = (lengths - 1 + step)[:, None].astype(jnp.int32)
        ends = lengths + step
        now = jax.tree.map(lambda one, other: jnp.where(step == 0, one, other), first, edits)
        known = {"cache": cache, "blocks": blocks, "edit": edit, "edits": now, "mesh": mesh}
        out = forward(decoder, token[:, None], positions=positions, lengths=ends, **known)
        scores = logits(decoder, out.hidden[:, 0]).astype(jnp.float32)
        token = pick(scores, seen, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        if sampling.repetition_penalty != 1:
            seen = seen.at[rows, token].set(True)
        new = new.at[:, step].set(token)
        done = done | jnp.any(token[:, None] == stop, axis=1)
        return step + 1, token, out.cache, done, new, seen, jnp.where(step == 0, scores, begun)

    seen = jnp.zeros((batch, vocabulary if sampling.repetition_penalty != 1 else 0), bool)
    real = jnp.arange(length) < lengths[:, None]
    seen = seen.at[rows[:, None], jnp.where(real, tokens, vocabulary)].set(True, mode="drop")
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    new = jnp.zeros((batch, max_new_tokens), jnp.int32)
    begun = jnp.zeros((batch, vocabulary), jnp.float32)
    state = (jnp.int32(0), last, kept, samples < 0, new, seen, begun)
    _, _, _, done, new, _, begun = jax.lax.while_loop(unfinished, advance, state)
    if mesh is not None:  # every process reads all rows
        new, done = jax.lax.with_sharding_constraint((new, done), NamedSharding(mesh, PartitionSpec()))
    return new, done, begun


def _from_position(edit: Edit, first: jax.Array) -> Edit:
    """The edit, at position ``first`` ``[B]`` with the first of two data, behind it with the second, not before it."""

    def change(site: Site, before: jax.Array, after: jax.Array, data: Any, positions: jax.Array) -> jax.Array:
        begun, later = (edit.change(site, before, after, one, positions) for one in data)
        behind = (positions - first[:, None])[..., None]
        return jnp.where(behind == 0, begun, jnp.where(behind > 0, later, after))

    return Edit(change, edit.sites)


def _rows(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else batch_sharding(mesh)


@functools.partial(jax.jit, static_argnames=("batch", "length", "room", "mesh"))
def empty_cache(decoder: Decoder, batch: int, length: int, room: int, mesh: Mesh | None) -> Cache:
    """A cache for prompts of ``length`` tokens and ``room`` more."""
    config = decoder.config
    shape = (config.num_layers, batch, length + room, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros(shape, decoder.embed[...].dtype)
    if mesh is not None:
        empty = jax.lax.with_sharding_constraint(empty, cache_sharding(config, mesh))
    return Cache(empty, empty)


def cache_sharding(config: ModelConfig, mesh: AnyMesh) -> NamedSharding:
    """Of the arrays of a cache: rows as the prompts, heads as their weights."""
    heads = spec_for(("kv_heads",), (config.num_kv_heads,), mesh, "cache")[0]
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"], None, heads, None))
