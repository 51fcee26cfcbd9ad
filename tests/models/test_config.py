"""What is read from config.json, what is ignored by name, and every refusal of what is not understood."""

import csv
import dataclasses
import itertools
import json
import math

import pytest
from conftest import SHARED
from support.family_models import BASE, CASES, raw_config

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.config_keys import recorded
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.weights import hf_shapes, offsets, table


def read(**changes):
    """Reads a small LLaMA config with some keys changed; Ellipsis leaves a key out."""
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **BASE, **changes}
    return ModelConfig.from_hf({key: value for key, value in raw.items() if value is not ...}, "DIR/config.json")


def meaning(config):
    return {name: value for name, value in vars(config).items() if name != "hf_json"}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    raw = raw_config(case)
    config = ModelConfig.from_hf(raw)
    assert config.to_hf() == raw
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_sizes_are_read_not_derived():
    config = read(head_dim=12, num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=[2, 7], bos_token_id=1)
    assert (config.head_dim, config.num_kv_heads, config.num_layers, config.width) == (12, 1, 3, 32)
    assert (config.tied, config.eos_token_ids, config.bos_token_id, config.max_length) == (True, (2, 7), 1, 64)
    assert read(quantization_config=None) and read(head_dim=...).head_dim == 8
    assert read(num_key_value_heads=...).num_kv_heads == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
            {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        (
            {"model_type": "phi3", "architectures": ..., "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        ),
    ],
)
def test_old_rope_keys_mean_the_same_as_new_ones(old, new):
    kind = {key: old[key] for key in ("model_type", "architectures") if key in old}
    assert meaning(read(**old)) == meaning(read(**kind, rope_parameters=new))
    assert meaning(read(**old)) == meaning(read(**old, rope_parameters=new))


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_names_early_phi3_files_give_longrope(name):
    scaling = {"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = ModelConfig.from_hf(
        {**BASE, "model_type": "phi3", "original_max_position_embeddings": 16, "rope_scaling": scaling}
    )
    assert (config.rope.kind, config.rope.boundary) == ("longrope", 16)


def test_a_boundary_that_phi3_does_not_read():
    """transformers takes the one at the top, 4,096 where the file is silent, whatever stands in rope_scaling."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    raw = {**BASE, "model_type": "phi3", "rope_scaling": {**scaling, "original_max_position_embeddings": 16}}
    assert ModelConfig.from_hf(raw).rope.boundary == 4096


def test_windows_by_family():
    def windows(family, **changes):
        return ModelConfig.from_hf({**BASE, "model_type": family, **changes}).windows

    assert windows("llama", layer_types=["full_attention"] * 3) == (None, None, None)
    assert windows("mistral", sliding_window=4, layer_types=["sliding_attention"] * 3) == (4, 4, 4)
    assert windows("mistral") == (4096, 4096, 4096)
    assert windows("mistral", sliding_window=None) == (None, None, None)
    assert windows("phi3") == (None, None, None)
    assert windows("qwen2", sliding_window=4) == (None, None, None)
    assert windows("qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=2) == (None, None, 4)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows("qwen3", sliding_window=4, use_sliding_window=True, layer_types=kinds) == (4, None, None)
    assert windows("gemma2", sliding_window=4) == (4, None, 4)
    assert windows("gemma2", sliding_window=4, layer_types=kinds) == (4, None, None)
    assert windows("gemma3_text", sliding_window=4) == (4, 4, 4)
    assert windows("gemma3_text", sliding_window=4, sliding_window_pattern=3) == (4, 4, None)
    assert windows("olmo3", num_hidden_layers=4) == (4096, 4096, 4096, None)
    assert windows("olmo2") == windows("granite") == (None, None, None)
    still = {"no_rope_layers": [1, 0, 1], "sliding_window": 4}
    assert windows("smollm3", **still) == (None, None, None)
    assert windows("smollm3", **still, use_sliding_window=True) == (None, 4, None)


def test_rotations_by_layer():
    def of(family, **changes):
        config = ModelConfig.from_hf({**BASE, "model_type": family, **changes})
        return config.rotations, [rope.kind for rope in (config.rope, *config.rope.others)]

    assert of("llama") == ((0, 0, 0), ["default"])
    assert of("smollm3", no_rope_layer_interval=2) == ((0, 1, 0), ["default", "none"])
    assert of("smollm3", no_rope_layers=[0, 0, 0]) == ((0, 0, 0), ["none"])
    assert of("smollm3", no_rope_layers=[1, 1, 1, 0]) == ((0, 0, 0), ["default"])
    assert of("gemma3_text", sliding_window_pattern=2) == ((1, 0, 1), ["default", "default"])
    assert of("gemma3_text", sliding_window_pattern=2, rope_local_base_freq=1e6) == ((0, 0, 0), ["default"])
    assert of("gemma3_text", layer_types=["sliding_attention"] * 3) == ((0, 0, 0), ["default"])
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_hidden_layers": 4}
    assert of("olmo3", **linear) == ((1, 1, 1, 0), ["linear", "default"])
    assert of("olmo3", num_hidden_layers=4) == ((0, 0, 0, 0), ["default"])


def test_keys_of_other_families_are_not_read():
    """A soft cap or a scale acts in the families that have it; elsewhere it is refused, unless it says nothing."""
    assert read(attn_logit_softcapping=None).attention_cap is None
    gemma = {**BASE, "model_type": "gemma3_text", "attn_logit_softcapping": None}
    assert ModelConfig.from_hf(gemma).attention_cap is None
    assert ModelConfig.from_hf({**BASE, "model_type": "gemma2", "hidden_act": "relu"}).activation == "gelu_pytorch_tanh"


REFUSED = {
    "architecture": ({"model_type": "gpt2"}, "olmoe, phi3, qwen2, qwen3, qwen3_moe, smollm3, got 'gpt2'"),
    "near architecture": ({"model_type": "lama"}, "did you mean 'llama'"),
    "no architecture": ({"model_type": ..., "architectures": ...}, "expected model_type"),
    "other head": ({"architectures": ["LlamaForSequenceClassification"]}, "expected architecture LlamaForCausalLM"),
    "soft cap": ({"final_logit_softcap": 30.0}, "final_logit_softcap is 30.0, which claims a soft cap"),
    "bias of the head": ({"lm_head_bias": True}, "lm_head_bias is True, which claims a bias; transformers ignores it"),
    "bias elsewhere": ({"model_type": "mistral", "architectures": ..., "attention_bias": True}, "claims a bias"),
    "bias of the MLP": ({"model_type": "qwen3", "architectures": ..., "mlp_bias": True}, "mlp_bias is True"),
    "cross attention": ({"add_cross_attention": True}, "cross attention"),
    "a decoder of another": ({"is_decoder": True}, "is_decoder is True"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}, which claims pruned heads"),
    "multiplier": ({"embedding_multiplier": 12.0}, "claims another scale"),
    "a draft head": ({"draft_vocab_size": 40}, "claims a draft head, not a model"),
    "layers without rotary": ({"no_rope_layers": [1, 1, 0]}, "claims another position embedding"),
    "no list of layers": (
        {"model_type": "qwen2", "architectures": ..., "layer_types": True},
        "layer_types to be a list",
    ),
    "no list of architectures": ({"architectures": "LlamaForCausalLM"}, "expected architectures to be a list"),
    "attention to what comes": ({"is_causal": False}, "is_causal is False, which changes a llama model"),
    "RoPE that Phi-3 has not": (
        {"model_type": "phi3", "architectures": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
        "expected rope_type default or longrope for phi3, got 'linear'",
    ),
    "more than a head": (
        {"model_type": "phi3", "architectures": ..., "partial_rotary_factor": 2.0},
        "expected at most 8 rotary dimensions, those of a head; got 16",
    ),
    "boundary of RoPE": ({"original_max_position_embeddings": "x"}, "expected original_max_position_embeddings to be"),
    "part of each head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor asks for 4 of 8 rotary dimensions"),
    "part of each head, new": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "transformers rotates all of them in a llama model",
    ),
    "read by transformers": ({"per_layer_config": {"0": {}}}, "per_layer_config is {'0': {}}, which changes a llama"),
    "window of a cache": ({"sliding_window": 4}, "sliding_window is 4, which changes a llama model in transformers"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "quantised checkpoint (MLX, by quantization)"),
    "compressed": ({"compression_config": {"quant_method": "sparse"}}, "quantised checkpoint (sparse"),
    "layer types that nobody reads": (
        {"model_type": "phi3", "architectures": ..., "layer_types": ["full_attention", "sliding_attention"] * 2},
        "expected no layer_types, or full_attention for each of 3 layers",
    ),
    "experts": ({"num_local_experts": 8}, "mixture-of-experts"),
    "another mixture": ({"model_type": "phimoe"}, "mixture-of-experts model (phimoe); of mixtures olmoe, qwen3_moe,"),
    "qwen2_moe": ({"model_type": "qwen2_moe"}, "Qwen2-MoE (qwen2_moe) is not read, for a shared expert with a gate"),
    "deepseek": (
        {"model_type": "deepseek_v3", "n_routed_experts": 256},
        "DeepSeek-V3 (deepseek_v3) is not read, for shared experts stand beside those that are routed, and its first",
    ),
    "layers without experts": (
        {"model_type": "qwen3_moe", "architectures": ..., "mlp_only_layers": [0]},
        "mlp_only_layers is [0], which changes a qwen3_moe model",
    ),
    "every other layer with experts": (
        {"model_type": "qwen3_moe", "architectures": ..., "decoder_sparse_step": 2},
        "decoder_sparse_step is 2, which changes a qwen3_moe model",
    ),
    "clipped": ({"model_type": "olmoe", "architectures": ..., "clip_qkv": 8.0}, "clip_qkv is 8.0, which changes"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised checkpoint (gptq, by quantization_config)",
    ),
    "activation": ({"hidden_act": "gelu"}, "expected hidden_act silu, swish, gelu_pytorch_tanh, got 'gelu'"),
    "activation's other key": (
        {"model_type": "gemma2", "architectures": ..., "hidden_activation": "gelu"},
        "expected hidden_activation silu, swish, gelu_pytorch_tanh, got 'gelu'",
    ),
    "granite 4": (
        {"model_type": "granitemoehybrid", "num_local_experts": 0},
        "Granite 4 (granitemoehybrid) is not read",
    ),
    "ministral 3": ({"model_type": "ministral3"}, "Ministral 3 (ministral3) is not read, for its queries are scaled"),
    "gemma 3 that sees": ({"model_type": "gemma3"}, "Gemma 3 with images (gemma3) is not read"),
    "cap of another family": (
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0, which claims a soft cap",
    ),
    "scale of another family": ({"logits_scaling": 8.0}, "logits_scaling is 8.0, which claims another scale"),
    "cap": (
        {"model_type": "gemma2", "architectures": ..., "final_logit_softcapping": -1},
        "expected final_logit_softcapping to be a positive number, got -1",
    ),
    "scale": (
        {"model_type": "granite", "architectures": ..., "residual_multiplier": "x"},
        "expected residual_multiplier to be a positive number, got 'x'",
    ),
    "rotary of other layers": (
        {"model_type": "smollm3", "architectures": ..., "no_rope_layers": [1, 0]},
        "expected no_rope_layers of 3 layers, 1 for those with rotary positions, got [1, 0]",
    ),
    "every no-th layer": (
        {"model_type": "smollm3", "architectures": ..., "no_rope_layer_interval": 0},
        "expected no_rope_layer_interval to be a positive whole number, got 0",
    ),
    "pattern": (
        {"model_type": "gemma3_text", "architectures": ..., "sliding_window_pattern": 0},
        "expected sliding_window_pattern to be a positive whole number",
    ),
    "window switched off under a pattern": (
        {"model_type": "gemma2", "architectures": ..., "sliding_window": None},
        "expected sliding_window to be a positive whole number, got None",
    ),
    "rope not by kind": (
        {"model_type": "gemma3_text", "architectures": ..., "rope_parameters": {"rope_theta": 1e4}},
        "expected rope_parameters by kind of layer (full_attention and sliding_attention), got {'rope_theta'",
    ),
    "two rotary widths": (
        {
            "model_type": "olmo3",
            "architectures": ...,
            "rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}},
        },
        "as many rotary dimensions in all",
    ),
    "both ways": (
        {"model_type": "gemma3_text", "architectures": ..., "use_bidirectional_attention": True},
        "use_bidirectional_attention is True, which changes a gemma3_text model",
    ),
    "size": ({"hidden_size": "32"}, "expected hidden_size to be a positive whole number, got '32'"),
    "no size": ({"num_hidden_layers": ...}, "expected num_hidden_layers"),
    "zero layers": ({"num_hidden_layers": 0}, "expected num_hidden_layers"),
    "heads": ({"num_key_value_heads": 3}, "multiple of num_key_value_heads (3)"),
    "odd rotary": ({"head_dim": 5}, "even number of rotary dimensions, got 5"),
    "rope kind": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
    "rope kind near": ({"rope_scaling": {"rope_type": "lama3"}}, "did you mean 'llama3'"),
    "rope key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "ntk": 1}}, "unknown RoPE keys ntk"),
    "rope key of another kind": ({"rope_scaling": {"type": "default", "factor": 2.0}}, "unknown RoPE keys factor"),
    "rope lacks": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs high_freq_factor, low_freq_factor"),
    "rope no object": ({"rope_scaling": 2.0}, "expected rope_scaling and rope_parameters to be objects"),
    "theta twice": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0 at the top"),
    "factor twice": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "factor is 2.0 in rope_scaling and 4.0 in rope_parameters",
    ),
    "kind twice": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "rope_type is 'linear' in rope_scaling and 'default' in rope_parameters",
    ),
    "theta in the one that is not read": (
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
        "rope_theta is None in rope_scaling and 70.0 in rope_parameters",
    ),
    "nested rope": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "unknown RoPE keys full_attention",
    ),
    "factors": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}},
        "expected short_factor to be a list of 4 positive numbers, got 3: 1.0, 1.0, 1.0",
    ),
    "factor words": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": ["a"] * 4, "long_factor": [1.0] * 4}},
        "expected short_factor to be a list of 4 positive numbers",
    ),
    "factor no list": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 4}},
        "expected short_factor to be a list of 4 positive numbers, got 1.0",
    ),
    "theta": ({"rope_theta": "big"}, "expected rope_theta to be a positive number, got 'big'"),
    "factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "expected factor to be a positive number"),
    "too many layers": (
        {"num_hidden_layers": 2**31},
        "expected num_hidden_layers to be a whole number of at most 10,000",
    ),
    "wide heads": ({"head_dim": 2**53}, "expected head_dim to be a whole number of at most 65,536"),
    "endless rotary": (
        {"model_type": "phi3", "architectures": ..., "partial_rotary_factor": 1e300},
        "expected at most 8 rotary dimensions",
    ),
    "a size beyond all files": ({"hidden_size": 2**63}, "expected hidden_size to be a whole number of at most"),
    "epsilon beyond floats": ({"rms_norm_eps": 10**400}, "expected rms_norm_eps to be a number of 0 or more"),
    "epsilon NaN": ({"rms_norm_eps": math.nan}, "expected rms_norm_eps to be a number of 0 or more, got nan"),
    "theta NaN": ({"rope_theta": math.nan}, "expected rope_theta to be a positive number, got nan"),
    "factor infinite": (
        {"rope_scaling": {"type": "linear", "factor": math.inf}},
        "factor to be a positive number, got inf",
    ),
    "boundary a fraction": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 1.5}},
        "expected original_max_position_embeddings to be a positive whole number, got 1.5",
    ),
    "frequencies of no theta": (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "the parameters of RoPE (yarn) give no frequencies",
    ),
    "frequencies of a context of one token": (
        {
            "max_position_embeddings": 1,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
                "factor": 2.0,
            },
        },
        "the parameters of RoPE (longrope) give no frequencies",
    ),
    "frequencies beyond floats": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1e-60] * 4, "long_factor": [1.0] * 4}},
        "give frequencies that are no finite numbers",
    ),
    "tied by a word": (
        {"tie_word_embeddings": "false"},
        "expected tie_word_embeddings to be true or false, got 'false'",
    ),
    "biased by a number": ({"attention_bias": 1}, "expected attention_bias to be true or false, got 1"),
    "stop an object": ({"eos_token_id": {"a": 1}}, "expected eos_token_id to be a whole number of 0 or more or a list"),
    "stop a list of words": ({"eos_token_id": [1, "x"]}, "expected eos_token_id[1] to be a whole number of 0 or more"),
    "start a list": ({"bos_token_id": [1]}, "expected bos_token_id to be a whole number of 0 or more, got [1]"),
    "architectures nested": (
        {"model_type": ..., "architectures": [[]]},
        "expected architectures[0] to be text, got []",
    ),
    "family a number": ({"model_type": 3}, "expected model_type to be text, got 3"),
    "activation a list": ({"hidden_act": ["silu"]}, "expected hidden_act to be text, got ['silu']"),
    "marks nested": (
        {"model_type": "smollm3", "architectures": ..., "no_rope_layers": [[], 0, 1]},
        "expected no_rope_layers[0] to be a whole number, got []",
    ),
    "epsilon": ({"rms_norm_eps": "small"}, "expected rms_norm_eps to be a number"),
    "windowed layers": (
        {"model_type": "qwen2", "architectures": ..., "max_window_layers": "x"},
        "expected max_window_layers to be a whole number",
    ),
    "layer types": ({"model_type": "qwen2", "architectures": ..., "layer_types": ["full_attention"]}, "3 layer_types"),
    "layer type": (
        {"model_type": "qwen2", "architectures": ..., "layer_types": ["chunked_attention"] * 3},
        "chunked_attention",
    ),
    "window": ({"model_type": "mistral", "architectures": ..., "sliding_window": 0}, "expected sliding_window"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_by_name_in_one_line(mistake):
    changes, message = REFUSED[mistake]
    with pytest.raises(UserError) as caught:
        read(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


# Keys of files that people have, none of which says anything of the forward pass.
HARMLESS = {
    "old defaults of generation": {"max_length": 20, "do_sample": False, "top_k": 50, "bad_words_ids": None},
    "defaults of generation that are set": {
        "repetition_penalty": 1.1,
        "temperature": 0.6,
        "cache_implementation": "hybrid",
    },
    "tokenizer": {"tokenizer_class": "LlamaTokenizer", "unk_token_id": 0, "sep_token_id": None, "prefix": None},
    "exporters": {"_commit_hash": "0" * 40, "unsloth_version": "2025.1", "transformers.js_config": {"a": 1}},
    "other heads": {"is_decoder": False, "pruned_heads": {}, "tie_encoder_decoder": False, "id2label": {"0": "A"}},
    "what is returned": {"output_attentions": False, "return_dict": True, "torchscript": False},
    "slices of the same products": {"pretraining_tp": 8},
    "biases that are none": {"lm_head_bias": False, "use_bias": None, "qkv_bias": False},
    "multipliers that are one": {"full_attn_mod": 1, "interpolate_factor": 1, "embedding_multiplier": 1.0},
    "training": {"attention_dropout": 0.1, "initializer_range": 0.02, "gradient_checkpointing": False},
    "a name nobody knows": {"rms_norm_epz": 1e-5, "internal_version": "7b-alpha", "": 1},
    "beside RoPE": {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}},
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_keys_that_play_no_part_are_ignored_by_name(kind):
    plain, found = read(), read(**HARMLESS[kind])
    named = {key for key in HARMLESS[kind] if key != "rope_scaling"} | {
        "rope_scaling.finetuned" for key in HARMLESS[kind] if key == "rope_scaling"
    }
    assert set(found.ignored) == named
    if kind != "beside RoPE":
        assert found == dataclasses.replace(plain, hf_json=found.hf_json)


@pytest.mark.parametrize("name", ["LlamaModel", "LLaMAForCausalLM"])
def test_the_backbone_and_an_old_spelling_are_the_family(name):
    assert read(architectures=[name]).family == "llama"


def test_null_heads_are_as_many_as_queries():
    raw = {**BASE, "model_type": "mistral"}
    assert ModelConfig.from_hf({**raw, "num_key_value_heads": None}).num_kv_heads == 4


def test_every_family_is_recorded():
    assert recorded().keys() >= FAMILIES.keys()
    for family in FAMILIES:
        changes = recorded()[family]["changes"]
        assert {"hidden_size", "rms_norm_eps", "num_key_value_heads"} <= changes.keys(), family
        # Parameters by kind of layer have no value of silence that others could be held against.
        assert "rope_parameters" in changes or FAMILIES[family].window_theta is not None
        assert "initializer_range" in recorded()[family]["inert"]


CORPUS = SHARED / "configs"


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/configs")
def test_real_files_are_accepted_or_refused_for_what_they_are():
    """Of a family that is not here yet, the refusal names the family; nothing else may keep a file out."""
    wrong = []
    for row in csv.DictReader((CORPUS / "TABLE.csv").read_text(encoding="utf-8").splitlines()):
        raw = json.loads((CORPUS / row["file"]).read_text(encoding="utf-8"))
        right = row["right"].partition(":")[0].split(" ")[0]
        about = {
            "refuse: quantised": "quantised checkpoint",
            "refuse: a draft head, not a model": "a draft head, not a model",
            "refuse: rope kind dynamic, or accept within the context": "got 'dynamic'",
        }.get(row["right"], "expected model_type|mixture-of-experts|is not read, for")
        if right == "accept" and raw["model_type"] not in FAMILIES:
            right = "refuse"
        try:
            ModelConfig.from_hf(raw)
            said = ""
        except UserError as refusal:
            said = str(refusal)
        if bool(said) != (right == "refuse") or (said and not any(part in said for part in about.split("|"))):
            wrong.append(f"{row['file']}: {row['right']}: {said or 'accepted'}")
    assert not wrong, "\n".join(wrong)


def test_weight_table_covers_each_tensor_once():
    """Rows of a fused tensor lie one behind the other and fill it; no path occurs twice."""
    for case, fused in itertools.product(CASES, (False, True)):
        config = dataclasses.replace(ModelConfig.from_hf(raw_config(case)), fused_experts=fused)
        rows, begin, shapes = table(config), offsets(config), hf_shapes(config)
        assert len({row.path for row in rows}) == len(rows)
        filled = {}
        for row in rows:
            assert begin[row.path] == filled.get(row.hf, 0)
            filled[row.hf] = begin[row.path] + row.hf_shape(config)[0]
        assert {name.format(0, 0): size for name, size in filled.items()} == {
            name.format(0, 0): shapes[name.format(0, 0)][-2:][0] for name in filled
        }


def test_fused_shapes_of_phi3():
    shapes = hf_shapes(ModelConfig.from_hf(raw_config("phi3-gqa-sliding")))
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == ((4 + 2 + 2) * 8, 32)
    assert shapes["model.layers.2.mlp.gate_up_proj.weight"] == (2 * 48, 32)
