"""ModelConfig: what the one decoder needs to know, read from a Hugging Face ``config.json`` and nothing guessed.

A key that is silently dropped gives a wrong model without an error (RoPE scaling was lost so in more than one library):
`jaxcrit.models.config_keys` says which may be ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxcrit.core.errors import UserError
from jaxcrit.models.attention import REFERENCE, Attention
from jaxcrit.models.config_keys import Reads, check_rotary, family_of, ignored_keys, without_marks
from jaxcrit.models.families import FAMILIES, Family
from jaxcrit.models.rope import Rope

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ELSEWHERE = ("dtype", "torch_dtype", "pad_token_id")  # the files say what they hold; rows are padded behind their end


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
        ignored: keys of the file that play no part, by name.
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
    ignored: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads the content of a ``config.json`` (transformers 4 or 5).

        Raises:
            UserError: an architecture, key or value that the decoder does not know, named.
        """
        family = family_of(raw, where)
        kind = FAMILIES[family]
        given = Reads({**kind.defaults, **{key: value for key, value in raw.items() if value is not None}})
        for key in ("sliding_window", "num_key_value_heads"):  # null is a value here: no window, as many as heads
            if key in raw:
                given[key] = raw[key]
        for key in ("rope_scaling", "rope_parameters"):
            given[key] = without_marks(given, key)
        sizes = {}
        for key in (*_REQUIRED, "max_position_embeddings"):
            sizes[key] = _positive(given.get(key), key, where)
        heads = sizes["num_attention_heads"]
        kv_heads = given.get("num_key_value_heads")
        kv_heads = heads if kv_heads is None else _positive(kv_heads, "num_key_value_heads", where)
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
        bias = kind.biases and bool(given.get("attention_bias", False))
        eos = given.get("eos_token_id")
        if given.get("original_max_position_embeddings") is not None:
            _positive(given["original_max_position_embeddings"], "original_max_position_embeddings", where)
        rope = Rope.from_hf(given, head_dim, sizes["max_position_embeddings"], kind.longrope, where)
        if kind.longrope and rope.kind not in ("default", "longrope"):
            raise UserError(f"{where}: expected rope_type default or longrope for {family}, got {rope.kind!r}")
        check_rotary(rope.rotary_dim, head_dim, family, where)
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
            mlp_bias=kind.mlp_bias and bool(given.get("mlp_bias", False)),
            qk_norm=kind.qk_norm,
            windows=_windows(given, kind, sizes["num_hidden_layers"], where),
            rope=rope,
            bos_token_id=given.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            hf_json=json.dumps(dict(raw), ensure_ascii=False),
            ignored=ignored_keys(raw, {*given.read, *_ELSEWHERE}, family, where),  # last: all that is read has been
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of the file this was read from."""
        return json.loads(self.hf_json)


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
        kinds = ["full_attention" if window is None else "sliding_attention"] * num_layers
        if given.get("layer_types") not in (None, kinds):  # transformers masks all layers alike, whatever they say
            raise UserError(
                f"{where}: expected no layer_types, or {kinds[0]} for each of {num_layers} layers, as sliding_window"
                f" says; got {given['layer_types']}"
            )
    if not isinstance(kinds, list):
        raise UserError(f"{where}: expected layer_types to be a list, got {kinds!r}")
    strange = sorted(set(map(str, kinds)) - {"full_attention", "sliding_attention"})
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
