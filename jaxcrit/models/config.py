"""ModelConfig: what the one decoder needs to know, read from a Hugging Face ``config.json`` and nothing guessed.

A key that is silently dropped gives a wrong model without an error (RoPE scaling was lost so in more than one library):
`jaxcrit.models.config_keys` says which may be ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.schema import Size, conform
from jaxcrit.models.attention import REFERENCE, Attention
from jaxcrit.models.config_keys import Reads, check_rotary, family_of, ignored_keys, without_marks
from jaxcrit.models.families import FAMILIES, Family
from jaxcrit.models.rope import Rope

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ELSEWHERE = ("dtype", "torch_dtype", "pad_token_id")  # the files say what they hold; rows are padded behind their end
# Null is a value here, and no silence: Mistral 0.2 and later switch the window off with it.
_NULLABLE = ("sliding_window", "num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
_KINDS = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder-only model.

    Attributes:
        family: model type, a key of `FAMILIES`.
        vocab_size, num_layers, width, ff_width, num_heads, num_kv_heads, head_dim: sizes.
        norm_eps: epsilon of every RMSNorm.
        max_length: longest context the model was made for, in tokens.
        tied: whether the output head is the embedding.
        qkv_bias, out_bias, mlp_bias: which optional weights exist.
        qk_norm: whether queries and keys are normalised: by ``head``, over ``all`` heads, or (empty) not.
        norms: names of a block's norms, see `Family`.
        norm_offset: number added to norm weights, see `Family`.
        activation: function inside the MLP, ``silu`` or ``gelu_pytorch_tanh``.
        embed_scale: factor on embeddings.
        residual_scale: factor on what each half of a block adds to the stream.
        attention_scale: factor on the scores of attention; None for 1 / sqrt(head_dim).
        attention_cap: c of the soft cap c tanh(score / c) on the scores of attention, or None.
        logit_divisor: number that logits are divided by.
        logit_cap: c of the soft cap on logits, or None.
        windows: per layer, how many tokens back attention sees (itself included); None sees all.
        rope: rotary position embeddings, all that the layers have.
        rotations: per layer, which of them it has: 0 is ``rope`` itself, n the n-th of its ``others``.
        experts: E, experts of each layer, ``ff_width`` wide each; 0 where the MLP is one.
        experts_per_token: experts that a token goes to.
        norm_topk: whether the shares of these are made to sum to 1.
        bos_token_id, eos_token_ids: ids in the config; generation stops at the latter.
        hf_json: the file's own content, given back by `to_hf`.
        attention: how it is computed here; not of the file.
        fused_experts: whether the files hold all experts of a layer in one tensor, and gate and up together, as
            transformers 5 does in memory; else each expert has tensors of its own.
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
    qk_norm: str
    norms: tuple[str, ...]
    norm_offset: float | None
    activation: str
    embed_scale: float
    residual_scale: float
    attention_scale: float | None
    attention_cap: float | None
    logit_divisor: float
    logit_cap: float | None
    windows: tuple[int | None, ...]
    rope: Rope
    rotations: tuple[int, ...]
    experts: int
    experts_per_token: int
    norm_topk: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    hf_json: str = dataclasses.field(repr=False)
    attention: Attention = REFERENCE
    fused_experts: bool = dataclasses.field(default=False, compare=False)
    ignored: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads the content of a ``config.json`` (transformers 4 or 5).

        Raises:
            UserError: an architecture, key or value that the decoder does not know, named.
        """
        family = family_of(raw, where)
        kind = FAMILIES[family]
        given = Reads({**kind.defaults, **{key: value for key, value in raw.items() if value is not None}}, where)
        given |= {key: raw[key] for key in _NULLABLE if key in raw}
        for key in ("rope_scaling", "rope_parameters"):
            given[key] = without_marks(given, key)
        sizes = {}
        for key in (*_REQUIRED, "max_position_embeddings"):
            sizes[key] = _positive(given.get(key), key, where)
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        kv_heads = given.get("num_key_value_heads")
        kv_heads = heads if kv_heads is None else _positive(kv_heads, "num_key_value_heads", where)
        if heads % kv_heads:
            raise UserError(
                f"{where}: expected num_attention_heads ({heads}) to be a multiple of num_key_value_heads ({kv_heads})"
            )
        head_dim = _positive(given.get("head_dim", width // heads), "head_dim", where)
        activation = given.get(kind.activation, "silu")
        if activation not in _ACTIVATIONS:
            raise UserError(f"{where}: expected {kind.activation} {listed(list(_ACTIVATIONS))}, got {activation!r}")
        bias = kind.biases and given.get("attention_bias", False)

        def number(key: str) -> float | None:
            """A positive number that some families have, or None."""
            value = given.get(key) if key in kind.defaults else None
            return None if value is None else float(value)

        per_head, rotated = number("query_pre_attn_scalar"), _rotated(given, kind, sizes["num_hidden_layers"], where)
        windows = _windows(given, kind, rotated, where)
        rope, rotations = _ropes(given, kind, head_dim, windows, rotated, where)
        if kind.longrope and rope.kind not in ("default", "longrope"):
            raise UserError(f"{where}: expected rope_type default or longrope for {family}, got {rope.kind!r}")
        check_rotary(rope.rotary_dim, head_dim, family, where)
        experts, chosen = _experts(given, raw, kind, where)
        inner = "moe_intermediate_size" if "moe_intermediate_size" in kind.defaults else "intermediate_size"
        eos = given.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=sizes["vocab_size"],
            num_layers=sizes["num_hidden_layers"],
            width=width,
            ff_width=_positive(given.get(inner), inner, where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(given["rms_norm_eps"]),
            max_length=sizes["max_position_embeddings"],
            tied=given.get("tie_word_embeddings", False),
            qkv_bias=bias or kind.qkv_bias,
            out_bias=bias,
            mlp_bias=kind.mlp_bias and given.get("mlp_bias", False),
            qk_norm=kind.qk_norm,
            norms=tuple(kind.norms),
            norm_offset=kind.norm_offset,
            activation=_ACTIVATIONS[activation],
            embed_scale=number("embedding_multiplier") or (width**0.5 if kind.scaled_embeddings else 1.0),
            residual_scale=number("residual_multiplier") or 1.0,
            attention_scale=per_head**-0.5 if per_head else number("attention_multiplier"),
            attention_cap=number("attn_logit_softcapping"),
            logit_divisor=number("logits_scaling") or 1.0,
            logit_cap=number("final_logit_softcapping"),
            windows=windows,
            rope=rope,
            rotations=rotations,
            experts=experts,
            experts_per_token=chosen,
            norm_topk=kind.norm_topk or ("norm_topk_prob" in kind.defaults and given.get("norm_topk_prob")),
            bos_token_id=given.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            hf_json=json.dumps(dict(raw), ensure_ascii=False),
            ignored=ignored_keys(raw, {*given.read, *_ELSEWHERE}, family, where),  # last: all that is read has been
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of the file this was read from."""
        return json.loads(self.hf_json)


def _experts(given: Reads, raw: Mapping[str, Any], family: Family, where: str) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token goes to; 0 where the MLP is one.

    transformers 5 writes ``num_local_experts`` for what some families' files call ``num_experts``.
    """
    if not family.mixture:
        return 0, 0
    said = {key: given.get(key) for key in ("num_experts", "num_local_experts") if raw.get(key) is not None}
    if len(set(said.values())) > 1:
        raise UserError(
            f"{where}: expected num_experts and num_local_experts to agree, got {listed(list(said.values()))}"
        )
    count = _positive(next(iter(said.values()), given.get("num_experts")), "num_experts", where)
    chosen = _positive(given.get("num_experts_per_tok"), "num_experts_per_tok", where)
    if chosen > count:
        raise UserError(f"{where}: expected num_experts_per_tok of 1 to {count}, the number of experts, got {chosen}")
    return count, chosen


def _rotated(given: Reads, family: Family, num_layers: int, where: str) -> tuple[bool, ...]:
    """By layer, whether queries and keys have rotary positions."""
    if "no_rope_layers" not in family.defaults:
        return (True,) * num_layers
    marks, key = given.get("no_rope_layers"), "no_rope_layer_interval"
    every = _positive(given[key], key, where)
    if marks is None:
        marks = [int((layer + 1) % every != 0) for layer in range(num_layers)]
    if len(marks) < num_layers or set(marks) - {0, 1}:
        raise UserError(
            f"{where}: expected no_rope_layers of {num_layers} layers, 1 for those with rotary positions, got {marks!r}"
        )
    return tuple(bool(mark) for mark in marks[:num_layers])


def _windows(given: Reads, family: Family, rotated: tuple[bool, ...], where: str) -> tuple[int | None, ...]:
    layers = range(len(rotated))
    window = given.get("sliding_window") if family.window != "never" else None
    if family.window in ("switch", "all") and not given.get("use_sliding_window", False):
        window = None
    slides = [window is not None for _ in layers]
    if family.window == "switch":
        first = given.get("max_window_layers", 28)
        slides = [window is not None and layer >= first for layer in layers]
    elif family.window == "unrotated":
        switched = window is not None and given.get("use_sliding_window", False)
        slides = [switched and not rotated[layer] for layer in layers]
    elif family.window == "pattern":
        key = "sliding_window_pattern"
        every = _positive(given[key] if key in family.defaults else family.pattern, key, where)
        slides = [(layer + 1) % every != 0 for layer in layers]
    kinds = [_KINDS[here] for here in slides]
    given_kinds = given.get("layer_types")
    if family.window in ("never", "size", "all"):  # transformers masks all layers alike, whatever they say
        if given_kinds not in (None, kinds):
            raise UserError(
                f"{where}: expected no layer_types, or {kinds[0]} for each of {len(layers)} layers, as sliding_window"
                f" says; got {given_kinds}"
            )
    else:
        kinds = given_kinds or kinds
    strange = sorted(set(map(str, kinds)) - set(_KINDS))
    if strange or len(kinds) != len(layers):
        raise UserError(
            f"{where}: expected {len(layers)} layer_types of full_attention or sliding_attention,"
            f" got {len(kinds)} with {strange or 'no other kind'}"
        )
    if "sliding_attention" in kinds:
        window = _positive(window, "sliding_window", where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(
    given: Reads,
    family: Family,
    head_dim: int,
    windows: tuple[int | None, ...],
    rotated: tuple[bool, ...],
    where: str,
) -> tuple[Rope, tuple[int, ...]]:
    """The rotary embeddings that layers have, as one with its others; and by layer, the number of its own."""

    def read(config: Mapping[str, Any], theta: float) -> Rope:
        return Rope.from_hf(config, head_dim, config["max_position_embeddings"], family.longrope, where, theta)

    if family.window_theta is None:
        whole = read(given, family.theta)
        other, has_other = whole.still(), [not turns for turns in rotated]
    else:
        nested = given.get("rope_parameters") or {}
        if not isinstance(nested, Mapping) or set(nested) - set(_KINDS):
            raise UserError(
                f"{where}: expected rope_parameters by kind of layer ({' and '.join(_KINDS)}), got {nested!r}"
            )
        whole = read(given.but(rope_parameters=nested.get("full_attention")), family.theta)
        # What stands at the top is of layers that see everything, but for one key.
        base = given.get("rope_local_base_freq") if "rope_local_base_freq" in family.defaults else None
        local = given.but(rope_parameters=nested.get("sliding_attention"), rope_scaling=None, rope_theta=base)
        other, has_other = read(local, family.window_theta), [window is not None for window in windows]
    if other.boundary is not None or other.rotary_dim != whole.rotary_dim:
        raise UserError(f"{where}: expected no longrope in layers with a window, and as many rotary dimensions in all")
    mine = [other if here else whole for here in has_other]
    kinds = [rope for rope in dict.fromkeys((whole, other)) if rope in mine]
    return dataclasses.replace(kinds[0], others=tuple(kinds[1:])), tuple(kinds.index(rope) for rope in mine)


def _positive(value: Any, key: str, where: str) -> int:
    return conform(value, Size, where, key=key)
