"""The response loss: against numpy in float64, whatever the chunk; the head runs where something is predicted."""

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
from jaxcrit.models.decoder import rms_norm
from jaxcrit.parallel.accounting import collectives, product_flops
from jaxcrit.parallel.mesh import abstract_mesh, batch_sharding, make_mesh

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


@pytest.mark.parametrize("scored", [None, 7, 9, 24])
@pytest.mark.parametrize("most", [2**24, 33 * 4, 33, 22])
def test_sums(inputs, most, scored, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", most)
    found = losses.response_loss(*inputs, CONFIG, scored=scored)
    np.testing.assert_allclose(jax.tree.leaves(found), oracle(*inputs), rtol=1e-5)
    np.testing.assert_allclose([found.per_token, found.per_sample], [found.loss / 7, found.means / 2])


@pytest.mark.parametrize(("most", "scored"), [(33, None), (2**24, 7), (33, 10)])
def test_gradients_depend_neither_on_the_chunk_nor_on_what_is_scored(inputs, most, scored, monkeypatch):
    def gradient(most, scored):
        def loss(*parts):
            return losses.response_loss(*parts, *inputs[3:], CONFIG, scored=scored).loss

        monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", most)
        return jax.grad(loss, (0, 1, 2))(*inputs[:3])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(2**24, None), gradient(most, scored)
    )


def test_losses_stand_where_they_belong(inputs):
    whole, counted = losses.response_losses(*inputs, CONFIG)
    packed, again = losses.response_losses(*inputs, CONFIG, scored=8)
    np.testing.assert_allclose(packed, whole, rtol=1e-6)
    np.testing.assert_array_equal(counted, again)
    assert (np.asarray(whole) > 0).tolist() == np.asarray(counted, bool).tolist()
    assert np.isnan(losses.response_loss(*inputs, CONFIG, scored=6).loss)  # one too few


@pytest.mark.parametrize("scored", [None, 8])
def test_rows_whose_every_token_is_the_likeliest_are_exact(inputs, scored):
    hidden, norm, head, tokens, learn = inputs
    _, counted = losses.response_losses(*inputs, CONFIG, scored=scored)
    best = np.asarray(jnp.argmax(rms_norm(hidden, norm, CONFIG) @ head.T, axis=-1))
    given = np.where(learn, np.roll(best, 1, axis=1), tokens)  # each token of a response the one that was likeliest
    for row, place in ((None, 0), (0, int(np.flatnonzero(learn[0])[-1]))):
        told = given.copy()
        if row is not None:
            told[row, place] = (told[row, place] + 1) % head.shape[0]
        found, again, exact = losses.response_exact(hidden, norm, head, told, learn, CONFIG, scored=scored)
        has = np.asarray(counted).any(axis=1)
        assert exact.tolist() == [bool(one) and number != row for number, one in enumerate(has)]
        np.testing.assert_array_equal(again, counted)
        np.testing.assert_array_equal(found, losses.response_losses(*inputs[:3], told, learn, CONFIG, scored=scored)[0])


def test_other_readings_of_the_same_logits(inputs):
    def read(logits, targets):
        return {"nats": losses.nats(logits, targets), "right": (logits.argmax(-1) == targets).astype(np.float32)}

    found, counted = losses.at_responses(read, *inputs, CONFIG, scored=8)
    np.testing.assert_array_equal(found["nats"], losses.response_losses(*inputs, CONFIG, scored=8)[0])
    assert found["right"].shape == counted.shape and not np.any(found["right"] * (1 - counted))


def test_the_head_runs_on_scored_positions_alone():
    """By XLA's own count of operations, and by that of products: all else is less than a hundredth."""
    rows, length, width, vocab, scored = 4, 64, 6, 4096, 32
    shape = jax.ShapeDtypeStruct
    given = (
        shape((rows, length, width), np.float32),
        shape((width,), np.float32),
        shape((vocab, width), np.float32),
        shape((rows, length), np.int32),
        shape((rows, length), np.bool_),
    )

    def cost(scored, gradient=False):
        def loss(*given):
            return losses.response_loss(*given, CONFIG, scored=scored).loss

        step = jax.grad(loss) if gradient else loss
        return jax.jit(step).lower(*given).compile().cost_analysis()["flops"], product_flops(step, *given)

    for gradient in (False, True):
        (whole, products), (packed, fewer) = cost(None, gradient), cost(scored, gradient)
        assert fewer == 2 * (1 + gradient) * scored * width * vocab
        assert fewer * rows * length == products * scored
        assert packed < 1.01 * whole * scored / (rows * length)


def test_as_many_as_the_fullest_part_of_the_mesh_has():
    learn = np.arange(8) >= np.array([[3], [6], [8], [0]])  # 5, 2, 0, and 7 for the first is never predicted
    assert losses.most_scored(learn) == 14 and losses.rounded_scored(learn) == 16
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    assert losses.most_scored(learn, mesh) == 7 and losses.rounded_scored(learn, mesh) == 8
    assert losses.most_scored(np.stack([learn, learn[::-1]]), mesh) == 7
    assert losses.most_scored(np.zeros((2, 4), bool)) == 1


def test_chunks_take_an_eighth_of_the_memory(monkeypatch):
    monkeypatch.setattr(losses, "device_memory", lambda devices: 2**31)
    assert losses._chunk_elements(None) == 2**25 == 2**31 // 8 // 8
    monkeypatch.setattr(losses, "device_memory", lambda devices: 2**40)
    assert losses._chunk_elements(None) == losses._chunk_elements(abstract_mesh(None, 8)) == 2**26


def test_a_batch_without_response_counts_nothing(inputs):
    found = losses.response_loss(*inputs[:4], jnp.zeros_like(inputs[4]), CONFIG)
    assert [float(leaf) for leaf in jax.tree.leaves(found)] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("axes", ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}), ids=str)
@pytest.mark.parametrize("share", [1, 4])
def test_a_split_head_is_gathered_once(axes, share, monkeypatch):
    rng = np.random.default_rng(1)
    mesh = make_mesh(axes)
    hidden, norm, head = rng.normal(size=(16, 32, 64)), rng.normal(size=64), rng.normal(size=(48, 64))
    values = [array.astype(np.float32) for array in (hidden, norm, head)]
    tokens, learn = rng.integers(0, 48, (16, 32)), np.arange(32) >= 32 - np.full((16, 1), 32 // share)
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
        return losses.response_loss(hidden, *rest, CONFIG, mesh, losses.most_scored(learn, mesh)).loss

    step = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=mesh)))
    for ours, wanted in zip(
        jax.tree.leaves(step(*given)),
        jax.tree.leaves(jax.value_and_grad(functools.partial(loss, mesh=None))(*values, tokens, learn)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    runs, size = collectives(step.lower(*given).compile().as_text())["all-gather"]
    assert runs <= 2 and size <= 2 * head.size * 4 // axes.get("tensor", 1)
