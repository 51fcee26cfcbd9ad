"""Tiny GGUF files of every architecture, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("gguf") is None and os.environ.get("JAXCRIT_REQUIRE_PARITY") != "1":
    pytest.skip("GGUF files need gguf: pip install -e '.[gguf]'", allow_module_level=True)

import gguf

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import hf_shapes
from support.family_models import recipe

_SIZES = {
    "context_length": 128,
    "block_count": 3,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
# By architecture: the family, what its config.json would say beyond sizes, metadata beyond sizes, kind of tokenizer.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {}, {"rope.dimension_count": 8, "rope.freq_base": 500.0}, "gpt2"),
    "qwen2": ("qwen2", {}, {"rope.freq_base": 500.0}, "gpt2"),
    "qwen3": ("qwen3", {"head_dim": 128}, {"attention.key_length": 128, "rope.dimension_count": 128}, "gpt2"),
    "phi3": ("phi3", {}, {"rope.dimension_count": 8, "rope.scaling.original_context_length": 128}, "llama"),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "tie_word_embeddings": True},
        {"attention.key_length": 8, "attention.sliding_window": 6, "attn_logit_softcapping": 50.0},
        "llama",
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 6},
        {"attention.key_length": 8, "attention.sliding_window": 6},
        "llama",
    ),
}
_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def _vocabulary(kind: str) -> dict[str, Any]:
    """Tokens, and what else a kind of tokenizer has; 300 tokens, the first three of them special."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        special.append("<mask>")  # which Gemma's class in transformers adds where it is not
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = ["▁", *"abcdehilnorst", "he", "ll", "▁t", "▁the", "llo", "▁hello", "  "]
        types = [2, 3, 3, 3, *[6] * 256, *[1] * len(pieces)]
    else:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        alphabet = list(bytes_to_unicode().values())
        pieces = ["he", "ll", "Ġt", "Ġthe", "llo", "hello"]
        types = [3, 3, 3, *[1] * (256 + len(pieces))]
    tokens = [*special, *alphabet, *pieces]
    more = [f"<extra{place}>" for place in range(300 - len(tokens))]
    found = {"tokens": [*tokens, *more], "types": [*types, *[4] * len(more)]}
    if kind == "llama":
        return {**found, "scores": [-float(place) for place in range(300)]}
    return {**found, "merges": ["h e", "l l", "Ġ t", "ll o", "he llo", "Ġt he"]}


def raw_of(architecture: str) -> dict[str, Any]:
    """The ``config.json`` that the model would have."""
    family, further, _, _ = ARCHITECTURES[architecture]
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return {"model_type": family, **sizes, **further}


def tensors_of(architecture: str) -> dict[str, np.ndarray]:
    """The tensors of that model, before they are quantised; norms of Gemma are near 0."""
    config = ModelConfig.from_hf(raw_of(architecture))
    found = {name: recipe(name, shape) for name, shape in hf_shapes(config).items()}
    return {
        name: value - 1 if config.norm_offset and name.endswith("norm.weight") else value
        for name, value in found.items()
    }


def write_gguf(path: Path, architecture: str, *, kind: str = "", without: tuple[str, ...] = (), **changed: Any) -> Path:
    """Writes a file.

    Args:
        path: where.
        architecture: key of `ARCHITECTURES`.
        kind: kind of tokenizer, ``llama`` or ``gpt2``; default the architecture's.
        without: metadata and tensors to leave out.
        changed: metadata to write otherwise or besides, ``__`` standing for a dot.
    """
    _, _, further, usual = ARCHITECTURES[architecture]
    kind = kind or usual
    config, words = ModelConfig.from_hf(raw_of(architecture)), _vocabulary(kind)
    writer = gguf.GGUFWriter(path, architecture)
    values = {**_SIZES, "attention.layer_norm_rms_epsilon": 1e-5, **further}
    metadata: dict[str, Any] = {f"{architecture}.{key}": value for key, value in values.items()}
    metadata |= {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}.get(architecture, "default"),
        "tokenizer.ggml.tokens": words["tokens"],
        "tokenizer.ggml.token_type": words["types"],
        **({"tokenizer.ggml.scores": words["scores"]} if "scores" in words else {}),
        **({"tokenizer.ggml.merges": words["merges"]} if "merges" in words else {}),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": _TEMPLATE,
    }
    metadata |= {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in metadata.items():
        if key in without:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, config.num_layers)
    for place, (name, value) in enumerate(tensors_of(architecture).items()):
        stem, _, end = name.rpartition(".")
        stored = f"{known.get_name(stem)}.{end}"
        if stored in without:
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = value.reshape(-1, 2, config.head_dim // 2, 32).swapaxes(1, 2).reshape(value.shape)
        if config.norm_offset and name.endswith("norm.weight"):
            value = value + 1
        types = gguf.GGMLQuantizationType
        kind_of = types.F32 if value.ndim == 1 else (types.Q8_0, types.Q4_1, types.F16, types.BF16)[place % 4]
        writer.add_tensor(stored, gguf.quants.quantize(value, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
