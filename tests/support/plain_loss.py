"""Losses as everything but a sweep computes them, to hold a sweep against."""

from __future__ import annotations

import jax

from jaxcrit.evaluation.losses import response_losses
from jaxcrit.models.decoder import forward
from support.tiny_training import random_batch


def batch_of(config, seed=1):
    batch = random_batch(rows=4, length=12, seed=seed, vocab=config.vocab_size)
    return placed(jax.tree.map(lambda leaf: leaf[0], (batch.tokens, batch.lengths, batch.learn)))


def placed(tree):
    """On a device for good, as loaded weights are."""
    return jax.device_put(tree, jax.devices()[0])


@jax.jit
def plain(decoder, tokens, lengths, learn):
    """The loss as everything else computes it: a scan over the model's own blocks."""
    with jax.default_matmul_precision("highest"):
        hidden = forward(decoder, tokens, lengths=lengths).hidden
        head = (decoder.embed if decoder.head is None else decoder.head)[...]
        losses, _ = response_losses(hidden, decoder.norm[...], head, tokens, learn, decoder.config)
        return losses.sum(axis=1)
