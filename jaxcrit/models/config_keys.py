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
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.models import families

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


class Reads(dict[str, Any]):
    """A dict that notes which keys are asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """As dict, noted."""
        self.read.add(key)
        return super().get(key, default)

    def but(self, **values: Any) -> Reads:
        """The same with other values; what is asked of it is noted here."""
        other = Reads({**self, **values})
        other.read = self.read
        return other

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@functools.cache
def recorded() -> dict[str, Any]:
    """The record: by family, what ``changes`` a model, with the value of silence, and what is read and ``inert``."""
    return json.loads((Path(__file__).parent / "config_keys.json").read_text(encoding="utf-8"))


def family_of(raw: Mapping[str, Any], where: str) -> str:
    """The family of a ``config.json``.

    Raises:
        UserError: quantised weights, a mixture of experts, an unknown ``model_type``, or another head.
    """
    named = str(raw.get("model_type", ""))
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{where}: expected architectures to be a list, got {architectures!r}")
    for key, method in _QUANTISED.items():
        if raw.get(key):
            given = raw[key] if isinstance(raw[key], Mapping) else {}
            raise UserError(
                f"{where}: quantised checkpoint ({given.get('quant_method', method)}, by {key}); expected float"
                " weights: use the original model"
            )
    if named in families.REFUSED:
        model, why = families.REFUSED[named]
        expected = listed(sorted(families.FAMILIES), 12)
        raise UserError(f"{where}: {model} ({named}) is not read, for {why}; expected {expected}")
    mixture = [key for key in _MIXTURE if raw.get(key)]
    if mixture or "moe" in named.lower() or "mixtral" in named.lower():
        dense = listed(list(families.FAMILIES), 12)
        raise UserError(f"{where}: mixture-of-experts model ({named}); expected a dense decoder: {dense}")
    family = named or (families.ARCHITECTURES.get(architectures[0], "") if architectures else "")
    if family not in families.FAMILIES:
        shown = repr(named) if named else f"architectures {architectures}"
        nearest = did_you_mean(family, families.FAMILIES)
        raise UserError(f"{where}: expected model_type {listed(sorted(families.FAMILIES), 12)}, got {shown}{nearest}")
    wanted = families.FAMILIES[family].architecture
    backbone = wanted.removesuffix("ForCausalLM")  # saved without its head, by AutoModel
    known = {name.lower() for name in (wanted, f"{backbone}Model", f"{backbone}TextModel")}
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
        known = key[0] == "_" or key in changes or key in recorded()["generation"]
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
        UserError: the family rotates whole heads, or more than a head is asked for.
    """
    if rotary > head_dim:
        raise UserError(f"{where}: expected at most {head_dim} rotary dimensions, those of a head; got {rotary}")
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
