"""Which keys may stand in a config.json: what transformers reads is honoured or refused, all else ignored by name.

What transformers reads is recorded, not guessed: ``config_keys.json``, written by ``benchmarks/config_keys.py``. What
jaxcrit reads is noted while it reads (`Reads`). A key that transformers reads and jaxcrit does not is refused unless it
has the value that silence has; one that neither reads is ignored, and named in ``run.json`` and by ``jaxcrit inspect``,
unless its value claims another function, for then two readers take the file differently.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.schema import AtLeastZero, Layers, Positive, Range, Size, conform
from jaxcrit.models import families

# Keys of mixtures: in a model without experts they say that it has some.
_MIXTURE = ("num_experts", "num_local_experts", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts")
# Where tools note that the weights are quantised: most of them, MLX, early llm-compressor.
_QUANTISED = {"quantization_config": "unknown", "quantization": "MLX", "compression_config": "compressed-tensors"}
# Names of keys that claim another function where they are on, and what they claim.
_CLAIMS = {
    r"bias": "a bias",
    r"cross_attention|is_decoder|encoder_decoder": "an encoder, or a decoder with cross attention",
    r"pruned_heads": "pruned heads",
    r"soft_?cap": "a soft cap",
    r"multiplier|logits?_scal|scale_(emb|depth)|clip_qkv|query_pre_attn": "another scale",
    r"partial_rotary|rotary_p|rope_(pct|ratio|interleaved|local)|mrope|no_rope|alibi": "another position embedding",
    r"sliding_window|attention_chunk": "attention in windows",
    r"qk_?(layer)?norm|parallel_(residual|attn)": "another block",
    r"draft_|eagle": "a draft head, not a model",
    r"(q|kv)_lora_rank": "low-rank attention",
}
_NOTHING: tuple[Any, ...] = (None, False, 0, 1, "", [], {})  # values that claim none of it (1 also stands for True)
_ROPE_MARKS = ("finetuned",)  # what exporters note beside the parameters of RoPE


Token = Annotated[int, Range(0, 2**31 - 1)]
# What a value must be, where it is read. Layers and dimensions of a head are counted out before weights are looked at.
_KINDS: Mapping[str, Any] = {
    "model_type": str,
    "hidden_act": str,
    "hidden_activation": str,
    "architectures": list[str],
    "num_hidden_layers": Layers,
    "head_dim": Annotated[int, Range(1, 2**16)],
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "sliding_window",
            "sliding_window_pattern",
            "no_rope_layer_interval",
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
        ),
        Size,
    ),
    "max_window_layers": int,
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob"),
        bool,
    ),
    **dict.fromkeys(
        (
            "query_pre_attn_scalar",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "rope_theta",
            "rope_local_base_freq",
            "partial_rotary_factor",
        ),
        Positive,
    ),
    "rms_norm_eps": AtLeastZero,
    "layer_types": list[str],
    "no_rope_layers": list[int],
    "bos_token_id": Token,
    "eos_token_id": Token | list[Token],
}


class Reads(dict[str, Any]):
    """A ``config.json`` that notes which keys are asked for, and checks the values that are given out."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        super().__init__(content)
        self.read: set[str] = set()
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """As dict, noted and checked; null is a value, for some families."""
        self.read.add(key)
        value = super().get(key, default)
        return value if value is None else conform(value, _KINDS.get(key, Any), self.where, key=key)

    def but(self, **values: Any) -> Reads:
        """The same with other values; what is asked of it is noted here."""
        other = Reads({**self, **values}, self.where)
        other.read = self.read
        return other

    def __getitem__(self, key: str) -> Any:
        super().__getitem__(key)
        return self.get(key)


@functools.cache
def recorded() -> dict[str, Any]:
    """The record: by family, what ``changes`` a model, with the value of silence, and what is read and ``inert``."""
    return json.loads((Path(__file__).parent / "config_keys.json").read_text(encoding="utf-8"))


def family_of(raw: Mapping[str, Any], where: str) -> str:
    """The family of a ``config.json``.

    Raises:
        UserError: quantised weights, another mixture of experts, an unknown ``model_type``, or another head.
    """
    said = Reads(raw, where)
    named, architectures = said.get("model_type") or "", said.get("architectures") or []
    for key, method in _QUANTISED.items():
        if raw.get(key):
            given = raw[key] if isinstance(raw[key], Mapping) else {}
            raise UserError(
                f"{where}: quantised checkpoint ({given.get('quant_method', method)}, by {key}); expected float"
                " weights: use the original model"
            )
    if named in families.REFUSED:
        model, why = families.REFUSED[named]
        expected = listed(sorted(families.FAMILIES), 16)
        raise UserError(f"{where}: {model} ({named}) is not read, for {why}; expected {expected}")
    family = named or (families.ARCHITECTURES.get(architectures[0], "") if architectures else "")
    mixtures = [name for name, one in families.FAMILIES.items() if one.mixture]
    if family not in mixtures and (any(raw.get(key) for key in _MIXTURE) or "moe" in named.lower()):
        raise UserError(f"{where}: mixture-of-experts model ({named}); of mixtures {listed(mixtures)} are read")
    if family not in families.FAMILIES:
        shown = repr(named) if named else f"architectures {architectures}"
        nearest = did_you_mean(family, families.FAMILIES)
        raise UserError(f"{where}: expected model_type {listed(sorted(families.FAMILIES), 16)}, got {shown}{nearest}")
    wanted = families.FAMILIES[family].architecture
    backbone = wanted.removesuffix("ForCausalLM")  # saved without its head, by AutoModel
    known = {name.lower() for name in (wanted, f"{backbone}Model", f"{backbone}TextModel")}
    known |= {name.lower() for name in families.ARCHITECTURES}  # model_type decides, as in transformers
    unknown = [name for name in architectures if str(name).lower() not in known]
    if unknown:
        raise UserError(f"{where}: expected architecture {wanted} for {family}, got {listed(unknown)}")
    return family


def ignored_keys(raw: Mapping[str, Any], read: set[str], family: str, where: str) -> tuple[str, ...]:
    """Names of the keys that play no part, sorted.

    Args:
        raw: content of the file.
        read: keys that jaxcrit honours.
        family: key of `FAMILIES`.
        where: file, for messages.

    Raises:
        UserError: a key that transformers reads and jaxcrit does not, or one whose value claims another function.
    """
    changes = _changes(family)
    # Names that begin with an underscore are transformers' own notes, written and not read.
    rest = sorted(raw.keys() - read - {"model_type", "architectures", *_QUANTISED, *_MIXTURE})
    for key in rest:
        value = raw[key]
        if key in changes and value is not None and value != changes[key] and not (value is False and not changes[key]):
            raise UserError(
                f"{where}: {key} is {_short(value)}, which changes a {family} model in transformers and is not known"
                " here; it is refused, not guessed"
            )
        claim = next((what for name, what in _CLAIMS.items() if re.search(name, key)), "")
        known = key[:1] == "_" or key in changes or key in recorded()["generation"]
        if claim and not known and (value is True or value not in _NOTHING):
            raise UserError(
                f"{where}: {key} is {_short(value)}, which claims {claim}; transformers ignores it in a {family} model"
                " and other readers do not: remove the key if the weights were made without it"
            )
    both = {outer: raw.get(outer) for outer in ("rope_scaling", "rope_parameters")}
    marks = [f"{outer}.{key}" for outer, inner in both.items() for key in _ROPE_MARKS if key in (inner or ())]
    return (*rest, *marks)


def check_rotary(rotary: int, head_dim: int, family: str, where: str) -> None:
    """Checks that only part of a head is rotated where transformers rotates part of it, too.

    Raises:
        UserError: the family rotates whole heads.
    """
    if rotary != head_dim and "partial_rotary_factor" not in _changes(family):
        raise UserError(
            f"{where}: partial_rotary_factor asks for {rotary} of {head_dim} rotary dimensions; transformers rotates"
            f" all of them in a {family} model and others do not: remove the key if the weights were made without it"
        )


def without_marks(raw: Mapping[str, Any], key: str) -> Any:
    """Parameters of RoPE without what exporters note beside them."""
    inner = raw.get(key)
    if not isinstance(inner, dict):
        return inner
    return {name: value for name, value in inner.items() if name not in _ROPE_MARKS}


def _changes(family: str) -> Mapping[str, Any]:
    """Keys that change a family's model; of one that is not recorded yet, those of any."""
    record = recorded()
    if family in record:
        return record[family]["changes"]
    return {key: None for one in record.values() if isinstance(one, dict) for key in one["changes"]}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
