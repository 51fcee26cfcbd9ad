"""ModelConfig: what the one decoder needs to know, read from a Hugging Face ``config.json`` and nothing guessed.

Every key of the file is in one of three lists: handled, ignorable, or refused by name. A key that is
silently dropped gives a wrong model without an error (RoPE scaling was lost so in more than one library).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.models.attention import REFERENCE, Attention
from jaxcrit.models.families import ARCHITECTURES, FAMILIES, Family
from jaxcrit.models.rope import Rope

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HANDLED = {
    *_REQUIRED,
    "model_type",
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
}
# No effect on the forward pass of inference; dropout acts in transformers' training mode alone.
_IGNORABLE = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "auto_map",
    "_attn_implementation",
    "attn_implementation",
    "output_attentions",
    "return_dict",
    "output_hidden_states",
    "is_llama_config",
    "unsloth_fixed",
    "unsloth_version",
    "task_specific_params",
    "id2label",
    "label2id",
    "_attn_implementation_autoset",
    "torchscript",
    "chunk_size_feed_forward",
    "problem_type",
    "is_encoder_decoder",
    "transformers.js_config",
    "model_name",
    "library_name",
}
# Keys that are harmless at one value and change the model at any other.
_ONLY = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "use_bias": (False, None),
    "add_cross_attention": (False, None),
    "no_rope_layers": (None,),
    "use_mrope": (False, None),
    "quantization_config": (None,),
}
_MIXTURE = ("num_experts", "num_local_experts", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder-only model.

    Attributes:
        family: model type, a key of `FAMILIES`.
        vocab_size, num_layers, width, ff_width, num_heads, num_kv_heads, head_dim: sizes.
        norm_eps: epsilon of every RMSNorm.
        max_length: longest context the model was made for, in tokens.
        tied: whether the output head is the embedding.
        qkv_bias, out_bias, mlp_bias, qk_norm: which optional weights exist.
        windows: per layer, how many tokens back attention sees (itself included); None sees all.
        rope: rotary position embedding.
        bos_token_id, eos_token_ids: ids in the config; generation stops at the latter.
        hf_json: the file's own content, given back by `to_hf`.
        attention: how it is computed here; not of the file.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    ff_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_length: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Rope
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    hf_json: str = dataclasses.field(repr=False)
    attention: Attention = REFERENCE

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads the content of a ``config.json`` (transformers 4 or 5).

        Raises:
            UserError: an architecture, key or value that the decoder does not know, named.
        """
        family = _family(raw, where)
        kind = FAMILIES[family]
        _refuse_unknown(raw, where)
        given = {**kind.defaults, **{key: value for key, value in raw.items() if value is not None}}
        if "sliding_window" in raw:  # null is a value here: Mistral 0.2 and later switch the window off with it
            given["sliding_window"] = raw["sliding_window"]
        sizes = {}
        for key in (*_REQUIRED, "max_position_embeddings"):
            sizes[key] = _positive(given.get(key), key, where)
        heads = sizes["num_attention_heads"]
        kv_heads = _positive(given.get("num_key_value_heads", heads), "num_key_value_heads", where)
        if heads % kv_heads:
            raise UserError(
                f"{where}: expected num_attention_heads ({heads}) to be a multiple of num_key_value_heads ({kv_heads})"
            )
        head_dim = _positive(given.get("head_dim", sizes["hidden_size"] // heads), "head_dim", where)
        if given.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"{where}: expected hidden_act 'silu', got {given['hidden_act']!r}")
        eps = given["rms_norm_eps"]
        if isinstance(eps, bool) or not isinstance(eps, int | float) or eps < 0:
            raise UserError(f"{where}: expected rms_norm_eps to be a number of 0 or more, got {eps!r}")
        bias = bool(given.get("attention_bias", False)) and kind.biases
        eos = given.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=sizes["vocab_size"],
            num_layers=sizes["num_hidden_layers"],
            width=sizes["hidden_size"],
            ff_width=sizes["intermediate_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(eps),
            max_length=sizes["max_position_embeddings"],
            tied=bool(given.get("tie_word_embeddings", False)),
            qkv_bias=bias or kind.qkv_bias,
            out_bias=bias,
            mlp_bias=bool(given.get("mlp_bias", False)) and kind.mlp_bias,
            qk_norm=kind.qk_norm,
            windows=_windows(given, kind, sizes["num_hidden_layers"], where),
            rope=Rope.from_hf(given, head_dim, sizes["max_position_embeddings"], kind.longrope, where),
            bos_token_id=given.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            hf_json=json.dumps(dict(raw), ensure_ascii=False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of the file this was read from."""
        return json.loads(self.hf_json)


def _family(raw: Mapping[str, Any], where: str) -> str:
    named = str(raw.get("model_type", ""))
    architectures = raw.get("architectures") or []
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise UserError(f"{where}: quantised checkpoint ({method}); expected float weights: use the original model")
    mixture = [key for key in _MIXTURE if raw.get(key)]
    if mixture or "moe" in named.lower() or "mixtral" in named.lower():
        raise UserError(
            f"{where}: mixture-of-experts model ({named}); expected a dense decoder: {listed(list(FAMILIES))}"
        )
    family = named or (ARCHITECTURES.get(architectures[0], "") if architectures else "")
    if family not in FAMILIES:
        shown = repr(named) if named else f"architectures {architectures}"
        raise UserError(
            f"{where}: expected model_type {listed(sorted(FAMILIES))}, got {shown}{did_you_mean(family, FAMILIES)}"
        )
    unknown = [name for name in architectures if ARCHITECTURES.get(name) != family]
    if unknown:
        wanted = FAMILIES[family].architecture
        raise UserError(f"{where}: expected architecture {wanted} for {family}, got {listed(unknown)}")
    return family


def _refuse_unknown(raw: Mapping[str, Any], where: str) -> None:
    unknown = sorted(set(raw) - _HANDLED - _IGNORABLE - set(_ONLY))
    if unknown:
        hint = did_you_mean(unknown[0], _HANDLED)
        raise UserError(f"{where}: unknown keys {listed(unknown)}{hint}; they may change the model, so it is refused")
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{where}: expected {key} to be {allowed[0]!r}, got {raw[key]!r}")


def _windows(given: Mapping[str, Any], family: Family, num_layers: int, where: str) -> tuple[int | None, ...]:
    window = given.get("sliding_window") if family.window != "never" else None
    if family.window == "switch":
        window = window if given.get("use_sliding_window", False) else None
        first = given.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise UserError(f"{where}: expected max_window_layers to be a whole number, got {first!r}")
        kinds = given.get("layer_types") or [
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    else:
        kinds = given.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * num_layers
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange or len(kinds) != num_layers:
        raise UserError(
            f"{where}: expected {num_layers} layer_types of full_attention or sliding_attention,"
            f" got {len(kinds)} with {strange or 'no other kind'}"
        )
    if "sliding_attention" in kinds:
        window = _positive(window, "sliding_window", where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: expected {key} to be a positive whole number, got {value!r}")
    return value
