"""transformers' side of the comparison. Without torch the tests skip; with JAXCRIT_REQUIRE_PARITY=1 they fail."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None and os.environ.get("JAXCRIT_REQUIRE_PARITY") != "1":
    pytest.skip("parity needs torch: pip install -e '.[parity]'", allow_module_level=True)

import torch
import transformers

from jaxcrit.models.config import ModelConfig
from support.family_models import recipe

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


def make(raw: dict[str, Any], path: Path, dtype: Any = torch.float32) -> Any:
    """A transformers model of a config with the recipe's weights, written to path by ``save_pretrained``."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    state = {name: torch.from_numpy(recipe(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model


def read(path: Path, dtype: Any = torch.float32) -> Any:
    """Loads a directory with transformers; every tensor must find its place."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def without_file(config: ModelConfig) -> ModelConfig:
    """A config that compares equal to another of the same meaning, whatever file it was read from."""
    return dataclasses.replace(config, hf_json="", bos_token_id=None, eos_token_ids=())


def states(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one sequence ``[T]``: what each decoder layer returned ``[L, T, D]``, and the logits ``[T, V]``.

    Taken by hooks, for the last entry of ``output_hidden_states`` is after the final norm.
    """
    outputs: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        scores = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(outputs), scores


def response_loss(model: Any, batch: Any) -> tuple[Any, Any]:
    """Of the first micro-batch of a TokenBatch: mean over response tokens, and mean of each sample's mean."""
    tokens = torch.from_numpy(batch.tokens[0].astype(np.int64))
    learn = torch.from_numpy(batch.learn[0])
    scores = model(tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = learn[:, 1:]
    means = (losses * counted).sum(1) / counted.sum(1)
    return losses[counted].mean(), means.mean()
