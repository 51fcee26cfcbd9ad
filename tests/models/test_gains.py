"""Gains of shortcuts: what they change, that they fold into weights, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import CASES, raw_config
from support.tiny_training import random_weights

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits, rms_norm
from jaxcrit.models.gains import Gain, edit, fold, gain_data, parse_gains
from jaxcrit.models.sites import Tap

LAYERS = 4
TOKENS = np.random.default_rng(0).integers(0, 90, (3, 14)).astype(np.int32)
FAMILIES = ("llama-bias", "qwen2-tied", "qwen3-mixed-sliding", "phi3-gqa-sliding", "gemma2", "gemma3", "granite")


def decoder_of(case="llama-bias"):
    config = ModelConfig.from_hf({**raw_config(case), "num_hidden_layers": LAYERS})
    return Decoder(config, {path: jnp.asarray(value) for path, value in random_weights(config).items()})


@jax.jit
def scores(decoder, data=None):
    """Log-probabilities ``[B, T, V]``, under gains where there are data."""
    out = forward(decoder, TOKENS, edit=None if data is None else edit, edits=data)
    return jax.nn.log_softmax(logits(decoder, out.hidden).astype(jnp.float32))


@pytest.mark.parametrize("case", FAMILIES)
def test_folded_weights_are_the_gain(case):
    """In every half, and in several together: log-probabilities to 5e-4, so the same answers but for near ties."""
    decoder = decoder_of(case)
    assert case in CASES and not parse_gains("", decoder.config)
    for text in ("0:attn:0.5", "1:attn:0.7", "1:mlp:0.4", "3:mlp:2", "0:mlp:0.6,2:attn:0.5,2:mlp:1.5"):
        gains = parse_gains(text, decoder.config)
        under = scores(decoder, gain_data(gains, LAYERS))
        before = jax.device_get(decoder.weights())
        folded = scores(Decoder(decoder.config, fold(decoder.config, decoder.weights(), gains)))
        np.testing.assert_allclose(folded, under, rtol=0, atol=5e-4)
        second, first = np.moveaxis(np.sort(under)[..., -2:], -1, 0)
        clear = first - second > 1e-3  # a tie tips either way, by the order in which a machine sums
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(folded.argmax(-1)[clear], under.argmax(-1)[clear])
        assert np.abs(under - scores(decoder)).max() > 0.01
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(decoder.weights()), before)


def test_a_gain_of_one_and_one_switched_off():
    decoder = decoder_of()
    plain = scores(decoder)
    values, on = gain_data([Gain(layer, half, 1.0) for layer in range(LAYERS) for half in ("attn", "mlp")], LAYERS)
    assert on.all() and np.abs(scores(decoder, (values, on)) - plain).max() < 1e-6
    np.testing.assert_array_equal(scores(decoder, (values * 0.3, ~on)), plain)


def test_a_gain_of_zero_around_the_last_mlp_leaves_its_output_alone():
    decoder, last = decoder_of(), LAYERS - 1
    tap = Tap(lambda site, before, after, positions: before, ("mlp",))
    middle = forward(decoder, TOKENS, tap=tap).taps["mlp"][last]
    block = jax.tree.map(lambda leaf: leaf[last], decoder.blocks)
    by_hand = block.mlp(rms_norm(middle, block.mlp_norm[...], decoder.config))
    expected = jax.nn.log_softmax(logits(decoder, by_hand).astype(jnp.float32))
    np.testing.assert_allclose(scores(decoder, gain_data([Gain(last, "mlp", 0.0)], LAYERS)), expected, atol=1e-5)


def test_any_gain_around_a_last_mlp_that_adds_nothing_is_none():
    decoder = decoder_of("llama-gqa")
    weights = decoder.weights()
    silent = Decoder(decoder.config, {**weights, "blocks.down": weights["blocks.down"].at[-1].set(0)})
    for value in (0.3, 0.7, 4.0):
        found = scores(silent, gain_data([Gain(LAYERS - 1, "mlp", value)], LAYERS))
        np.testing.assert_allclose(found, scores(silent), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "case", "message"),
    [
        ("4", "llama-gqa", "expected LAYER:attn|mlp:GAIN such as 4:attn:0.5, up to 4, got '4'"),
        ("1:attn", "llama-gqa", "got '1:attn'"),
        ("1:block:0.5", "llama-gqa", "got '1:block:0.5'"),
        ("1:attn:-1", "llama-gqa", "got '1:attn:-1'"),
        ("1:attn:4.5", "llama-gqa", "got '1:attn:4.5'"),
        ("1:attn:nan", "llama-gqa", "got '1:attn:nan'"),
        ("1:attn:0.5,", "llama-gqa", "got ''"),
        ("1:attn:0", "llama-gqa", "nothing is left of the prompt.* take one above 0"),
        ("4:attn:0.5", "llama-gqa", "expected layers 0 to 3, got 4"),
        ("1:mlp:0.5,1:mlp:0.7", "llama-gqa", "1:mlp is there twice"),
        ("1:mlp:0.5", "olmo2", "attn and mlp of olmo2 read the stream without a norm.*ablate --methods=gain"),
    ],
)
def test_mistakes(text, case, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        parse_gains(text, decoder_of(case).config)
    assert str(caught.value).startswith(f"--gain={text}: ") and "\n" not in str(caught.value)
