"""Families of models: one row each. Nowhere else does anything ask for a family by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` have in common.

    Attributes:
        architecture: class name in transformers.
        defaults: what transformers' own config class assumes where the file is silent, beyond what all families share.
        biases: which biases ``attention_bias`` switches on: those of q, k, v and o, or none.
        qkv_bias: whether q, k and v have biases whatever the file says.
        mlp_bias: whether ``mlp_bias`` switches biases of the MLP on.
        qk_norm: whether queries and keys are normalised by head.
        window: what decides that attention sees a window: ``never``, the ``size`` given, or a ``switch`` beside it
            (``use_sliding_window``, from ``max_window_layers`` on).
        fused: tensors of the checkpoint that hold several weights: by weight the tensor's name.
        longrope: other names that its files give the ``longrope`` kind of RoPE, the only one beside ``default`` then.
    """

    architecture: str
    defaults: Mapping[str, Any]
    biases: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: str = "size"
    fused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    longrope: tuple[str, ...] = ()

    def tensor(self, weight: str) -> str:
        """Name of the linear layer in the checkpoint that holds a weight, without ``_proj``."""
        return self.fused.get(weight, weight)


_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        biases=True,
        mlp_bias=True,
        window="never",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True, window="switch"),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, biases=True, qk_norm=True, window="switch"),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        fused={"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"},
        longrope=("su", "yarn"),
    ),
}
ARCHITECTURES: Mapping[str, str] = {family.architecture: name for name, family in FAMILIES.items()}
