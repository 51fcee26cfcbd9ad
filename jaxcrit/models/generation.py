"""Greedy generation with a key/value cache: one compile per (batch, prompt length, new tokens)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.models.decoder import Cache, Decoder, forward, logits


def greedy(
    decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int, *, stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """Continues every prompt with its most likely tokens.

    Args:
        decoder: the model.
        tokens: ``[B, T]`` int prompts, right padded.
        lengths: ``[B]`` int, real tokens of each prompt.
        max_new_tokens: how many to add at most.
        stop: token ids that end a continuation; the ending token is not part of it.

    Returns:
        B lists of new token ids.

    Raises:
        UserError: the context of the model is too short, or a longrope boundary would be crossed.
    """
    longest = int(np.max(lengths)) + max_new_tokens
    rope = decoder.config.rope
    if longest > decoder.config.max_length:
        raise UserError(f"prompt and new tokens need {longest} positions, the model has {decoder.config.max_length}")
    if rope.boundary is not None and int(np.min(lengths)) <= rope.boundary < longest:
        raise UserError(f"generation would cross the model's RoPE boundary at {rope.boundary} tokens; ask for fewer")
    found = _greedy(decoder, jnp.asarray(tokens), jnp.asarray(lengths), max_new_tokens, tuple(stop))
    rows = []
    for row in np.asarray(found):
        ends = np.flatnonzero(np.isin(row, stop))
        rows.append([int(token) for token in (row[: ends[0]] if len(ends) else row)])
    return rows


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop"))
def _greedy(decoder: Decoder, tokens: jax.Array, lengths: jax.Array, max_new_tokens: int, stop: tuple[int, ...]) -> Any:
    batch, length = tokens.shape
    config = decoder.config
    shape = (config.num_layers, batch, length + max_new_tokens, config.num_kv_heads, config.head_dim)
    dtype = decoder.embed[...].dtype
    prompt = forward(decoder, tokens, lengths=lengths, cache=Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    last = jnp.take_along_axis(prompt.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    endings = jnp.asarray(stop, jnp.int32)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, _, _, done, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, hidden, cache, done, new = state
        token = jnp.argmax(logits(decoder, hidden), axis=-1).astype(jnp.int32)
        new = new.at[:, step].set(token)
        done = done | jnp.any(token[:, None] == endings, axis=1)
        positions = (lengths + step)[:, None].astype(jnp.int32)
        out = forward(decoder, token[:, None], positions=positions, lengths=lengths + step + 1, cache=cache)
        return step + 1, out.hidden[:, 0], out.cache, done, new

    filler = stop[0] if stop else 0
    new = jnp.full((batch, max_new_tokens), filler, jnp.int32)
    state = (0, last, prompt.cache, jnp.zeros(batch, bool), new)
    return jax.lax.while_loop(unfinished, advance, state)[-1]
