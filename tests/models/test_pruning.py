"""A model without layers is the whole one in which they add nothing, and its config says of each layer what it was."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.deep_models import CASES, deep
from support.family_models import BOUND, error, load_path, sequences, states, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.pruning import kept_layers, names_before, pruned, pruned_config
from jaxcrit.models.sites import Edit
from jaxcrit.models.weights import hf_shapes


def skipping(drop):
    """An edit that has some layers add nothing."""
    out = np.isin(np.arange(6), drop)
    return Edit(lambda site, before, after, data, positions: jnp.where(data, before, after), ("block",)), out


@pytest.mark.parametrize("drop", [(1, 2), (4,)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_left_out_is_skipped(case, drop, tmp_path):
    decoder = load_path(write_model(tmp_path, deep(case)))
    config = decoder.config
    smaller = pruned(config, decoder.weights(), drop)
    kept = kept_layers(6, drop)
    assert [smaller.config.windows[n] for n in range(len(kept))] == [config.windows[layer] for layer in kept]
    assert ModelConfig.from_hf(smaller.config.to_hf()).windows == smaller.config.windows
    assert names_before(config, kept).keys() == hf_shapes(smaller.config).keys()
    tokens, lengths = sequences(config.vocab_size)
    edit, out = skipping(drop)
    given = {"lengths": lengths, "edit": edit, "edits": jnp.asarray(out)}
    whole = logits(decoder, forward(decoder, jnp.asarray(tokens), **given).hidden)
    _, found = states(smaller, tokens, lengths)
    for row, length in enumerate(lengths):
        assert error(found[row, :length], np.asarray(whole)[row, :length]) <= BOUND


def test_layers_that_there_are_not():
    config = ModelConfig.from_hf(deep("llama-tied"))
    with pytest.raises(UserError, match="names all 6 layers; leave one at least"):
        kept_layers(6, range(6))
    with pytest.raises(UserError, match="expected layers 0 to 5, got 7"):
        pruned_config(config, (0, 7))
