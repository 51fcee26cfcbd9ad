"""Adapters of PEFT as models: a LoRA directory, its base beside it, named in it, or named by the user, as one overlay.

``y = W x + s B A x`` of every adapted layer, whatever its rank and scale, becomes one rank for all (narrower ones are
filled up with zeros) and the scale a part of B: the same function. What else an adapter may be is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path
from jaxcrit.core.reading import safetensors_header
from jaxcrit.core.schema import Range, Size, short
from jaxcrit.data.tokenizer import has_tokenizer
from jaxcrit.models.checkpoint import locate
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import A, B, Lora, linears
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.partition import TRAIN, partition
from jaxcrit.models.shards import ADAPTER, read_json_object, refuse_pointer
from jaxcrit.models.weights import Weight, offsets, table
from jaxcrit.parallel.mesh import AnyMesh

WEIGHTS = "adapter_model.safetensors"
Above = Annotated[float, Range(0, 2**31 - 1, above=True)]
_PART = re.compile(r"(.+)\.lora_([AB])\.weight")
# Keys of adapter_config.json that are honoured, or that had their say when the adapter was made or trained.
_KNOWN = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)


class AdapterSettings(TypedDict, total=False):
    """What is read of ``adapter_config.json``, besides what only has to be off."""

    base_model_name_or_path: str | None
    r: Above
    lora_alpha: Above
    rank_pattern: dict[str, Size] | None
    alpha_pattern: dict[str, Above] | None
    use_rslora: bool | None
    bias: str


_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base too (PiSSA, OLoRA, LoftQ)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the files of a model are.

    Attributes:
        checkpoint: directory with config and weights.
        tokenizer: directory with the tokenizer: the adapter's where it has one.
        adapter: directory of the adapter on top; None where there is none.
        named: what to call the model so that it is found again: directory or hub id, or ``ADAPTER@BASE``.
    """

    checkpoint: Path
    tokenizer: Path
    adapter: Path | None
    named: str


def place_of(model: str, named: str = "") -> Place:
    """Finds a model: a checkpoint, or an adapter and its base.

    Args:
        model: directory or hub id, of a checkpoint or of an adapter; ``ADAPTER@BASE`` names the base too.
        named: what named it, for messages, such as ``--base=MODEL``; default ``--model=MODEL``.

    Raises:
        UserError: there is no such thing, an adapter names no base, or is on top of another.
    """
    name, _, base = (model, "", "") if as_path(model).exists() else model.partition("@")
    named = named or f"--model={model}"
    path = locate(name, named)
    called = str(path.resolve()) if as_path(name).exists() else name
    if not (path / ADAPTER).is_file():
        if base:
            raise UserError(f"{named}: expected ADAPTER@BASE, but {name} holds no {ADAPTER}")
        return Place(path, path, None, called)
    below, own = path, (path / "config.json").is_file()  # as in transformers, a model beside its adapter is the base
    if base or not own:
        given = base or read_json_object(path / ADAPTER, AdapterSettings).get("base_model_name_or_path")
        if not given:
            raise UserError(f"{path / ADAPTER}: names no base_model_name_or_path; give {name}@BASE")
        try:
            below = locate(str(given))
        except UserError as error:
            raise UserError(f"{path}: its base is not there: {error}; give {name}@BASE") from None
        if (below / ADAPTER).is_file():
            raise UserError(f"{path}: its base {given} holds an adapter itself; merge that one first: jaxcrit export")
        if base:
            called += f"@{below.resolve() if as_path(base).exists() else base}"
    return Place(below, path if has_tokenizer(path) else below, path, called)


def read_adapter(place: Place, config: ModelConfig, mesh: AnyMesh) -> Overlay:
    """Reads an adapter as an overlay.

    Args:
        place: files, with an adapter.
        config: configuration of the base.
        mesh: devices that the arrays are placed on.

    Raises:
        UserError: another kind of adapter, one of layers that are not there, or files that do not fit together.
    """
    assert place.adapter is not None
    path = place.adapter
    settings = _checked(read_json_object(path / ADAPTER, AdapterSettings), path / ADAPTER)
    modules, whole = _tensors(path, config)
    found: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    begin = offsets(config)
    for (module, layer, rows), (a, b) in modules.items():
        scale = _scale(settings, module, a.shape[0], path)
        for row in rows:
            here = slice(begin[row.path], begin[row.path] + row.hf_shape(config)[0])
            found[row.path, layer] = a, b[here] * np.float32(scale)
    rank = max((a.shape[0] for a, _ in found.values()), default=1)
    layers = sorted({layer for _, layer in found})
    adapted = {row_path for row_path, _ in found}
    names = [row.path.removeprefix("blocks.") for row in linears(config) if row.path in adapted]
    lora = Lora(rank, float(rank), tuple(names))
    parts = partition(config, layers, whole, lora=lora if layers else None)
    entries: dict[str, np.ndarray] = {}
    if layers:
        shapes = lora.shapes(config, len(layers))
        entries = {name: np.zeros(shape, np.float32) for name, (_, shape) in shapes.items()}
    for (row_path, layer), (a, b) in found.items():
        slot, lower, upper = layers.index(layer), entries[row_path + A], entries[row_path + B]
        lower[slot, : len(a)], upper[slot, :, : len(a)] = a, b
    like = parts.abstract(mesh, np.float32)[TRAIN]
    given = {**entries, **whole}
    placed = {name: jax.device_put(given[name], one.sharding) for name, one in like.items()}
    return Overlay(parts, {TRAIN: placed}, Path(place.named), 0)


def _checked(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """The settings, if they are those of a LoRA that is nothing else besides."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{where}: an adapter of peft_type {kind!r}; expected LORA: merge it with peft and save the model"
        )
    if settings.get("use_dora"):
        raise UserError(f"{where}: use_dora is on (DoRA); expected plain LoRA: merge it with peft and save the model")
    others = sorted(key for key, value in settings.items() if key not in _KNOWN and value not in (None, False, [], {}))
    if settings.get("bias", "none") != "none":
        others.append("bias")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        others.append("init_lora_weights")
    if others:
        shown = listed([f"{key}={settings[key]!r}" for key in others], 3)
        raise UserError(
            f"{where}: {shown} is not known here; expected plain LoRA: merge it with peft and save the model"
        )
    for patterns in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(patterns) or {}:
            _refuse_intricate(pattern, f"{where}: {patterns}")
    return settings


def _refuse_intricate(pattern: str, where: str) -> None:
    """Refuses a regular expression that is none, or could take a matcher for ever (a repeated group, many repeats)."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: expected a regular expression, got {short(pattern)} ({error})") from None
    if len(re.findall(r"(?<!\\)[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
        raise UserError(f"{where}: expected at most 3 repeats in a pattern, and none of a group; got {short(pattern)}")


_Module = tuple[str, int, tuple[Weight, ...]]  # name, layer, our weights in it


def _tensors(
    path: Path, config: ModelConfig
) -> tuple[dict[_Module, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """By module A ``[r, in]`` and B ``[out, r]``, and by weight-table path what was trained whole; float32."""
    file = path / WEIGHTS
    if not file.is_file():
        pickled = " (adapter_model.bin can run code and is not read)" if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"{path}: expected {WEIGHTS} beside {ADAPTER}, found none{pickled}; save it with peft again")
    try:
        refuse_pointer(file)
        safetensors_header(file)
        held = {name: value.astype(np.float32) for name, value in load_file(file).items()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: truncated or damaged safetensors ({error}); fetch the file again") from None
    known: dict[str, _Module] = {}
    for row in linears(config):
        for layer in range(config.num_layers):
            module = row.hf.format(layer).removesuffix(".weight")
            known[module] = (module, layer, (*(known[module][2] if module in known else ()), row))
    outside = {row.hf: row for row in table(config) if not row.stacked}
    parts: dict[_Module, dict[str, np.ndarray]] = {}
    whole, strange = {}, []
    for name, value in sorted(held.items()):
        bare = name.removeprefix("base_model.model.")
        part = _PART.fullmatch(bare)
        module = next((one for one in (part[1], f"model.{part[1]}") if one in known), "") if part else ""
        of_base = outside.get(bare)
        if part and module:
            parts.setdefault(known[module], {})[part[2]] = value
        elif of_base and value.shape == of_base.hf_shape(config) and (of_base.path == "norm" or not config.tied):
            whole[of_base.path] = value
        else:
            strange.append(f"{bare} {value.shape}")
    if strange:
        raise UserError(f"{file}: {listed(strange, 3)}: expected A and B of linear layers of the base's blocks")
    for (module, _, rows), ends in parts.items():
        shapes = {end: ends[end].shape for end in "AB" if end in ends}
        out = sum(row.hf_shape(config)[0] for row in rows)
        rank = shapes.get("A", (0,))[0]
        if not rank or shapes != {"A": (rank, rows[0].hf_shape(config)[1]), "B": (out, rank)}:
            raise UserError(f"{file}: {module}: expected A and B of one rank for {out} rows, got {shapes}")
    if not parts and not whole:
        raise UserError(f"{file}: holds no adapter")
    return {module: (ends["A"], ends["B"]) for module, ends in parts.items()}, whole


def _scale(settings: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    """What B A counts, as peft has it: alpha / rank, or alpha / sqrt(rank), each by the first pattern that fits."""

    def of(patterns: str, default: str) -> float:
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(settings.get(default, 8))

    said, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if said != rank:
        raise UserError(f"{path}: {module} has rank {rank} in {WEIGHTS} and {said:g} in {ADAPTER}; which holds?")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
