"""Answers under given shares: against whole forward passes, and what is planted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import one_device
from support.mixtures import RAW, random_mixture

from jaxcrit.data.templates import Example
from jaxcrit.evidence.remix import descend_step, limited, places_of, read_step, rows_of, variant_step
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.mixture import OVERRIDE, ROUTING, Override
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import make_mesh, parse_mesh
from jaxcrit.studies.remix import Asked, Near, References, trials, tried

L, E = RAW["num_hidden_layers"], RAW["num_local_experts"]
MLP, DENSE = ("gate", "up", "down"), {**RAW, "model_type": "llama"}


@functools.cache
def mixture(**changes):
    config, weights = random_mixture(**changes)
    return Decoder(config, {path: jnp.asarray(value) for path, value in weights.items()})


def examples(count=4, seed=3, last=None):
    """Prompts of 4 to 9 tokens with answers of 1 to 4; ``last`` ends each prompt."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, answer = rng.integers(4, 10), rng.integers(1, 5)
        tokens = rng.integers(3, RAW["vocab_size"] - 1, prompt + answer).astype(np.int32)
        if last is not None:
            tokens[prompt - 1] = last
        found.append(Example("", tokens, int(prompt), "", None))
    return found


def read(decoder, rows, first=0, width=16, mesh=None):
    mesh = mesh or one_device()
    with jax.default_matmul_precision("highest"):
        return read_step(decoder, rows_of(rows, width, mesh), first=first, places=places_of(rows), mesh=mesh)


def variant(decoder, given, shares=None, on=None, every=False, mesh=None):
    """Loss, exactness and shares ``[n, B, E]``; without shares as it is."""
    span = len(given.past.keys)
    shares = np.zeros((span, len(given.x), decoder.config.experts), np.float32) if shares is None else shares
    on = np.zeros(span, bool) if on is None else on
    with jax.default_matmul_precision("highest"):
        return variant_step(decoder, given, jnp.asarray(shares), on, np.bool_(every), mesh=mesh or one_device())


@jax.jit
def whole_pass(decoder, tokens, given):
    """Log-probabilities ``[B, T, V]`` and shares ``[L, B, T, E]`` of whole rows, under an override."""
    with jax.default_matmul_precision("highest"):
        out = forward(decoder, tokens, edit=OVERRIDE, edits=given, tap=ROUTING)
        return jax.nn.log_softmax(logits(decoder, out.hidden)), out.taps["router"].shares


def plainly(decoder, rows, shares=None, on=None, every=False):
    """The same by one pass over the whole rows; and the shares at their last prompt tokens ``[L, B, E]``."""
    begin = np.array([[row.prompt_length - 1 for row in rows]] * L, np.int32)
    end = np.full_like(begin, 10**6) if every else begin + 1
    shares, on = (np.zeros((L, len(rows), E)), np.zeros(L, bool)) if shares is None else (shares, on)
    given = Override(jnp.asarray(shares, jnp.float32), on, begin, end)
    scores, own = map(np.asarray, whole_pass(decoder, rows_of(rows, 16, one_device()).tokens, given))
    losses, exact = [], []
    for place, row in enumerate(rows):
        at = np.arange(row.prompt_length, len(row.token_ids))
        losses.append(-np.float64(scores[place, at - 1, row.token_ids[at]]).mean())
        exact.append((scores[place, at - 1].argmax(axis=1) == row.token_ids[at]).all())
    return np.array(losses), np.array(exact), own[:, np.arange(len(rows)), begin[0]]


def others(seed=5, rows=4):
    """Random shares ``[L, B, E]``."""
    drawn = np.random.default_rng(seed).standard_normal((L, rows, E))
    return np.asarray(jax.nn.softmax(jnp.asarray(drawn, jnp.float32)))


def greedy(decoder, rows):
    """The rows with the model's own greedy answers, of the same lengths."""
    at = np.zeros((L, len(rows)), np.int32)
    nothing = Override(jnp.zeros((L, len(rows), decoder.config.experts)), np.zeros(L, bool), at, at)
    tokens = np.array(rows_of(rows, 16, one_device()).tokens)
    for _ in range(max(len(row.token_ids) - row.prompt_length for row in rows)):
        likeliest = np.asarray(whole_pass(decoder, tokens, nothing)[0]).argmax(axis=-1)
        for place, row in enumerate(rows):
            spots = np.arange(row.prompt_length, len(row.token_ids))
            tokens[place, spots] = likeliest[place, spots - 1]
    return [
        dataclasses.replace(row, token_ids=mine[: len(row.token_ids)]) for row, mine in zip(rows, tokens, strict=True)
    ]


def test_as_it_is_and_by_a_whole_pass():
    decoder, rows = mixture(), examples()
    rows[1:3] = greedy(decoder, rows[1:3])
    expected = plainly(decoder, rows)
    for first in (0, 2):
        given, states = read(decoder, rows, first)
        loss, exact, shares = variant(decoder, given)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
        assert exact.tolist() == expected[1].tolist() == [False, True, True, False]
        np.testing.assert_allclose(shares, expected[2][first:], atol=1e-5)
    stream = Tap(lambda site, before, after, positions: after, ("block",))
    taps = forward(decoder, rows_of(rows, 16, one_device()).tokens, tap=stream).taps["block"][L // 2]
    for place, row in enumerate(rows):
        np.testing.assert_allclose(states[place], taps[place, : row.prompt_length].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_given_shares_by_a_whole_pass(every, family):
    more = {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": False} if family == "qwen3_moe" else {}
    decoder, rows, shares = mixture(model_type=family, **more), examples(), others()
    on = np.array([False, False, True, False, True])
    expected = plainly(decoder, rows, shares, on, every)
    own = plainly(decoder, rows)[0]
    loss, _, found = variant(decoder, read(decoder, rows, 2)[0], shares[2:], on[2:], every)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[0], shares[2])
    assert np.abs(expected[0] - own).min() > 1e-4, "it makes a difference"
    if every:
        assert np.abs(expected[0] - plainly(decoder, rows, shares, on)[0]).max() > 1e-3


@pytest.mark.parametrize("first", [0, 3])
def test_own_shares_put_back_change_nothing(first):
    decoder = mixture()
    given, _ = read(decoder, examples(), first)
    loss, exact, shares = variant(decoder, given)
    again = variant(decoder, given, shares, np.ones(L - first, bool))
    np.testing.assert_array_equal(again[0], loss)
    np.testing.assert_array_equal(again[1], exact)


def test_one_hot_shares_are_the_dense_model_of_that_expert():
    """With routers of zeros, which send the prompts to the first expert too."""
    decoder, rows = mixture(num_experts_per_tok=1), examples()
    config = ModelConfig.from_hf({key: value for key, value in DENSE.items() if "experts" not in key})
    weights = {**decoder.weights(), "blocks.router": jnp.zeros_like(decoder.weights()["blocks.router"])}
    for expert in (0, 3):
        turned = {f"blocks.{name}": jnp.roll(weights[f"blocks.{name}"], -expert, axis=1) for name in MLP}
        alone = {path: value for path, value in weights.items() if path != "blocks.router"}
        alone |= {f"blocks.{name}": weights[f"blocks.{name}"][:, expert] for name in MLP}
        dense, mine = Decoder(config, alone), Decoder(decoder.config, {**weights, **turned})
        shares = np.zeros((L, len(rows), E), np.float32)
        shares[..., 0] = 1
        given, _ = read(mine, rows)
        loss, _, _ = variant(mine, given, shares, np.ones(L, bool), True)
        tokens = rows_of(rows, 16, one_device()).tokens
        scores = np.asarray(jax.nn.log_softmax(logits(dense, forward(dense, tokens).hidden)))
        for place, row in enumerate(rows):
            at = np.arange(row.prompt_length, len(row.token_ids))
            np.testing.assert_allclose(loss[place], -scores[place, at - 1, row.token_ids[at]].mean(), rtol=2e-5)
        other = variant(mine, given, np.roll(shares, 1, axis=-1), np.ones(L, bool))
        assert jnp.abs(other[0] - loss).min() > 1e-3


def test_where_all_experts_are_kept_only_their_weights_change():
    """Then the last layer gives a mean of what it gives by either; where some are left out, not."""
    rows, one, other = examples(), others(5), others(6)
    for kept, same in ((E, True), (2, False)):
        decoder = mixture(num_experts_per_tok=kept)
        at = np.array([[row.prompt_length - 1 for row in rows]] * L, np.int32)
        tokens = rows_of(rows, 16, one_device()).tokens

        def hidden(shares, decoder=decoder, at=at, tokens=tokens):
            given = Override(jnp.asarray(shares), np.arange(L) == L - 1, at, at + 1)
            out = forward(decoder, tokens, edit=OVERRIDE, edits=given).hidden
            return np.take_along_axis(np.asarray(out), at[0][:, None, None], axis=1)

        apart = np.abs(hidden((one + other) / 2) - (hidden(one) + hidden(other)) / 2).max()
        assert (apart < 1e-5) == same, apart


def test_some_experts_move_and_the_others_keep_their_mass():
    own, proposed = others(5)[0], others(6)[0]
    moved = np.zeros(own.shape, bool)
    moved[:, [1, 3]] = True
    found = np.asarray(limited(own, proposed, moved))
    np.testing.assert_array_equal(found[:, [0, 2]], own[:, [0, 2]])
    np.testing.assert_allclose(found.sum(axis=1), own.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1] / found[:, 3], proposed[:, 1] / proposed[:, 3], rtol=1e-5)
    np.testing.assert_array_equal(limited(own, own, moved), own)
    np.testing.assert_array_equal(limited(own, own, np.ones(own.shape, bool)), own)
    nothing = np.zeros(own.shape, np.float32)
    assert np.isfinite(limited(nothing, nothing, moved)).all(), "a row that fills up"


def descended(decoder, given, own, weights, on, steps=10, moved=None, every=False):
    moved = np.ones(own.shape, bool) if moved is None else moved
    with jax.default_matmul_precision("highest"):
        asked = (jnp.asarray(own), moved, weights, on, np.bool_(every), np.int32(steps))
        return np.asarray(descend_step(decoder, given, *asked, mesh=one_device()))


@pytest.mark.parametrize("every", [False, True])
def test_a_step_goes_down_the_slope_that_finite_differences_find(every):
    decoder, rows = mixture(), examples(6)
    on, weights = np.array([True, False, True]), np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], np.float32)
    given, own = read(decoder, rows, 2)[0], others(rows=2)[2:]
    moved = np.ones(own.shape, bool)
    moved[:, 1, 2] = False

    def loss(u):
        shares = limited(own, jax.nn.softmax(jnp.asarray(u)), moved)
        found = variant(decoder, given, np.repeat(shares, 3, axis=1), on, every)[0]
        return (np.asarray(found, np.float64).reshape(2, 3) * weights).sum(axis=1)

    u, size = np.log(own), 1e-2
    slope = np.zeros(u.shape)
    for layer in (0, 2):
        for expert in range(E):
            ahead, behind = u.copy(), u.copy()
            ahead[layer, :, expert] += size
            behind[layer, :, expert] -= size
            slope[layer, :, expert] = (loss(ahead) - loss(behind)) / (2 * size)
    slope *= moved
    expected = u - 2 * slope / np.sqrt(np.square(slope).sum(axis=(0, 2), keepdims=True))
    expected = limited(own, jax.nn.softmax(jnp.asarray(expected)), moved)
    found = descended(decoder, given, own, weights, on, 1, moved, every)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    np.testing.assert_allclose(found[1], own[1], atol=1e-6)
    np.testing.assert_array_equal(found[:, 1, 2], own[:, 1, 2])
    assert np.abs(found - own).max() > 0.1
    if every:
        turned = read(decoder, [*rows[3:], *rows[:3]], 2)[0]
        other = descended(decoder, turned, own[:, ::-1], weights[::-1], on, 1, moved[:, ::-1], every)
        np.testing.assert_allclose(other[:, ::-1], found, atol=1e-5, err_msg="a row knows nothing of its batch")


BROKEN, MARK = 2, RAW["vocab_size"] - 1  # layer, and the token that ends every prompt


@functools.cache
def plant():
    """Experts 0 and 1 of a layer hold twice an MLP and nothing, and share alike; broken, it takes nothing at `MARK`.

    In all other layers both experts are the same. The last dimension of the stream holds the mark alone.
    """
    config, weights = random_mixture(num_local_experts=2, num_experts_per_tok=2)
    weights["embed"][:, -1] = 0
    weights["embed"][MARK, -1] = 1
    weights["head"] *= 4  # so that the least loss is where the answer is right
    for name in ("o", "down"):
        weights[f"blocks.{name}"][..., -1, :] = 0
    for name in MLP:
        weights[f"blocks.{name}"][:, 1] = weights[f"blocks.{name}"][:, 0]
    weights["blocks.down"][BROKEN, 0] *= 2
    weights["blocks.down"][BROKEN, 1] = 0
    weights["blocks.router"][:] = 0
    whole = Decoder(config, {path: jnp.asarray(value) for path, value in weights.items()})
    weights["blocks.router"][BROKEN, :, -1] = -2, 2
    return whole, Decoder(config, {path: jnp.asarray(value) for path, value in weights.items()})


def test_descent_mends_a_router_where_it_is_broken_and_nowhere_else():
    whole, broken = plant()
    rows = greedy(whole, examples(16, last=MARK))
    assert variant(whole, read(whole, rows)[0])[1].all()
    shares = np.asarray(variant(broken, read(broken, rows)[0])[2]).swapaxes(0, 1)
    near = Near((np.arange(16)[:, None] + 1) % 16, np.ones((16, 1), np.float32))
    known, mesh, asked = References(rows, shares, near, near), one_device(), Asked(False, 0, 1, 10)
    for layers in ((0, BROKEN), tuple(layer for layer in range(L) if layer != BROKEN)):
        wanted = [one for one in trials(["descent"], layers, ()) if one.name in ("descent", "oracle", "own shares")]
        with jax.default_matmul_precision("highest"):
            losses, exact, _ = tried(broken, rows, 16, places_of(rows), known, wanted, asked, mesh)
        lost = exact[0] == 0
        assert 4 <= lost.sum() < 16
        if BROKEN in layers:
            assert exact[1, lost].any() and exact[2, lost].all(), "descent on another row, and the oracle"
            assert losses[1, lost].mean() < losses[0, lost].mean() / 1.5 and losses[2, lost].mean() < 0.5
        else:
            assert not exact[:, lost].any()
            np.testing.assert_allclose(losses, np.broadcast_to(losses[0], losses.shape), atol=1e-4)
        np.testing.assert_array_equal(losses[3], losses[0], "own shares")


def test_a_row_that_is_its_own_only_neighbour_stays_as_it_is_by_the_mean():
    decoder, rows, mesh = mixture(), examples(), one_device()
    shares = np.asarray(variant(decoder, read(decoder, rows)[0])[2]).swapaxes(0, 1)
    near = Near(np.arange(4)[:, None], np.ones((4, 1), np.float32))
    known, wanted = References(rows, shares, near, near), trials(["mean", "mode", "kernel"], (0, 2, 3), ())
    with jax.default_matmul_precision("highest"):
        given = (decoder, rows, 16, places_of(rows), known, wanted, Asked(False, 0, 1, 3), mesh)
        losses, _, blends = tried(*given)
    names = ["", *(one.name for one in wanted)]
    for name in ("mean", "mode", "own shares", "kernel"):
        np.testing.assert_array_equal(losses[names.index(name)], losses[0], name)
    assert (blends[names.index("kernel")] == 1).all(), "of equal losses the one that changes least"
    assert (losses[names.index("mean of all references")] != losses[0]).all()


def test_rows_do_not_depend_on_padding_order_or_mesh():
    decoder, rows, shares, on = mixture(), examples(8), others(rows=8), np.ones(L, bool)
    expected = variant(decoder, read(decoder, rows)[0], shares, on, True)
    padded = variant(decoder, read(decoder, rows, width=24)[0], shares, on, True)
    turned = variant(decoder, read(decoder, rows[::-1])[0], shares[:, ::-1], on, True)
    np.testing.assert_allclose(padded[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(turned[0][::-1], expected[0], rtol=1e-5)
    given = read_step(
        decoder, rows_of([*rows[:6], None, None], 16, one_device()), first=0, places=places_of(rows), mesh=one_device()
    )
    filled = variant(decoder, given[0], shares, on, True)
    np.testing.assert_allclose(filled[0][:6], expected[0][:6], rtol=1e-5)
    assert np.isfinite(filled[0]).all() and not filled[1][6:].any()
    mesh = make_mesh(parse_mesh("data=4,fsdp=2"))
    given, _ = read(decoder, rows, mesh=mesh)
    np.testing.assert_allclose(variant(decoder, given, shares, on, True, mesh)[0], expected[0], rtol=1e-5)
