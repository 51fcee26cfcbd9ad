"""A selection in the words of other trainers, and back: one declaration of each format, written, read and checked.

All but three name parameters as `transformers` does (``model.layers.7.self_attn.q_proj.weight``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import write_text
from jaxcrit.core.layers import LAYERS_FORMAT, ChosenLayers, LayerSet
from jaxcrit.core.selections import span
from jaxcrit.models.families import FAMILIES
from jaxcrit.reporting import matchers
from jaxcrit.reporting.tensors import TORCHTUNE, Tensors, Trained, layer_of

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is said beside the layers.

    Attributes:
        model: name of the model, for formats that name it.
        family: ``model_type`` of config.json; None where it is not known.
        tensors: of the model, for formats that name every one of them; None where there is no model.
        rank: rank of adapters; they count twice the rank over the rank, as those of ``jaxcrit finetune``.
        rest: rank of adapters on the layers that are not chosen; 0 for none.
        targets: which of `LINEARS` have adapters; empty for all.
    """

    model: str = "MODEL"
    family: str | None = None
    tensors: Tensors | None = None
    rank: int = 8
    rest: int = 0
    targets: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Modules of a layer that have adapters, such as ``self_attn.q_proj``."""
        return block_linears(self.family, self.targets or LINEARS)


def block_linears(model_type: str | None, targets: tuple[str, ...] = LINEARS) -> tuple[str, ...]:
    """Linear layers of one decoder block, by the ``model_type`` of config.json; some families fuse some of them.

    Where the type is not known, both sets: PEFT passes over names that a model does not have. Of a mixture those of
    attention alone: transformers 5 holds experts in one parameter, which is no linear layer.
    """
    llama = FAMILIES["llama"]
    families = [llama, FAMILIES["phi3"]] if model_type is None else [FAMILIES.get(model_type, llama)]
    found = []
    for family in families:
        for name in targets:
            half = "self_attn" if name in "qkvo" else "mlp"
            if half == "self_attn" or not family.mixture:
                found.append(f"{half}.{family.tensor(name)}_proj")
    return tuple(dict.fromkeys(found))


# Writers. Layers in an expression are closed by what follows the number, so that 1 is not found in 11.


def _either(layer_set: LayerSet) -> str:
    return f"({'|'.join(map(str, layer_set.layers))})"


def _yaml(layer_set: LayerSet, *lines: str) -> str:
    return "\n".join([f"# {layer_set}", *lines]) + "\n"


def _named(layer_set: LayerSet, asked: Asked) -> list[str]:
    """Modules in full, which PEFT takes as they are."""
    return [f"model.layers.{layer}.{linear}" for layer in layer_set.layers for linear in asked.linears]


def _peft(layer_set: LayerSet, asked: Asked) -> str:
    # Last names only: PEFT takes a target written out in full whatever layers_to_transform says.
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    if asked.rest:
        chosen = rf"layers\.{_either(layer_set)}\..*"
        config |= {"r": asked.rest, "lora_alpha": 2 * asked.rest}
        config |= {"rank_pattern": {chosen: asked.rank}, "alpha_pattern": {chosen: 2 * asked.rank}}
    else:
        config |= {"r": asked.rank, "lora_alpha": 2 * asked.rank}
        config |= {"layers_to_transform": list(layer_set.layers), "layers_pattern": "layers"}
    config["target_modules"] = [name.rpartition(".")[2] for name in asked.linears]
    return json.dumps(config, indent=2) + "\n"


def _trl(layer_set: LayerSet, asked: Asked) -> str:
    # TRL has no layers_to_transform. Of a mixture PEFT takes an expression for the names it ends in, in all layers.
    ranks = (f"lora_r: {asked.rank}", f"lora_alpha: {2 * asked.rank}")
    names = (f"  - {one}" for one in _named(layer_set, asked))
    return _yaml(layer_set, "use_peft: true", *ranks, "lora_target_modules:", *names)


def _axolotl(layer_set: LayerSet, asked: Asked) -> str:
    # axolotl escapes the dots itself and matches from the start; the last dot keeps layer 1 from matching 11.
    return _yaml(layer_set, "unfrozen_parameters:", *(f"  - ^model.layers.{layer}." for layer in layer_set.layers))


def _llamafactory(layer_set: LayerSet, asked: Asked) -> str:
    # finetuning_type freeze trains the first or last n layers only; LoRA targets may be whole module names.
    names = _named(layer_set, asked)
    ranks = (f"lora_rank: {asked.rank}", f"lora_alpha: {2 * asked.rank}")
    return _yaml(layer_set, "finetuning_type: lora", *ranks, f"lora_target: {','.join(names)}")


def _llamafactory_freeze(layer_set: LayerSet, asked: Asked) -> str:
    layers, depth = layer_set.layers, layer_set.num_layers
    count = len(layers)
    if layers not in (tuple(range(count)), tuple(range(depth - count, depth))):
        raise UserError(
            f"--format=llamafactory-freeze: LLaMA-Factory trains the first or the last n layers, and layers"
            f" {span(layers)} of {depth} are neither; nearest are last:{count} and first:{count}, or exactly these with"
            " adapters by --format=llamafactory, or whole by --format=swift or axolotl"
        )
    signed = count if layers[-1] == depth - 1 else -count
    return _yaml(
        layer_set,
        "finetuning_type: freeze",
        f"freeze_trainable_layers: {signed}",
        "freeze_trainable_modules: all",
    )


def _swift(layer_set: LayerSet, asked: Asked) -> str:
    # Prefixes; the last dot keeps layer 1 from matching 11.
    prefixes = (f"  - model.layers.{layer}." for layer in layer_set.layers)
    return _yaml(layer_set, "tuner_type: full", "freeze_parameters_ratio: 1.0", "trainable_parameters:", *prefixes)


def _torchtune(layer_set: LayerSet, asked: Asked) -> str:
    # No recipe of torchtune freezes layers by its YAML; set_trainable_params takes a set of names.
    names = TORCHTUNE.of(tensors_of(asked, "torchtune"), "torchtune")
    chosen = set(layer_set.layers)
    use = "# in a recipe, once the model is made: torchtune.modules.peft.set_trainable_params(model, names)"
    return _yaml(layer_set, use, *(theirs for name, theirs in names.items() if layer_of(name) in chosen))


def _maxtext(layer_set: LayerSet, asked: Asked) -> str:
    mask = f"trainable_parameters_mask: ['decoder/layers_{_either(layer_set)}/']"
    return _yaml(layer_set, "scan_layers: false  # scanned, all layers are one parameter", mask)


def _tunix(layer_set: LayerSet, asked: Asked) -> str:
    modules = "|".join(name.replace("self_attn.", "attn/").replace(".", "/") for name in asked.linears)
    return _yaml(
        layer_set,
        "lora_config:",
        f"  module_path: 'layers/{_either(layer_set)}/({modules})'",
        f"  rank: {asked.rank}",
        f"  alpha: {2 * asked.rank}.0",
    )


def _nnx(layer_set: LayerSet, asked: Asked) -> str:
    layers = ", ".join(f"nnx.PathContains({layer})" for layer in layer_set.layers)
    use = "# nnx.Optimizer(model, tx, wrt=FILTER), and nnx.value_and_grad of nnx.DiffState(0, FILTER)"
    return f"# {layer_set}\n{use}\nnnx.All(nnx.Param, nnx.PathContains('layers'), nnx.Any({layers}))\n"


def _mergekit(layer_set: LayerSet, asked: Asked) -> str:
    kept = [part.split("-") for part in span(layer_set.complement()).split(",")]
    slices = (f"[{low[0]}, {int(low[-1]) + 1}]" for low in kept)
    parts = (f"  - sources: [{{model: {json.dumps(asked.model)}, layer_range: {ends}}}]" for ends in slices)
    return _yaml(layer_set, "merge_method: passthrough", "slices:", *parts)


def _llamacpp(layer_set: LayerSet, asked: Asked) -> str:
    return f"--prune-layers {','.join(map(str, layer_set.layers))}\n"


def _regex(layer_set: LayerSet, asked: Asked) -> str:
    return rf"(^|\.)layers\.{_either(layer_set)}\." + "\n"


def _json(layer_set: LayerSet, asked: Asked) -> str:
    return layer_set.to_json()


def _layers_json(content: ChosenLayers, tensors: Tensors) -> Trained:
    return tensors.of_layers(content["layers"])


def tensors_of(asked: Asked, name: str) -> Tensors:
    """The tensors of the model.

    Raises:
        UserError: none was given.
    """
    if asked.tensors is None:
        raise UserError(f"--format={name}: lists every tensor by name; give --model=DIR, whose config.json is enough")
    return asked.tensors


# What a selection means in a format: which weights are to train, or to stay.


def _whole(layer_set: LayerSet, tensors: Tensors, asked: Asked) -> Trained:
    return tensors.of_layers(layer_set.layers)


def _adapters(layer_set: LayerSet, tensors: Tensors, asked: Asked) -> Trained:
    chosen, found = set(layer_set.layers), {}
    for name, size in tensors.linears.items():
        layer = layer_of(name)
        rank = asked.rank if layer in chosen else asked.rest
        if layer is not None and rank and name.endswith(tuple(f".{linear}" for linear in asked.linears)):
            found[name] = rank * size
    return found


def _left(layer_set: LayerSet, tensors: Tensors, asked: Asked) -> Trained:
    gone = tensors.of_layers(layer_set.layers)
    return {name: size for name, size in tensors.sizes.items() if name not in gone}


_Means = Callable[[LayerSet, Tensors, Asked], Trained]
_VERB: Mapping[_Means, str] = {_whole: "train", _adapters: "train, in adapters", _left: "stay"}


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        tool: what reads it, at the version whose rules are known here.
        mark: what tells a file of it; the first format whose mark is in a file is taken.
        write: the text of a selection.
        trains: which weights train, or stay, by the tool's rules.
        content: what of a file is read: a declaration, see `jaxcrit.core.schema`; ``str`` for the text as it is.
        means: which weights a selection means.
        file: its name in ``configs/``; empty for formats that not every selection has, or that need a model.
    """

    tool: str
    mark: str
    write: Callable[[LayerSet, Asked], str]
    trains: Callable[[Any, Tensors], Trained]
    content: Any
    means: _Means = _whole
    file: str = ""

    @property
    def verb(self) -> str:
        """What the weights do that are counted."""
        return _VERB[self.means]


FORMATS: Mapping[str, Format] = {
    "json": Format("jaxcrit", LAYERS_FORMAT, _json, _layers_json, ChosenLayers),
    "peft": Format("peft 0.21.2", '"peft_type"', _peft, matchers.peft, matchers.Peft, _adapters, "peft.json"),
    "axolotl": Format(
        "axolotl 0.19.0",
        "unfrozen_parameters:",
        _axolotl,
        matchers.axolotl,
        matchers.Axolotl,
        file="axolotl.yml",
    ),
    "llamafactory": Format(
        "LLaMA-Factory 0.9.5 with peft 0.21.2",
        "finetuning_type: lora",
        _llamafactory,
        matchers.llamafactory,
        matchers.Llamafactory,
        _adapters,
        "llamafactory.yml",
    ),
    "llamafactory-freeze": Format(
        "LLaMA-Factory 0.9.5",
        "finetuning_type:",
        _llamafactory_freeze,
        matchers.llamafactory,
        matchers.Llamafactory,
    ),
    "trl": Format("TRL 1.16.0 with peft 0.21.2", "use_peft:", _trl, matchers.trl, matchers.Trl, _adapters),
    "maxtext": Format("maxtext 0.2.5", "trainable_parameters_mask:", _maxtext, matchers.maxtext, matchers.Maxtext),
    "swift": Format("ms-swift 4.6.0", "tuner_type:", _swift, matchers.swift, matchers.Swift),
    "tunix": Format("tunix 0.1.7 with qwix 0.1.8", "module_path:", _tunix, matchers.tunix, matchers.Tunix, _adapters),
    "mergekit": Format("mergekit 0.1.5", "slices:", _mergekit, matchers.mergekit, matchers.Mergekit, _left),
    "llamacpp": Format("llama.cpp's llama-quantize", "--prune-layers", _llamacpp, matchers.llamacpp, str, _left),
    "torchtune": Format("torchtune 0.6.1", "set_trainable_params", _torchtune, matchers.torchtune, str),
    "nnx": Format("nnx of the flax installed, on tunix 0.1.7", "nnx.", _nnx, matchers.nnx, str),
    "regex": Format("re.search", r"layers\.", _regex, matchers.search, str, file="regex.txt"),
}
CONFIG_FILES = {name: one.file for name, one in FORMATS.items() if one.file}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        raise UserError(f"--format={name}: expected {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def export_selection(layer_set: LayerSet, fmt: str, model_type: str | None = None, asked: Asked | None = None) -> str:
    """Writes a selection as text for another trainer.

    Args:
        layer_set: the layers; at least one.
        fmt: one of `FORMATS`.
        model_type: type of model in config.json, for the names of a block's linear layers.
        asked: what is said beside the layers.

    Raises:
        UserError: an unknown format, an empty selection, or what the format cannot say.
    """
    form, asked = format_of(fmt), asked or Asked(family=model_type)
    if not layer_set.layers:
        raise UserError(f"--format={fmt}: the selection {layer_set.rule} is empty; choose at least one layer")
    if form.means is _left and not layer_set.complement():
        raise UserError(f"--format={fmt}: leaves the selection out, and {layer_set.rule} is every layer")
    if form.means is not _adapters and asked.targets:
        raise UserError(f"--format={fmt}: takes whole layers; --lora_targets is of peft, trl, llamafactory and tunix")
    if asked.rest and fmt != "peft":
        raise UserError(f"--format={fmt}: has one rank for all layers; --rest_rank is of peft, which has rank_pattern")
    return form.write(layer_set, asked)


def config_files(directory: Path, layer_set: LayerSet, model_type: str | None = None) -> None:
    """Writes the selection in every trainer's words into ``configs/`` of a directory."""
    processes.make_directory(directory / "configs")
    for fmt, name in CONFIG_FILES.items():
        write_text(directory / "configs" / name, export_selection(layer_set, fmt, model_type))
