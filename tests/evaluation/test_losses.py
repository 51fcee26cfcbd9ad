"""The response loss: against numpy in float64, whatever the chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrit.evaluation import losses


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden, norm, head = rng.normal(size=(3, 8, 6)), rng.normal(size=6), rng.normal(size=(11, 6))
    tokens = rng.integers(0, 11, (3, 8))
    learn = np.arange(8) >= np.array([[3], [6], [8]])  # the last row has no response
    return tuple(jnp.asarray(array) for array in (*(a.astype(np.float32) for a in (hidden, norm, head)), tokens, learn))


def oracle(hidden, norm, head, tokens, learn):
    hidden, norm, head = (np.asarray(array, np.float64) for array in (hidden, norm, head))
    logits = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * norm @ head.T
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    rows = [[losses[row, at - 1] for at in range(1, 8) if learn[row, at]] for row in range(3)]
    return sum(map(sum, rows)), sum(map(len, rows)), sum(np.mean(row) for row in rows if row), sum(map(bool, rows))


@pytest.mark.parametrize("most", [2**24, 33 * 4, 33])
def test_sums(inputs, most, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", most)
    found = losses.response_loss(*inputs, 1e-6)
    np.testing.assert_allclose(jax.tree.leaves(found), oracle(*inputs), rtol=1e-5)
    np.testing.assert_allclose([found.per_token, found.per_sample], [found.loss / 7, found.means / 2])


def test_gradients_do_not_depend_on_the_chunk(inputs, monkeypatch):
    def gradient(most):
        monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", most)
        return jax.grad(lambda *parts: losses.response_loss(*parts, *inputs[3:], 1e-6).loss, (0, 1, 2))(*inputs[:3])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(2**24), gradient(33))


def test_a_batch_without_response_counts_nothing(inputs):
    found = losses.response_loss(*inputs[:4], jnp.zeros_like(inputs[4]), 1e-6)
    assert [float(leaf) for leaf in jax.tree.leaves(found)] == [0.0, 0.0, 0.0, 0.0]
