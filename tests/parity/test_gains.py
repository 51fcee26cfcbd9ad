"""Gains folded into a checkpoint: transformers answers as the model under the gain does."""

import jax
import numpy as np
import pytest
from support import reference
from support.family_models import load_path, raw_config

from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.export import write_checkpoint
from jaxcrit.models.gains import edit, fold, gain_data, parse_gains

torch = reference.torch
TOKENS = np.random.default_rng(0).integers(0, 90, (3, 14)).astype(np.int32)


@pytest.mark.parametrize("case", ["llama-bias", "qwen3-tied", "gemma2", "granite"])
def test_transformers_answers_as_the_gain_does(case, tmp_path):
    plain = reference.make(raw_config(case), tmp_path / "in")
    decoder, source = load_path(tmp_path / "in"), open_checkpoint(tmp_path / "in")
    gains = parse_gains("0:mlp:0.6,1:attn:0.5", decoder.config)
    out = forward(decoder, TOKENS, edit=edit, edits=gain_data(gains, decoder.config.num_layers))
    expected = jax.nn.log_softmax(logits(decoder, out.hidden))
    folded = Decoder(decoder.config, fold(decoder.config, decoder.weights(), gains))
    there = reference.read(write_checkpoint(folded, source, tmp_path / "out"), torch.float32)
    with torch.no_grad():
        found, before = (torch.log_softmax(one(torch.from_numpy(TOKENS).long()).logits, -1) for one in (there, plain))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=5e-4)
    np.testing.assert_array_equal(found.numpy().argmax(-1), np.asarray(expected).argmax(-1))
    assert np.abs(found.numpy() - before.numpy()).max() > 0.01
