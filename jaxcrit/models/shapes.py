"""Shapes of well-known models, for planning without their files; the keys are those of their ``config.json``."""

from __future__ import annotations

import re
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import local_path, read_object
from jaxcrit.models.adapters import place_of
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.shards import ADAPTER

_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    family: str, width: int, ff: int, layers: int, heads: int, kv: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "llama2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama2-70b": _shape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3.2-1b": _shape(
        "llama",
        2048,
        8192,
        16,
        32,
        8,
        128256,
        131072,
        tie_word_embeddings=True,
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA31, "factor": 32.0},
    ),
    "llama3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 131072, rope_theta=500000.0, rope_scaling=_LLAMA31),
    "llama3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 131072, rope_theta=500000.0, rope_scaling=_LLAMA31),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1000000.0, sliding_window=None),
    "phi3-mini": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 4096),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, rope_theta=1000000.0),
    "gemma2-2b": _shape("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, tie_word_embeddings=True),
    "gemma3-1b": _shape(
        "gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, tie_word_embeddings=True, sliding_window=512
    ),
    "olmo2-7b": _shape("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096, rope_theta=500000.0),
    "smollm3-3b": _shape(
        "smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, tie_word_embeddings=True, rope_theta=5000000.0
    ),
    "olmoe-1b-7b": _shape(
        "olmoe", 2048, 1024, 16, 16, 16, 50304, 4096, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False
    ),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        151936,
        40960,
        rope_theta=1000000.0,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "mixtral-8x7b": _shape(
        "mixtral",
        4096,
        14336,
        32,
        32,
        8,
        32000,
        32768,
        rope_theta=1000000.0,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, rope_theta=1000000.0, head_dim=128),
}

# Of a hub's names: what says who made it, how it was tuned, how long it reads, which edition it is.
_ASIDE = r"^meta|instruct|chat|base|hf|it$|\bv\d+(\.\d+)?|\b\d+k\b|\b(1124|0924|0125|2507)\b"


def shape_of(name: str) -> str:
    """The key of `SHAPES` that a name of a model stands for, such as ``meta-llama/Llama-3.1-8B-Instruct``; or empty."""
    word = name.rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    plain = re.sub(r"[^a-z0-9]", "", re.sub(_ASIDE, "", word))
    return next((key for key in SHAPES if re.sub(r"[^a-z0-9]", "", key) == plain), "")


def config_of(name: str) -> ModelConfig:
    """The config of a model of which no weights are needed.

    Args:
        name: one of `SHAPES`, a hub's name of one, or a directory with a config.json or an adapter.

    Raises:
        UserError: neither, or a config that is not read here.
    """
    if name in SHAPES:
        return ModelConfig.from_hf(dict(SHAPES[name]), name)
    folder = local_path(name, "model")
    path = (place_of(name).checkpoint if (folder / ADAPTER).is_file() else folder) / "config.json"
    try:
        return ModelConfig.from_hf(read_object(path, "a config.json"), str(path))
    except FileNotFoundError:
        if shape := shape_of(name):
            return config_of(shape)
        raise UserError(
            f"--model={name}: expected a directory with a config.json or one of {', '.join(SHAPES)}"
            f"{did_you_mean(name, SHAPES)}"
        ) from None
