"""A random LLaMA checkpoint directory small enough to run inside a test, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import hf_shapes
from support.tiny import tiny_tokenizer_dir

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def tiny_checkpoint(path: Path, *, seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    """Writes config.json, model.safetensors (float32, normal weights) and, unless told not to, a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    shapes = hf_shapes(ModelConfig.from_hf(config))
    save_file(
        {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()},
        path / "model.safetensors",
    )
    if tokenizer:
        tiny_tokenizer_dir(path)
    return path


def prompts_file(path: Path, count: int = 12, seed: int = 0) -> Path:
    """Writes different prompts of mixed length as JSONL."""
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    rows = [{"prompt": f"{i} " + " ".join(rng.choice(words, rng.integers(1, 6)))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
