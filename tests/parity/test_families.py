"""Every family and variation against transformers in float32: all hidden states and the logits."""

import dataclasses
import json

import numpy as np
import pytest
import transformers
from support import reference
from support.family_models import BOUND, CASES, error, load_path, raw_config, sequences, states

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.weights import hf_shapes


@pytest.mark.parametrize("case", CASES)
def test_states_and_logits(case, tmp_path):
    model = reference.make(raw_config(case), tmp_path)
    tokens, lengths = sequences(model.config.vocab_size)
    hidden, logits = states(load_path(tmp_path), tokens, lengths)
    worst = 0.0
    for row, length in enumerate(lengths):
        expected_hidden, expected_logits = reference.states(model, tokens[row, :length])
        layers = [error(ours, theirs) for ours, theirs in zip(hidden[:, row, :length], expected_hidden, strict=True)]
        worst = max(worst, *layers, error(logits[row, :length], expected_logits))
    print(f"largest relative error {worst:.1e}")  # shown by pytest -rP
    assert worst <= BOUND


def test_hooks_differ_from_the_normed_state(tmp_path):
    """The trap that the reference avoids: transformers' last hidden state is normed, the layer's own is not."""
    model = reference.make(raw_config("llama-gqa"), tmp_path)
    tokens, lengths = sequences(model.config.vocab_size, lengths=(12,))
    with reference.torch.no_grad():
        normed = model(reference.torch.from_numpy(tokens[:, :12]).long(), output_hidden_states=True).hidden_states[-1]
    hidden, _ = states(load_path(tmp_path), tokens, lengths)
    assert error(hidden[-1, :, :12], normed.numpy()) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_weight_table_names_every_tensor(case):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw_config(case)))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    written = ModelConfig.from_hf(model.config.to_dict())
    assert hf_shapes(dataclasses.replace(written, fused_experts=True)) == theirs
    assert reference.without_file(written) == reference.without_file(ModelConfig.from_hf(raw_config(case)))


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_config_means_what_transformers_assumes(family):
    """Keys a file leaves out, which transformers 5 writes only where they differ from its defaults."""
    theirs = transformers.AutoConfig.for_model(family)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {"model_type": family, **{key: getattr(theirs, key) for key in sizes}}
    full = json.loads(theirs.to_json_string(use_diff=False))
    assert reference.without_file(ModelConfig.from_hf(bare)) == reference.without_file(ModelConfig.from_hf(full))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mistral", "sliding_window"),
        ("qwen2", "num_key_value_heads"),
        ("llama", "head_dim"),
        ("phi3", "sliding_window"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("olmo3", "rope_parameters"),
        ("smollm3", "num_key_value_heads"),
        ("smollm3", "no_rope_layers"),
    ],
)
def test_null_in_config_means_what_transformers_reads(family, key):
    """A null says something else than silence."""
    theirs = transformers.AutoConfig.for_model(family, **{key: None})
    full = json.loads(theirs.to_json_string(use_diff=False))
    assert reference.without_file(ModelConfig.from_hf({**full, key: None})) == reference.without_file(
        ModelConfig.from_hf(full)
    )


def test_frequencies_at_real_sizes():
    """Tiny models see few frequencies: those of the real configs, to the last bits of float32."""
    cases = {
        "llama": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "qwen2": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
        "mistral": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    for family, parameters in cases.items():
        config = transformers.AutoConfig.for_model(
            family, hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, rope_parameters=parameters
        )
        module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
        rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(config)
        ours = ModelConfig.from_hf(config.to_dict()).rope
        np.testing.assert_allclose(ours.frequencies, rotary.inv_freq.numpy(), rtol=3e-7)
        assert ours.scale == pytest.approx(rotary.attention_scaling, rel=1e-7)
