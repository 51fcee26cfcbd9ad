"""The response loss: against numpy in float64, whatever the chunk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.family_models import raw_config

from jaxcrit.evaluation import losses
from jaxcrit.models.config import ModelConfig
from jaxcrit.parallel.accounting import collectives
from jaxcrit.parallel.mesh import batch_sharding, make_mesh

CONFIG = ModelConfig.from_hf({**raw_config("llama-gqa"), "rms_norm_eps": 1e-6})


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
    found = losses.response_loss(*inputs, CONFIG)
    np.testing.assert_allclose(jax.tree.leaves(found), oracle(*inputs), rtol=1e-5)
    np.testing.assert_allclose([found.per_token, found.per_sample], [found.loss / 7, found.means / 2])


def test_gradients_do_not_depend_on_the_chunk(inputs, monkeypatch):
    def gradient(most):
        monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", most)
        return jax.grad(lambda *parts: losses.response_loss(*parts, *inputs[3:], CONFIG).loss, (0, 1, 2))(*inputs[:3])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(2**24), gradient(33))


def test_a_batch_without_response_counts_nothing(inputs):
    found = losses.response_loss(*inputs[:4], jnp.zeros_like(inputs[4]), CONFIG)
    assert [float(leaf) for leaf in jax.tree.leaves(found)] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("axes", ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}), ids=str)
def test_a_split_head_is_gathered_once(axes, monkeypatch):
    rng = np.random.default_rng(1)
    mesh = make_mesh(axes)
    hidden, norm, head = rng.normal(size=(16, 32, 64)), rng.normal(size=64), rng.normal(size=(48, 64))
    values = [array.astype(np.float32) for array in (hidden, norm, head)]
    tokens, learn = rng.integers(0, 48, (16, 32)), np.ones((16, 32), bool)
    rows = batch_sharding(mesh)
    places = (
        rows,
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("tensor", "fsdp")),
        rows,
        rows,
    )
    given = jax.device_put((*values, tokens, learn), places)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 16 * 48 * 4 // 8)  # 8 chunks of 4 positions

    def loss(hidden, *rest, mesh):
        return losses.response_loss(hidden, *rest, CONFIG, mesh).loss

    step = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=mesh)))
    for ours, wanted in zip(
        jax.tree.leaves(step(*given)),
        jax.tree.leaves(jax.value_and_grad(functools.partial(loss, mesh=None))(*values, tokens, learn)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    runs, size = collectives(step.lower(*given).compile().as_text())["all-gather"]
    assert runs <= 2 and size <= 2 * head.size * 4 // axes.get("tensor", 1)
