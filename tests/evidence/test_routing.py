"""Sensitivity of the loss to routing against finite differences, what must leave it as it is, and load by counting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import load_path, one_device, raw_config, write_model

from jaxcrit.criteria.routing_sensitivity import CRITERIA
from jaxcrit.data.templates import Example
from jaxcrit.evidence.routing import routed
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.mixture import OVERRIDE, ROUTING, Override

LENGTHS = ((5, 9), (7, 12), (3, 5))  # of prompts, and of whole rows


@dataclasses.dataclass(frozen=True)
class Bare:
    """What the pass asks of a model."""

    config: object
    mesh: object


def rows():
    rng = np.random.RandomState(3)
    ids = [(rng.randint(3, 96, whole).astype(np.int32), prompt) for prompt, whole in LENGTHS]
    return [Example(str(number), *one, prompt="", response="") for number, one in enumerate(ids)]


def of(decoder, examples=None, batch=2):
    with jax.default_matmul_precision("highest"):
        return routed(Bare(decoder.config, one_device()), decoder, examples or rows(), batch)


@pytest.fixture(scope="module", params=["olmoe", "qwen3_moe"])
def decoder(request, tmp_path_factory):
    return load_path(write_model(tmp_path_factory.mktemp("model"), raw_config(request.param)))


def test_sensitivity_is_that_of_differences(decoder):
    """Every logarithm of a share moved by hand, a layer at a time; the row by itself, without a batch."""
    found, config = of(decoder), decoder.config
    for number, example in enumerate(rows()[:1]):
        tokens = jnp.asarray(example.token_ids)[None]
        plain = forward(decoder, tokens, tap=ROUTING).taps["router"].shares
        at = example.prompt_length - 1
        place = jnp.full((3, 1), at, jnp.int32)

        @jax.jit
        def loss(layer, logs, tokens=tokens, example=example, place=place):
            data = Override(jnp.broadcast_to(jax.nn.softmax(logs), (3, 1, 8)), jnp.arange(3) == layer, place, place + 1)
            out = forward(decoder, tokens, edit=OVERRIDE, edits=data)
            scores = jax.nn.log_softmax(logits(decoder, out.hidden)[0])
            answer = range(example.prompt_length, tokens.shape[1])
            return -sum(scores[place - 1, tokens[0, place]] for place in answer) / len(answer)

        with jax.default_matmul_precision("highest"):
            for layer in range(3):
                logs = jnp.log(plain[layer, 0, at])
                steps = 2e-3 * jnp.eye(config.experts)
                slopes = [float(loss(layer, logs + step) - loss(layer, logs - step)) / 4e-3 for step in steps]
                assert found.samples[number, layer] == pytest.approx(np.linalg.norm(slopes), rel=2e-2, abs=3e-4)


def test_a_constant_on_the_logits_changes_nothing(decoder):
    """The same row added to the router's weights of every expert is a constant of each token."""
    weights = dict(decoder.weights())
    shift = jnp.zeros_like(weights["blocks.router"]).at[:, :, 0].add(0.3)
    moved = Decoder(decoder.config, {**weights, "blocks.router": weights["blocks.router"] + shift})
    np.testing.assert_allclose(of(moved).samples, of(decoder).samples, rtol=2e-4, atol=1e-6)


def test_one_share_of_all_leaves_nothing_to_change(decoder):
    weights = dict(decoder.weights())
    sharp = Decoder(decoder.config, {**weights, "blocks.router": weights["blocks.router"].at[1].multiply(1e4)})
    found = of(sharp).samples
    assert np.abs(found[:, 1]).max() < 1e-6 and found[:, [0, 2]].min() > 1e-5


def test_batches_order_and_load(decoder):
    """Rows are their own, whatever stands beside them; load is what counting gives."""
    one, other = of(decoder), of(decoder, rows()[::-1], batch=3)
    np.testing.assert_allclose(one.samples, other.samples[::-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one.load, other.load, atol=1e-12)
    counts, tokens = np.zeros((3, 8)), np.zeros((3, 12), np.int32)
    for row, example in enumerate(rows()):
        tokens[row, : len(example.token_ids)] = example.token_ids
    shares = np.asarray(forward(decoder, jnp.asarray(tokens), tap=ROUTING).taps["router"].shares)
    for layer, row in np.ndindex(3, 3):
        for mine in shares[layer, row, : LENGTHS[row][1]]:
            counts[layer, np.argsort(-mine, kind="stable")[: decoder.config.experts_per_token]] += 1
    np.testing.assert_allclose(one.load, counts / sum(whole for _, whole in LENGTHS), atol=1e-12)


def test_the_score_keeps_its_deletions_and_the_load(decoder):
    found, score = of(decoder), CRITERIA["routing_sensitivity"].score
    measured = score(found)
    np.testing.assert_allclose(measured.values, found.samples.mean(axis=0))
    np.testing.assert_allclose(measured.without_each[1], found.samples[[0, 2]].mean(axis=0))
    assert measured.meta["load"] == found.load.tolist()
