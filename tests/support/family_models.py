"""Tiny checkpoints of every family and rotary kind, with weights that any machine can make again.

Weights come from `numpy.random.RandomState`, whose streams numpy promises never to change, seeded by each
tensor's name: a golden needs only the config. Norm weights and biases are random too, so that leaving one out shows.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxcrit.models.checkpoint import DTYPES, load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.sites import Tap
from jaxcrit.models.weights import hf_shapes
from jaxcrit.parallel.mesh import make_mesh

LENGTH = 24  # tokens of the longest test sequence
BLOCKS = Tap(lambda site, before, after, positions: after, ("block",))  # the stream behind every block
BOUND = 1e-5  # largest |difference| to the reference, relative to its largest |value|

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _longrope(pairs: int) -> dict[str, Any]:
    """Factors that differ by dimension and by side of the boundary, which is at 16 tokens."""
    return {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + 0.1 * i for i in range(pairs)],
            "long_factor": [2 + 0.5 * i for i in range(pairs)],
        },
    }


# What each case changes of BASE, as AutoConfig takes it.
CASES: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-gqa": {"model_type": "llama"},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-head_dim": {"model_type": "llama", "head_dim": 12},
    "llama-theta": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-llama3": {"model_type": "llama", "rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "llama-yarn": {"model_type": "llama", "rope_parameters": _YARN, "head_dim": 16},
    "llama-yarn-mscale": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {
            **_YARN,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
        },
    },
    "llama-yarn-attention_factor": {"model_type": "llama", "rope_parameters": {**_YARN, "attention_factor": 1.3}},
    "llama-longrope": {
        "model_type": "llama",
        "rope_parameters": {
            **_longrope(4)["rope_parameters"],
            "original_max_position_embeddings": 16,
            "attention_factor": 1.1,
        },
    },
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 5},
    "mistral-full-tied": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True, "head_dim": 16},
    "mistral-mqa": {"model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 1},
    "qwen2-mha": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-mixed-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": _YARN},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-mqa-bias": {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1, "attention_bias": True},
    "qwen3-mixed-sliding": {
        "model_type": "qwen3",
        "head_dim": 12,
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "phi3-mha": {"model_type": "phi3", "num_key_value_heads": 4},
    "phi3-gqa-sliding": {"model_type": "phi3", "sliding_window": 7},
    "phi3-longrope": {"model_type": "phi3", **_longrope(4)},
    "phi3-longrope-sliding": {"model_type": "phi3", "sliding_window": 20, "num_key_value_heads": 1, **_longrope(4)},
    "phi4-mini": {"model_type": "phi3", "tie_word_embeddings": True, "partial_rotary_factor": 0.75, **_longrope(3)},
    "phi4-mini-default": {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    # Two layers see a window and one all; caps and scales are such that leaving one out shows.
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma2-uncapped-untied": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2},
    "gemma3-linear-capped": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "final_logit_softcapping": 20.0,
        "rope_theta": 500.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo3-yarn": {
        "model_type": "olmo3",
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
        "tie_word_embeddings": True,
        "mlp_bias": True,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "smollm3-sliding": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 6,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3},
    "olmoe-normed-mha": {
        "model_type": "olmoe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "head_dim": 12,
    },
    "qwen3_moe-sliding": {
        "model_type": "qwen3_moe",
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "mixtral-tied": {
        "model_type": "mixtral",
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
}
# Those with a golden: every family, every rotary kind, every optional weight.
GOLDEN_CASES = (
    "llama-gqa",
    "llama-llama3",
    "llama-yarn",
    "llama-linear",
    "llama-bias",
    "mistral-sliding",
    "qwen2-mixed-sliding",
    "qwen3-tied",
    "phi3-longrope",
    "phi4-mini",
    "gemma2",
    "gemma3",
    "olmo2",
    "olmo3-yarn",
    "granite",
    "smollm3",
    "olmoe",
    "qwen3_moe",
    "mixtral",
)


def raw_config(case: str) -> dict[str, Any]:
    """The content of a case's ``config.json``."""
    pad = {"pad_token_id": 0, "eos_token_id": 2} if CASES[case]["model_type"] in ("phi3", "smollm3") else {}
    return {**BASE, **pad, **CASES[case]}


def recipe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's weights, float32, of the scale that keeps activations near 1 and attention far from uniform."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        draws = 0.3 * draws if name.endswith("bias") else 1 + 0.3 * draws
    elif "embed" not in name:
        draws *= 1.2 / np.sqrt(shape[-1])
    return draws.astype(np.float32)


def tensors(raw: Mapping[str, Any], dtype: str = "float32") -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    # Experts in one tensor of a layer, as transformers holds them: names, and so weights, are those of its state.
    shapes = hf_shapes(dataclasses.replace(ModelConfig.from_hf(raw), fused_experts=True))
    return {name: recipe(name, shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def write_model(path: Path, raw: Mapping[str, Any], dtype: str = "float32") -> Path:
    """Writes a checkpoint directory of one shard."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors(raw, dtype), path / "model.safetensors", metadata={"format": "pt"})
    return path


# (8), (4, 2) and (2, 2, 2) devices: of each axis alone and with the others.
MESHES = ("data=8", "data=4,fsdp=2", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh({"data": 1}, jax.devices()[:1])


def load_path(path: Path, **options: Any) -> Decoder:
    """Opens and loads a directory, on one device unless told otherwise."""
    return load(open_checkpoint(path), **{"mesh": one_device(), **options})


def sequences(vocab_size: int, lengths: tuple[int, ...] = (LENGTH, 11), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B, LENGTH]`` and lengths ``[B]``; what stands behind a sequence's end is random too, not a pad id."""
    tokens = np.random.RandomState(seed).randint(0, vocab_size, (len(lengths), LENGTH))
    return tokens.astype(np.int32), np.array(lengths, np.int32)


@jax.jit
def _states(decoder: Decoder, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = forward(decoder, tokens, lengths=lengths, tap=BLOCKS)
    return out.taps["block"], logits(decoder, out.hidden)


def states(decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states ``[L, B, T, D]`` and logits ``[B, T, V]``, at the highest matmul precision."""
    with jax.default_matmul_precision("highest"):
        hidden, scores = _states(decoder, tokens, lengths)
    return np.asarray(hidden), np.asarray(scores)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference|, relative to the largest |expected|."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())
