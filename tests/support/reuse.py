"""A batch of prefixes and what follows them, and two tiny models that share most of their weights."""

from __future__ import annotations

import jax
import numpy as np

from jaxcrit.evidence.reuse import Rows
from jaxcrit.models.decoder import Decoder
from jaxcrit.parallel.mesh import batch_sharding
from support.family_models import one_device
from support.tiny_training import CONFIG, random_weights

ALL = ("q", "k", "v", "o", "gate", "up", "down")
HEADS, LEFT = (20, 13, 17), (9, 5, 7)  # tokens of each prefix, and behind it


def receiver(config=CONFIG):
    return Decoder(config, {path: jax.numpy.asarray(value) for path, value in random_weights(config).items()})


def planted(names, layers, config=CONFIG):
    """The receiver but for some weights of some layers."""
    weights, rng = random_weights(config), np.random.default_rng(9)
    for name in names:
        for layer in layers:
            mine = weights[f"blocks.{name}"][layer]
            mine += (0.3 * mine.std() * rng.standard_normal(mine.shape)).astype(np.float32)
    return Decoder(config, {path: jax.numpy.asarray(value) for path, value in weights.items()})


def rows(mesh=None, vocab=64, order=(0, 1, 2), room=(20, 9)):
    """Rows of `HEADS` and `LEFT` in an order, padded to so many tokens; every place in front of the last is scored."""
    rng = np.random.default_rng(4)
    whole = [rng.integers(3, vocab, head + left) for head, left in zip(HEADS, LEFT, strict=True)]
    prefix, suffix = np.zeros((len(order), room[0]), np.int32), np.zeros((len(order), room[1]), np.int32)
    scored = np.zeros((len(order), room[1]), bool)
    for slot, row in enumerate(order):
        head, left = HEADS[row], LEFT[row]
        prefix[slot, :head], suffix[slot, :left] = whole[row][:head], whole[row][head:]
        scored[slot, : left - 1] = True
    heads = np.array([HEADS[row] for row in order], np.int32)
    ends = heads + np.array([LEFT[row] for row in order], np.int32)
    at = np.broadcast_to(np.arange(room[1], dtype=np.int32), suffix.shape)
    given = Rows(prefix, heads, suffix, ends, at, scored)
    return jax.device_put(given, batch_sharding(mesh or one_device())), [whole[row] for row in order]
