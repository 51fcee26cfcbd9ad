"""How the next token is picked: greedily or at random, with the options of transformers, in its order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcrit.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of one run; each changes scores ``[B, V]`` in the order in which they stand here.

    Attributes:
        repetition_penalty: scores of tokens already in prompt or answer are divided by it where positive, multiplied
            where negative; 1 for none.
        temperature: divides the scores; 0 is greedy, and then only the penalty above counts.
        top_k: only the k highest scores stay, and what ties with the k-th; 0 for all.
        top_p: only the smallest set of tokens whose probability exceeds it stays, and what ties with the least of it.

    Raises:
        UserError: a value out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise UserError(f"--repetition_penalty={self.repetition_penalty}: expected more than 0 (1 for none)")
        if not self.temperature >= 0:
            raise UserError(f"--temperature={self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k}: expected 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: expected more than 0 and at most 1 (all tokens)")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UserError("--top_k and --top_p choose what is drawn from; give a --temperature above 0 (1 leaves it)")


def pick(scores: jax.Array, seen: jax.Array, keys: jax.Array, options: Sampling) -> jax.Array:
    """Picks the next token of every row.

    Args:
        scores: ``[B, V]`` float32 logits.
        seen: ``[B, V]`` bool, tokens already in prompt or answer (read where there is a repetition penalty).
        keys: ``[B]`` random keys, one of its own for each row.
        options: static.

    Returns:
        ``[B]`` int32.
    """
    if options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if not options.temperature:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    scores = restrict(scores / options.temperature, options)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def restrict(scores: jax.Array, options: Sampling) -> jax.Array:
    """Sets what top-k and then top-p leave out to minus infinity; ``[B, V]`` both."""
    if 0 < options.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, options.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if options.top_p < 1:
        ascending = jnp.sort(scores, axis=-1)
        outside = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - options.top_p
        least = jnp.min(jnp.where(outside.at[:, -1].set(False), jnp.inf, ascending), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores
