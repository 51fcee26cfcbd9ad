"""Skipping is zeroing weights, bit for bit; the mean replacement against a model that is run block by block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import raw_config
from support.plain_loss import batch_of, placed, plain
from support.tiny_training import random_weights

from jaxcrit.criteria.ablation import ablate, intact, silenced, update_sums, variants
from jaxcrit.evaluation.losses import response_losses
from jaxcrit.evidence.variants import sweep
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Context, Decoder, layer_windows

DEPTH = 4


def make(case):
    config = ModelConfig.from_hf({**raw_config(case), "num_hidden_layers": DEPTH})
    return config, placed(random_weights(config)), batch_of(config)


@pytest.mark.parametrize("sites", ["blocks", "attn", "mlp"])
def test_skip_is_zeroed_weights_bit_for_bit(sites):
    config, weights, batch = make("llama-bias")
    made = [*variants(DEPTH, jnp.zeros((DEPTH, config.width))), intact(DEPTH, config.width)]
    found = sweep(Decoder(config, weights).blocks, weights, made[-1], made, batch, edit=ablate(sites))
    halves = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
    names = sum(halves.values(), ()) if sites == "blocks" else halves[sites]
    for layer in range(DEPTH):
        zeroed = {
            path: value.at[layer].set(0) if path.removeprefix("blocks.").removesuffix("_bias") in names else value
            for path, value in weights.items()
        }
        np.testing.assert_array_equal(found.losses[layer], plain(Decoder(config, zeroed), batch))
        np.testing.assert_array_equal(
            found.losses[layer], plain(Decoder(config, silenced(weights, layer, sites)), batch)
        )
    np.testing.assert_array_equal(found.losses[-1], plain(Decoder(config, weights), batch))
    assert found.evaluations == DEPTH * (DEPTH + 1) // 2 + DEPTH


@pytest.mark.parametrize("sites", ["blocks", "attn", "mlp"])
def test_mean_is_what_the_site_adds_on_average(sites):
    config, weights, batch = make("qwen2-mixed-sliding")
    tokens, lengths, learn = batch.tokens, batch.lengths, batch.learn.at[-1].set(False)
    batch = dataclasses.replace(batch, learn=learn)  # its last is a row that fills up the batch: in no mean
    decoder = Decoder(config, weights)
    sums, count = update_sums(decoder, batch, sites)
    shift = jnp.asarray(sums / count, jnp.float32)
    real = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    real[-1] = False
    assert count == real.sum()

    def states(changed=None, add=None):
        """Runs block by block; returns what each site adds at each real token, and each row's loss."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        context = Context(positions, *config.rope.cos_sin(positions, lengths))
        x, added, windows = decoder.embed[...][tokens], [], layer_windows(config)
        for layer in range(DEPTH):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], decoder.blocks)
            window = None if windows is None else windows[layer]
            middle = x + block.attention(block.norm(x, "attn_norm"), context, window, None)[0]
            if sites == "attn" and layer == changed:
                middle = x + add
            after = middle + block.mlp(block.norm(middle, "mlp_norm"))
            if sites == "mlp" and layer == changed:
                after = middle + add
            if sites == "blocks" and layer == changed:
                after = x + add
            begin, end = {"blocks": (x, after), "attn": (x, middle), "mlp": (middle, after)}[sites]
            added.append(np.asarray(end - begin, np.float64)[real])
            x = after
        head = (decoder.embed if decoder.head is None else decoder.head)[...]
        return added, response_losses(x, decoder.norm[...], head, tokens, learn, config)[0].sum(axis=1)

    added, _ = states()
    np.testing.assert_allclose(shift, [one.mean(axis=0) for one in added], rtol=1e-5, atol=1e-6)
    whole = intact(DEPTH, config.width)
    found = sweep(decoder.blocks, weights, whole, variants(DEPTH, shift), batch, edit=ablate(sites))
    for layer in range(DEPTH):
        np.testing.assert_allclose(found.losses[layer], states(layer, shift[layer])[1], rtol=2e-5, atol=1e-5)
