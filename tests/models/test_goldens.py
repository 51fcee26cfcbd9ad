"""The decoder against what transformers computed once (tests/goldens/make_goldens.py), without torch."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest
from support.family_models import BOUND, GOLDEN_CASES, error, load_path, states, write_model

from jaxcrit.core.files import read_npz
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block, Decoder, rms_norm

GOLDENS, META = read_npz(Path(__file__).parents[1] / "goldens" / "decoders.npz")


def worst(case, decoder):
    """Largest relative error of any layer or logit."""
    tokens, lengths = GOLDENS[f"{case}/tokens"], GOLDENS[f"{case}/lengths"]
    hidden, logits = states(decoder, tokens, lengths)
    errors = []
    for row, length in enumerate(lengths):
        golden = GOLDENS[f"{case}/hidden{row}"]
        errors += [error(ours, theirs) for ours, theirs in zip(hidden[:, row, :length], golden, strict=True)]
        errors.append(error(logits[row, :length], GOLDENS[f"{case}/logits{row}"]))
    return max(errors)


def decoder_of(case, path):
    return load_path(write_model(path, META["configs"][case]))


def test_goldens_are_of_every_case():
    assert set(META["configs"]) == set(GOLDEN_CASES)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_states_and_logits(case, tmp_path):
    assert worst(case, decoder_of(case, tmp_path)) <= BOUND


MISTAKES = {
    "rope theta": ("llama-gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    "no rope scaling": ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "window off by one": ("mistral-sliding", {"sliding_window": 6}),
    "window in one layer more": ("qwen2-mixed-sliding", {"layer_types": ["sliding_attention"] * 3}),
    "norm epsilon": ("llama-gqa", {"rms_norm_eps": 1e-3}),
    "longrope boundary": ("phi3-longrope", {"original_max_position_embeddings": 20}),
    "no soft cap on attention": ("gemma2", {"attn_logit_softcapping": None}),
    "no soft cap on logits": ("gemma2", {"final_logit_softcapping": None}),
    "scores scaled by the head": ("gemma2", {"query_pre_attn_scalar": 12}),
    "another activation": ("gemma2", {"hidden_activation": "silu"}),
    "every layer with a window": ("gemma2", {"layer_types": ["sliding_attention"] * 3}),
    "base of other layers": ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}}}),
    "no scaling in layers without a window": ("olmo3-yarn", {"rope_parameters": {}, "rope_theta": 500.0}),
    "embeddings not scaled": ("granite", {"embedding_multiplier": 1.0}),
    "halves not scaled": ("granite", {"residual_multiplier": 1.0}),
    "scores not scaled": ("granite", {"attention_multiplier": 8**-0.5}),
    "logits not scaled": ("granite", {"logits_scaling": 1.0}),
    "rotary in a layer without": ("smollm3", {"no_rope_layers": [1, 1, 1]}),
}
# What no file says, by field of ModelConfig.
WRONG_FAMILIES = {
    "weights of norms as they stand": ("gemma3", {"norm_offset": 0.0}),
    "offset of a norm without": ("olmo2", {"norm_offset": 1.0}),
    "embeddings of Gemma not scaled": ("gemma3", {"embed_scale": 1.0}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, tmp_path):
    """The bound is tight enough to see what is most easily got wrong."""
    case, changes = MISTAKES[mistake]
    right = decoder_of(case, tmp_path)
    wrong = ModelConfig.from_hf({**META["configs"][case], **changes})
    assert worst(case, Decoder(wrong, right.weights())) > 20 * BOUND


@pytest.mark.parametrize("mistake", WRONG_FAMILIES)
def test_a_mistake_in_a_row_shows(mistake, tmp_path):
    case, changes = WRONG_FAMILIES[mistake]
    right = decoder_of(case, tmp_path)
    assert worst(case, Decoder(dataclasses.replace(right.config, **changes), right.weights())) > 20 * BOUND


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_norm_by_head_instead_of_over_all_heads_shows(name, tmp_path, monkeypatch):
    right = decoder_of("olmo2", tmp_path)
    assert right.weights()[f"blocks.{name}"].ndim == 2
    norm = Block.norm

    def by_head(self, x, asked):
        if asked != name:
            return norm(self, x, asked)
        heads = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        normed = rms_norm(heads, jnp.ones(self.config.head_dim), self.config)
        return normed.reshape(x.shape) * getattr(self, name)[...]

    monkeypatch.setattr(Block, "norm", by_head)
    # Another config, or the program compiled before would be taken.
    assert worst("olmo2", Decoder(dataclasses.replace(right.config, max_length=65), right.weights())) > 20 * BOUND
