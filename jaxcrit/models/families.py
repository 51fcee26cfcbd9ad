"""Families of models: one row each. Nowhere else does anything ask for a family by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_BEFORE = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_EXPERT = {name: f"{name}_proj" for name in ("gate", "up", "down")}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` have in common.

    Attributes:
        architecture: class name in transformers.
        defaults: what transformers' own config class assumes where the file is silent, beyond what all families share.
            A key that only some families have, such as a soft cap, is read where it has a default here.
        biases: which biases ``attention_bias`` switches on: those of q, k, v and o, or none.
        qkv_bias: whether q, k and v have biases whatever the file says.
        mlp_bias: whether ``mlp_bias`` switches biases of the MLP on.
        qk_norm: whether queries and keys are normalised: by ``head``, over ``all`` heads together, or not at all.
        norms: norms of a block: by our name the tensor's. Those called ``attn_norm`` and ``mlp_norm`` are of what a
            half reads, those called ``attn_post_norm`` and ``mlp_post_norm`` of what it adds.
        norm_offset: number added to the weights of norms, which are then applied in float32; None adds nothing and
            applies them in the dtype of compute.
        scaled_embeddings: whether embeddings are multiplied by the square root of the width.
        activation: key of the MLP's activation.
        window: what decides that attention sees a window: ``never``, the ``size`` given, a ``switch`` beside it
            (``use_sliding_window``, from ``max_window_layers`` on), the same in ``unrotated`` layers alone, a switch
            for ``all`` layers, or a ``pattern``: all layers but every ``pattern``-th.
        pattern: period of that pattern, unless the file gives its own ``sliding_window_pattern``.
        fused: tensors of the checkpoint that hold several weights: by weight the tensor's name.
        theta: base of the rotary angles where the file is silent.
        window_theta: the same of layers with a window, in families whose layers have RoPE parameters by their kind.
        longrope: other names that its files give the ``longrope`` kind of RoPE, the only one beside ``default`` then.
        mixture: module of a layer that holds its router and its experts; empty where the MLP is one.
        expert: linear layers of an expert: by our name the tensor's.
        norm_topk: whether the shares of the experts that a token goes to are made to sum to 1 whatever the file says;
            else ``norm_topk_prob`` says so.
    """

    architecture: str
    defaults: Mapping[str, Any]
    biases: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BEFORE)
    norm_offset: float | None = None
    scaled_embeddings: bool = False
    activation: str = "hidden_act"
    window: str = "size"
    pattern: int = 0
    fused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    theta: float = 10000.0
    window_theta: float | None = None
    longrope: tuple[str, ...] = ()
    mixture: str = ""
    expert: Mapping[str, str] = dataclasses.field(default_factory=lambda: _EXPERT)
    norm_topk: bool = False

    def tensor(self, weight: str) -> str:
        """Name of the linear layer in the checkpoint that holds a weight, without ``_proj``."""
        return self.fused.get(weight, weight)


_BEHIND = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_BOTH = {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm", **_BEHIND}
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
}
_OLMO = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
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
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, biases=True, qk_norm="head", window="switch"),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        fused={"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"},
        longrope=("su", "yarn"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        biases=True,
        norms=_BOTH,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation="hidden_activation",
        window="pattern",
        pattern=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        # transformers reads attn_logit_softcapping too, and does nothing with it.
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": None,
        },
        biases=True,
        qk_norm="head",
        norms=_BOTH,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation="hidden_activation",
        window="pattern",
        theta=1e6,
        window_theta=10000.0,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", _OLMO, biases=True, qk_norm="all", norms=_BEHIND, norm_offset=0.0, window="never"
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {**_OLMO, "sliding_window": 4096},
        biases=True,
        qk_norm="all",
        norms=_BEHIND,
        norm_offset=0.0,
        window="pattern",
        pattern=4,
        theta=500000.0,
        window_theta=500000.0,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        biases=True,
        mlp_bias=True,
        window="never",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        biases=True,
        mlp_bias=True,
        window="unrotated",
        theta=2000000.0,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        biases=True,
        qk_norm="all",
        window="never",
        mixture="mlp",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        biases=True,
        qk_norm="head",
        window="all",
        mixture="mlp",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        theta=1000000.0,
        mixture="block_sparse_moe",
        expert={"gate": "w1", "up": "w3", "down": "w2"},
        norm_topk=True,
    ),
}
_SHARED = "shared experts stand beside those that are routed, and its first layers have none"
# Models that people ask for and that need more than a row: by model_type, which they are and what.
REFUSED: Mapping[str, tuple[str, str]] = {
    "granitemoehybrid": ("Granite 4", "some of its layers are state space models (Mamba)"),
    "ministral3": ("Ministral 3", "its queries are scaled by their position"),
    "mistral3": ("Ministral 3", "it reads images, and the queries of its decoder are scaled by their position"),
    "gemma3": ("Gemma 3 with images", "only a text model (gemma3_text) is read"),
    "qwen2_moe": ("Qwen2-MoE", "a shared expert with a gate of its own stands beside those that are routed"),
    **{f"deepseek{end}": (f"DeepSeek{end.upper().replace('_', '-')}", _SHARED) for end in ("", "_v2", "_v3", "_v32")},
}
ARCHITECTURES: Mapping[str, str] = {family.architecture: name for name, family in FAMILIES.items()}
