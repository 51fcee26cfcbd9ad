"""Losses as everything but a sweep computes them, to hold a sweep against."""

from __future__ import annotations

import dataclasses

import jax

from jaxcrit.evaluation.losses import most_scored, response_losses
from jaxcrit.models.decoder import forward
from support.tiny_training import random_batch


def batch_of(config, seed=1):
    batch = random_batch(rows=4, length=12, seed=seed, vocab=config.vocab_size)
    one = jax.tree.map(lambda leaf: leaf[0], batch)
    return placed(dataclasses.replace(one, scored=most_scored(one.learn)))


def placed(tree):
    """On a device for good, as loaded weights are."""
    return jax.device_put(tree, jax.devices()[0])


@jax.jit
def plain(decoder, batch):
    """The loss as everything else computes it: a scan over the model's own blocks."""
    with jax.default_matmul_precision("highest"):
        hidden = forward(decoder, batch.tokens, lengths=batch.lengths).hidden
        head = (decoder.embed if decoder.head is None else decoder.head)[...]
        given = (batch.tokens, batch.learn, decoder.config, None, batch.scored)
        losses, _ = response_losses(hidden, decoder.norm[...], head, *given)
        return losses.sum(axis=1)
