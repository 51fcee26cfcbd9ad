"""The ascent against one written out token by token in float64, and what holds of it whatever it climbs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrit.evaluation.perturbations import (
    find_perturbation,
    perturbed_tokens,
    random_perturbation,
    relative_change,
    row_keys,
)

SIZE, STRIDE = 0.1, 0.3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5, 4)).astype(np.float32)
MATRIX = RNG.normal(size=(4, 6)).astype(np.float32)
LENGTHS = np.array([5, 3, 2], np.int32)
TOKENS = perturbed_tokens(jnp.asarray(LENGTHS), 5)
KEYS = row_keys(7, jnp.array([4, 0, 9]))


def objective(delta):
    """Tokens of a row meet: a product over tokens of what a matrix and a bend make of each."""
    return jnp.sum(jnp.tanh((X + delta) @ MATRIX).sum(axis=1) ** 2, axis=-1)


def slope(x):
    """The gradient of the same for one row ``[T, D]``, in float64."""
    inner = np.tanh(x @ MATRIX)
    return (2 * inner.sum(axis=0) * (1 - inner**2)) @ MATRIX.T


@functools.cache
def found(steps, restarts=1):
    find = functools.partial(find_perturbation, objective, size=SIZE, steps=steps, stride=STRIDE, restarts=restarts)
    return jax.jit(find)(X, TOKENS, KEYS)


def starts(number):
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, number)
    return np.asarray(random_perturbation(X, TOKENS, keys, SIZE), np.float64)


def climbed(restarts, steps):
    """Row by row and token by token; the best of all that was met."""
    best = np.full(3, -np.inf)
    deltas = np.zeros(X.shape)
    for number in range(restarts):
        for row, delta in enumerate(starts(number)):
            x = X[row].astype(np.float64)
            for _ in range(steps + 1):
                value = (np.tanh((x + delta) @ MATRIX).sum(axis=0) ** 2).sum()
                if value > best[row]:
                    best[row], deltas[row] = value, delta
                gradient, moved = slope(x + delta), delta.copy()
                for token in range(1, LENGTHS[row]):
                    radius = SIZE * np.linalg.norm(x[token])
                    moved[token] += STRIDE * radius * gradient[token] / np.linalg.norm(gradient[token])
                    moved[token] *= min(1, radius / np.linalg.norm(moved[token]))
                delta = moved
    return deltas, best


@pytest.mark.parametrize(("restarts", "steps"), [(1, 0), (1, 5), (3, 4)])
def test_the_ascent_is_the_one_written_out(restarts, steps):
    deltas, values = climbed(restarts, steps)
    delta, value = found(steps, restarts=restarts)
    np.testing.assert_allclose(delta, deltas, rtol=0, atol=1e-5)
    np.testing.assert_allclose(value, values, rtol=1e-5)
    np.testing.assert_allclose(value, objective(delta), rtol=1e-6)


def test_it_stays_in_the_ball_of_each_token_and_beats_its_start():
    delta, value = found(20)
    radius = SIZE * np.linalg.norm(X, axis=-1) * np.asarray(TOKENS)
    lengths = np.linalg.norm(delta, axis=-1)
    assert (lengths <= radius * (1 + 1e-6)).all() and (lengths[~np.asarray(TOKENS)] == 0).all()
    assert (value > found(0)[1]).all()
    random = random_perturbation(X, TOKENS, KEYS, SIZE)
    np.testing.assert_allclose(np.linalg.norm(random, axis=-1), radius, rtol=1e-6)


def test_a_row_is_the_same_in_any_batch_and_beside_any_padding():
    delta, value = found(5)
    wide = jnp.pad(X, ((0, 0), (0, 3), (0, 0)))[::-1]
    tokens = perturbed_tokens(jnp.asarray(LENGTHS[::-1]), 8)

    def padded(delta):
        inner = jnp.tanh((wide + delta) @ MATRIX)  # of zeros it is 0, so padding adds nothing
        return jnp.sum(inner.sum(axis=1) ** 2, axis=-1)

    # In X the places behind a row's end are filled, and counted; here they are empty, so only the first row compares.
    find = jax.jit(functools.partial(find_perturbation, padded, size=SIZE, steps=5, stride=STRIDE))
    other, of_other = find(wide, tokens, KEYS[::-1])
    np.testing.assert_allclose(other[2, :5], delta[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(of_other[2], value[0], rtol=1e-6)


def test_no_gradient_goes_through_the_search():
    def through(scale):
        delta, value = find_perturbation(lambda d: objective(d * scale), X * scale, TOKENS, KEYS, size=SIZE, steps=2)
        return delta.sum() + value.sum()

    assert jax.jit(jax.grad(through))(1.0) == 0


def test_relative_change_token_by_token():
    states = RNG.normal(size=(2, 3, 5, 4)).astype(np.float32)
    moved = states + RNG.normal(size=states.shape).astype(np.float32)
    expected = np.zeros((2, 3))
    for layer in range(2):
        for row, length in enumerate(LENGTHS):
            old, new = states[layer, row, 1:length].astype(np.float64), moved[layer, row, 1:length].astype(np.float64)
            expected[layer, row] = np.mean(np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1))
    np.testing.assert_allclose(relative_change(states, moved, TOKENS), expected, rtol=1e-6)
    scaled = relative_change(1e3 * states, 1e3 * moved, TOKENS)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


def test_where_nothing_moves_change_and_gradient_are_zero():
    change = jax.jit(jax.value_and_grad(lambda d: relative_change(X, X + d, TOKENS).sum()))
    value, gradient = change(jnp.zeros(X.shape))
    assert value == 0 and (gradient == 0).all()
    alone = relative_change(X, 2 * X, perturbed_tokens(jnp.array([1, 5, 5]), 5))
    np.testing.assert_allclose(alone, [0, 1, 1], rtol=1e-6)
