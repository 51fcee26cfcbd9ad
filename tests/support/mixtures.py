"""Tiny mixtures: one that answers "one two" to every prompt, however its experts are mixed, and others with plants."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxcrit.core.groups import RowOptions
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.model import open_model
from jaxcrit.models.weights import table
from support.tiny_model import tiny_checkpoint

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
WORDS = ("cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is")
RIGHT, WRONG = "one two", "two one"


def answering_mixture(path: Path, **changes: object) -> Path:
    """Writes a mixture of 7 layers and 4 experts whose head reads off each token of the answer the next one.

    Attention and experts add little to the stream, so that losses move with the shares and no answer does.
    """
    model = tiny_checkpoint(path, **{**MIXTRAL, **changes})
    opened = open_model(str(model))
    rows = [{"prompt": "cat is", "response": RIGHT}]
    (example,) = opened.read(RowOptions(), rows, responses=True)[0].examples
    chain = example.token_ids[example.prompt_length - 1 :].tolist()
    assert len(set(chain)) == len(chain) > 2
    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "w2.weight", "down_proj")):
            weights[name] = 0.1 * value
    embed = weights["model.embed_tokens.weight"]
    head = 0.05 * weights["lm_head.weight"]
    for token, behind in itertools.pairwise(chain):
        norm = weights["model.norm.weight"]
        head[behind] = 6 * embed[token] / norm / np.square(embed[token]).sum() ** 0.5
    save_file({**weights, "lm_head.weight": head}, model / "model.safetensors")
    return model


def rows_to_answer(count: int, wrong: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """Different prompts of mixed length; the model answers all but the first ``wrong`` exactly."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"{seed} {row} {' '.join(rng.choice(WORDS, rng.integers(1, 5)))} is",
            "response": WRONG if row < wrong else RIGHT,
        }
        for row in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RAW = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def random_mixture(seed: int = 0, **changes: object) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights of a random mixture, scaled so that answers depend on its experts."""
    config = ModelConfig.from_hf({**RAW, **changes})
    rng = np.random.default_rng(seed)
    weights = {}
    for row in table(config):
        scale = {"blocks.router": 1.0, "blocks.down": 0.4, "head": 0.6}.get(row.path, 0.3)
        value = 1 + 0.1 * rng.standard_normal(row.shape(config)) if row.path.endswith("norm") else None
        weights[row.path] = scale * rng.standard_normal(row.shape(config)) if value is None else value
    return config, {path: value.astype(np.float32) for path, value in weights.items()}
