"""The record of what transformers reads of a config.json: nothing read is left out of it, and what it says holds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support import reference

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.config_keys import recorded

torch = reference.torch
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("config_keys_script", ROOT / "benchmarks" / "config_keys.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_key_that_is_read_is_recorded(script, tmp_path):
    """A transformers that reads another key fails here: run the script again."""
    assert set(script.FAMILIES) == recorded().keys() - {"transformers", "generation"}
    for family in script.FAMILIES:
        raw = {"model_type": family, **script.BASE, **script.MORE.get(family, {})}
        _, read = script.begin(tmp_path / family, raw)
        known = {*recorded()[family]["changes"], *recorded()[family]["inert"], *recorded()["generation"]}
        assert not read - known - script.NOT_KEYS, f"{family} reads {sorted(read - known)} too"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_what_is_refused_changes_the_model_and_what_is_ignored_does_not(script, family, tmp_path):
    """Each key of some that people have, changed in the file: both readers agree, or jaxcrit refuses it."""
    raw = {"model_type": family, **script.BASE, **script.MORE.get(family, {})}
    first, _ = script.begin(tmp_path, raw)
    plain = reference.without_file(ModelConfig.from_hf(raw))
    tried = {
        "attention_bias": True,
        "mlp_bias": True,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "attention_chunk_size": 4,
        "hidden_act": "gelu",
        "rms_norm_eps": 0.1,
        "pretraining_tp": 2,
        "lm_head_bias": True,
        "is_decoder": True,
        "full_attn_mod": 2,
        "tokenizer_class": "X",
        "rope_scaling": {"type": "default", "factor": 2.0},
        "rope_theta": 50.0,
        "max_length": 7,
        "final_logit_softcapping": 3.0,
    }
    refused = set()
    for key, value in tried.items():
        (same,) = script.tried(tmp_path, raw, key, [value], first)
        try:
            config = reference.without_file(ModelConfig.from_hf(json.loads(json.dumps({**raw, key: value}))))
        except UserError:
            refused.add(key)
            continue
        # Where transformers finds tensors missing (biases), it is another model too.
        assert bool(same) == (config == plain), f"{key}: one reader makes another model of it"
    assert {"attention_chunk_size", "lm_head_bias", "final_logit_softcapping", "hidden_act"} <= refused
    assert not {"pretraining_tp", "tokenizer_class", "full_attn_mod", "max_length", "rope_theta"} & refused
