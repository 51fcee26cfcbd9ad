"""Layers of the embedded model are trained, one or two at a time: substitution and weight change name them alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrit.criteria.substitution import host_variant, join, variants, windows
from jaxcrit.criteria.weight_change import weight_change
from jaxcrit.data.batches import Budget, make_batches, response_mask
from jaxcrit.data.demo import generate
from jaxcrit.data.templates import render
from jaxcrit.evaluation.losses import most_scored, response_loss
from jaxcrit.evidence.variants import sweep
from jaxcrit.evidence.weights import weight_changes
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import open_model
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.partition import partition, split
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch

DEPTH, STEPS, RATE, ROWS = 16, 2, 0.1, 4


@pytest.fixture(scope="module")
def session():
    return open_model("", mesh=make_mesh(None, jax.devices()[:1]))


@pytest.fixture(scope="module")
def base(session):
    return session.decoder()


@pytest.fixture(scope="module")
def batch(session):
    """Rows of the task that the model has never seen."""
    examples = render(generate("order", ROWS), session.tokenizer)
    (one,) = make_batches(examples, Budget(ROWS, shape=1e6), prompt_only=False)
    learn = response_mask(one, examples)
    return jax.device_put(TokenBatch(one.tokens, one.lengths, learn, most_scored(learn)), jax.devices()[0])


@jax.jit
def descend(decoder, batch, trains):
    """A step of length `RATE` down the gradient of the layers marked in ``trains`` [L], which is data: one compile."""

    def loss(decoder):
        hidden = forward(decoder, batch.tokens, lengths=batch.lengths).hidden
        given = (hidden, decoder.norm[...], decoder.embed[...], batch.tokens, batch.learn, decoder.config)
        return response_loss(*given, None, batch.scored).per_token

    slopes = jax.tree.map(
        lambda leaf: leaf * trains.reshape(-1, *[1] * (leaf.ndim - 1)), jax.grad(loss)(decoder).blocks
    )
    length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slopes)))
    return jax.tree.map(lambda leaf, slope: leaf - RATE / length * slope, decoder.blocks, slopes)


def train(base, batch, layers):
    """The base after `STEPS` steps in these layers."""
    weights, tuned = base.weights(), base
    for _ in range(STEPS):
        blocks = descend(tuned, batch, np.isin(np.arange(DEPTH), layers).astype(np.float32))
        moved = {f"blocks.{name}": value[...] for name, value in vars(blocks).items() if hasattr(value, "get_value")}
        tuned = Decoder(base.config, {**weights, **moved})
    return tuned


def losses_of(base, batch, tuned, window):
    """Loss with each window from the base, that of the tuned model and that of the base, ``[C + 2]``."""
    weights = base.weights()
    stack = join(base.config, dict(weights), tuned.weights())
    host = host_variant(DEPTH, base=False)
    made = [*variants(list(windows(DEPTH, window).values()), DEPTH), host, *variants([range(DEPTH)], DEPTH)]
    found = sweep(stack, weights, host, made, batch)
    return (found.losses / found.tokens).mean(axis=1)


def changes_of(session, base, tuned, layers):
    """``weight_change`` of each layer, as of a fine-tuning run that trained these."""
    parts = partition(base.config, layers)
    params, _ = split(parts.gather(dict(tuned.weights()), session.mesh, np.float32))
    run = dataclasses.replace(session, overlays=(Overlay(parts, params, Path(), STEPS),))
    return weight_change(weight_changes(session, run)).values


@pytest.mark.parametrize("layer", range(DEPTH))
def test_the_layer_that_trained_is_named(session, base, batch, layer):
    model = train(base, batch, [layer])
    *single, tuned, before = losses_of(base, batch, model, 1)
    assert tuned < before
    assert np.argmax(single) == layer and single[layer] == before
    assert np.delete(single, layer).tolist() == [tuned] * (DEPTH - 1)
    changes = changes_of(session, base, model, [layer])
    assert changes.argmax() == layer and not np.delete(changes, layer).any()


@pytest.mark.parametrize("layers", [(2, 11), (0, 15), (7, 8)])
def test_the_two_layers_that_trained_are_the_top_two(session, base, batch, layers):
    model = train(base, batch, layers)
    *single, tuned, before = losses_of(base, batch, model, 1)
    assert tuned < min(single[layer] for layer in layers) and tuned < before
    assert set(np.argsort(single)[-2:]) == set(layers)
    assert np.delete(single, layers).tolist() == [tuned] * (DEPTH - 2)
    assert set(np.argsort(changes_of(session, base, model, layers))[-2:]) == set(layers)


def test_in_windows_of_five_the_layer_lies_in_a_plateau(base, batch):
    *windowed, tuned, before = losses_of(base, batch, train(base, batch, [8]), 5)
    expected = [before if abs(centre - 8) <= 2 else tuned for centre in windows(DEPTH, 5)]
    assert windowed == expected
