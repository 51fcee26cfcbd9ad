"""A GGUF file as a checkpoint: config from its metadata, weights dequantised row by row by the `gguf` package.

The file means what transformers makes of it (``from_pretrained(gguf_file=)``), which reads fewer keys than llama.cpp
does. Where the two would compute different models, the file is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.schema import Size, conform
from jaxcrit.data.gguf import GgufFile, package, read_gguf
from jaxcrit.models.checkpoint import Checkpoint, Progress, kept_digests
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.weights import hf_shapes

# Keys behind the name of the architecture, and what config.json calls them.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_FURTHER = {
    "rope.freq_base": "rope_theta",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_GEMMA = {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files of one ``general.architecture`` are read.

    Attributes:
        family: key of `FAMILIES`.
        keys: further keys, and what config.json calls them.
        interleaved: whether rows of q and k are ordered for rotations of neighbours (i, i + 1) and not of (i, i + R/2).
        other_scale: number of layers of a model whose attention is scaled otherwise, which no key says; 0 for none.
    """

    family: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    other_scale: int = 0


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", {"rope.dimension_count": "head_dim"}, interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", {"attention.key_length": "head_dim"}),
    "phi3": Architecture("phi3"),
    "gemma2": Architecture("gemma2", _GEMMA, other_scale=46),
    "gemma3": Architecture("gemma3_text", _GEMMA, other_scale=62),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufCheckpoint(Checkpoint):
    """An opened GGUF file.

    Attributes:
        file: its header.
        tensors: by name in a checkpoint directory, the name in the file.
        interleaved: see `Architecture`.
    """

    file: GgufFile
    tensors: dict[str, str]
    interleaved: bool

    def read(self, name: str, rows: slice, columns: slice | None, place: int | None = None) -> np.ndarray:
        """Dequantises rows of a tensor, float32; ``place`` is of mixtures, of which none is read."""
        tensor = self.file.tensors[self.tensors[name]]
        count = tensor.shape[0] if len(tensor.shape) > 1 else 1
        held = np.memmap(self.path, np.uint8, "r", tensor.start, (count, tensor.size // count))
        if len(tensor.shape) > 1:
            held = held[self._places(name, rows)]
        values = package().dequantize(np.ascontiguousarray(held), tensor.kind)
        if name.endswith("norm.weight"):  # llama.cpp stores what a norm multiplies by
            values = values - np.float32(self.config.norm_offset or 0)
        return values[0, rows] if len(tensor.shape) == 1 else values if columns is None else values[:, columns]

    def _places(self, name: str, rows: slice) -> Any:
        """Rows of the file that hold these rows of a tensor."""
        if not (self.interleaved and name.endswith(("q_proj.weight", "k_proj.weight"))):
            return rows
        row, size = np.arange(rows.start, rows.stop), self.config.head_dim
        head, place = row // size * size, row % size
        return head + 2 * (place % (size // 2)) + place // (size // 2)

    def digests(self, progress: Progress | None = None) -> dict[str, list[Any]]:
        """Of the tensors as they are stored."""
        return kept_digests(self.path, sorted(self.tensors), self._digest)

    def _digest(self, name: str) -> list[Any]:
        tensor = self.file.tensors[self.tensors[name]]
        held = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.size,))
        return [tensor.kind.name, list(tensor.shape), hashlib.sha256(held.data).hexdigest()]


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a GGUF file as a checkpoint; no weight is read.

    Raises:
        UserError: see `read_gguf`; an unknown architecture, missing metadata, a function that transformers' reading of
            the file leaves out, or tensors that do not fit the metadata.
    """
    file = read_gguf(path)
    named = str(file.need("general.architecture"))
    if file.metadata.get("general.type", "model") != "model" or named not in ARCHITECTURES:
        kind = file.metadata.get("general.type", "model")
        raise UserError(
            f"{path}: expected a model of architecture {listed(list(ARCHITECTURES), 9)}, got {kind} of {named!r}"
            f"{did_you_mean(named, ARCHITECTURES)}; use the original checkpoint"
        )
    architecture = ARCHITECTURES[named]
    config = ModelConfig.from_hf(_raw(file, named, architecture), str(path))
    _refuse_other_functions(file, named, architecture, config)
    tensors = _names(named, config)
    _check_tensors(file, config, tensors)
    shards, dtypes = dict.fromkeys(tensors, path), dict.fromkeys(tensors, "float32")
    kinds = collections.Counter(file.tensors[tensor].kind.name for tensor in tensors.values())
    return GgufCheckpoint(
        path=path,
        config=config,
        shards=shards,
        dtypes=dtypes,
        names={name: name for name in tensors},
        stored=", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()),
        file=file,
        tensors=tensors,
        interleaved=architecture.interleaved,
    )


def _raw(file: GgufFile, named: str, architecture: Architecture) -> dict[str, Any]:
    """What a ``config.json`` of the file would say."""
    metadata, tokens = file.metadata, len(file.need("tokenizer.ggml.tokens"))
    raw = {key: file.need(f"{named}.{name}") for name, key in _KEYS.items()}
    further = {**_FURTHER, **architecture.keys}
    raw |= {key: metadata[f"{named}.{name}"] for name, key in further.items() if f"{named}.{name}" in metadata}
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        raw[key] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    if conform(raw.setdefault("vocab_size", tokens), Size, str(file.path), key=f"{named}.vocab_size") < tokens:
        raise UserError(
            f"{file.path}: {tokens} tokens, but {named}.vocab_size is {raw['vocab_size']}; convert it again"
        )
    return {
        "model_type": architecture.family,
        "architectures": [FAMILIES[architecture.family].architecture],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **raw,
    }


def _refuse_other_functions(file: GgufFile, named: str, architecture: Architecture, config: ModelConfig) -> None:
    def value(name: str, default: Any) -> Any:
        return file.metadata.get(f"{named}.{name}", default)

    scaled = value("rope.scaling.type", "none") != "none" or value("rope.scaling.factor", 1) not in (0, 1)
    caps = {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logit_cap}
    claims = {
        "scaled rotary positions": scaled
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in file.tensors),
        "experts": bool(value("expert_count", 0)),
        "attention to what follows": not value("attention.causal", True),
        "heads that are rotated in part": value("rope.dimension_count", config.head_dim) != config.head_dim,
        "other soft caps": any(value(key, cap) != cap for key, cap in caps.items()),
        "another scale of attention": config.num_layers == architecture.other_scale,
    }
    claimed = [what for what, there in claims.items() if there]
    if claimed:
        raise UserError(
            f"{file.path}: the model has {listed(claimed)}, which transformers leaves out when it reads a {named} file;"
            " use the original checkpoint"
        )


def _names(named: str, config: ModelConfig) -> dict[str, str]:
    """By name in a checkpoint directory, the name in the file."""
    gguf = package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == named)
    known = gguf.get_tensor_name_map(kind, config.num_layers)
    found = {}
    for name in hf_shapes(config):
        stem, _, end = name.rpartition(".")
        found[name] = f"{known.get_name(stem)}.{end}"
    return found


def _check_tensors(file: GgufFile, config: ModelConfig, tensors: Mapping[str, str]) -> None:
    expected = {tensors[name]: shape for name, shape in hf_shapes(config).items()}
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != config.vocab_size:
        raise UserError(
            f"{file.path}: a vocabulary of {config.vocab_size} tokens, but embeddings of {embedding.shape[0]}; convert"
            " it again"
        )
    problems = []
    if missing := sorted(expected.keys() - file.tensors.keys()):
        problems.append(f"missing {listed(missing, 4)}")
    if extra := sorted(file.tensors.keys() - expected.keys()):
        problems.append(f"unexpected {listed(extra, 4)}")
    wrong = [
        f"{name} {file.tensors[name].shape} (expected {shape})"
        for name, shape in sorted(expected.items())
        if name in file.tensors and file.tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"wrong shape {listed(wrong, 4)}")
    if problems:
        raise UserError(f"{file.path}: tensors do not match the metadata ({config.family}): {'; '.join(problems)}")
