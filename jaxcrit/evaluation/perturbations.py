"""Small changes of the embeddings that change most: how they are found, and how far each layer's states move.

A perturbation ``delta`` is added to the embedding output of every real token but the first, whose states are an
attention sink. Each token's is held to ``size`` times the norm of its own embedding, so a model cannot escape by
embeddings that grow. The ascent is projected gradient: from a random start on that sphere, each step goes a fraction of
the radius along each token's own normalised gradient and is put back into the ball; a row keeps the best of what it has
met, so nothing found is worse than its random start.

What a perturbation does to a layer is measured relative to the state of each token, for states grow along the residual
stream by themselves: 42 times at the first token of one layer of a real model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Objective = Callable[[jax.Array], jax.Array]  # perturbation [B, T, D] -> what is to grow, [B], of each row by itself
_Found = tuple[jax.Array, jax.Array]  # a perturbation, and what it gave


def perturbed_tokens(lengths: jax.Array, length: int) -> jax.Array:
    """``[B, T]`` bool, the real tokens but the first: those that are perturbed, and those that are measured."""
    at = jnp.arange(length)
    return (at > 0) & (at < lengths[:, None])


def row_keys(seed: jax.Array | int, numbers: jax.Array) -> jax.Array:
    """``[B]`` random keys, of a seed and the number of each row: the same in every batch and beside any padding."""
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)


def random_perturbation(x: jax.Array, tokens: jax.Array, keys: jax.Array, size: jax.Array | float) -> jax.Array:
    """A random direction for each token, of the whole length allowed, ``[B, T, D]`` float32.

    Args:
        x: ``[B, T, D]`` embedding output.
        tokens: ``[B, T]`` bool, tokens that are perturbed.
        keys: ``[B]`` random keys of the rows.
        size: length allowed, in units of the norm of the token's embedding.
    """
    drawn = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return drawn / _over(drawn) * _radius(x, tokens, size)


def find_perturbation(
    objective: Objective,
    x: jax.Array,
    tokens: jax.Array,
    keys: jax.Array,
    *,
    size: jax.Array | float,
    steps: int,
    stride: float = 0.3,
    restarts: int = 1,
) -> _Found:
    """Projected gradient ascent from random starts, each row by itself.

    It takes ``restarts`` times ``steps`` values with gradient and one value more.

    Args:
        objective: function of the perturbation that gives ``[B]`` float32, what is to grow; a row's may depend on that
            row's perturbation alone.
        x: ``[B, T, D]`` embedding output.
        tokens: ``[B, T]`` bool, tokens that are perturbed; 0 elsewhere.
        keys: ``[B]`` random keys of the rows.
        size: length allowed, in units of the norm of the token's embedding.
        steps: steps of the ascent; with none the best of the random starts is returned.
        stride: length of a step, in units of the length allowed.
        restarts: random starts.

    Returns:
        The perturbation that gave most, ``[B, T, D]`` float32, and what it gave, ``[B]``. No gradient goes through
        either.
    """
    x = jax.lax.stop_gradient(x)
    radius = _radius(x, tokens, size)

    def better(best: _Found, delta: jax.Array, value: jax.Array) -> _Found:
        wins = value > best[1]
        return jnp.where(wins[:, None, None], delta, best[0]), jnp.where(wins, value, best[1])

    def climb(carry: tuple[jax.Array, _Found], _: None) -> tuple[tuple[jax.Array, _Found], None]:
        delta, best = carry
        value, back = jax.vjp(objective, delta)
        (slope,) = back(jnp.ones_like(value))
        moved = delta + stride * radius * slope / _over(slope)
        moved *= jnp.minimum(1, radius / _over(moved))
        return (moved, better(best, delta, value)), None

    def start(best: _Found, number: jax.Array) -> tuple[_Found, None]:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        first = random_perturbation(x, tokens, own, size)
        (last, best), _ = jax.lax.scan(climb, (first, best), length=steps)
        return better(best, last, objective(last)), None

    nothing = jnp.zeros(x.shape, jnp.float32), jnp.full(x.shape[:1], -jnp.inf, jnp.float32)
    best, _ = jax.lax.scan(start, nothing, jnp.arange(restarts))
    return jax.lax.stop_gradient(best)


def relative_change(clean: jax.Array, perturbed: jax.Array, tokens: jax.Array) -> jax.Array:
    """How far states moved: the mean over a row's tokens of ``||h' - h|| / ||h||``, ``[..., B]`` float32.

    Differentiable, with a gradient of 0 where nothing moved.

    Args:
        clean: ``[..., B, T, D]``, h.
        perturbed: ``[..., B, T, D]``, h'.
        tokens: ``[B, T]`` bool, tokens that count; a row without any gives 0.
    """
    clean, perturbed = clean.astype(jnp.float32), perturbed.astype(jnp.float32)
    each = (norms(perturbed - clean) / _over(clean))[..., 0]
    return jnp.sum(jnp.where(tokens, each, 0), axis=-1) / jnp.maximum(tokens.sum(axis=-1), 1)


def norms(x: jax.Array) -> jax.Array:
    """Norms over the last axis, ``[..., 1]`` float32; where one is 0 its gradient is 0 too."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    there = squares > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, squares, 1)), 0)


def _over(x: jax.Array) -> jax.Array:
    """The same to divide by: never 0."""
    return jnp.maximum(norms(x), 1e-20)


def _radius(x: jax.Array, tokens: jax.Array, size: jax.Array | float) -> jax.Array:
    """Length allowed to each token, ``[B, T, 1]``; 0 where it is not to be perturbed."""
    return jnp.where(tokens[..., None], size * norms(x), 0)
