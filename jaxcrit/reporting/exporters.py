"""A selection in the words of other trainers: PEFT, axolotl, LLaMA-Factory, or a plain regular expression.

All of them name parameters as `transformers` does (``model.layers.7.self_attn.q_proj.weight``).
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import write_text
from jaxcrit.core.layers import LayerSet
from jaxcrit.models.families import FAMILIES

FORMATS = ("json", "peft", "axolotl", "llamafactory", "regex")
CONFIG_FILES = {
    "peft": "peft.json",
    "axolotl": "axolotl.yml",
    "llamafactory": "llamafactory.yml",
    "regex": "regex.txt",
}
SPLIT_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FUSED_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def block_linears(model_type: str | None) -> tuple[str, ...]:
    """Linear layers of one decoder block, by the ``model_type`` of config.json; some families fuse some of them.

    Where the type is not known, both sets: PEFT passes over names that a model does not have. Of a mixture those of
    attention alone: transformers 5 holds experts in one parameter, which is no linear layer.
    """
    if model_type is None:
        return tuple(dict.fromkeys(SPLIT_LINEARS + FUSED_LINEARS))
    family = FAMILIES.get(model_type)
    if family is not None and family.mixture:
        return tuple(name for name in SPLIT_LINEARS if name.startswith("self_attn."))
    return FUSED_LINEARS if family is not None and family.fused else SPLIT_LINEARS


def export_selection(layer_set: LayerSet, fmt: str, model_type: str | None = None) -> str:
    """Writes a selection as text for another trainer.

    Args:
        layer_set: the layers; at least one.
        fmt: one of `FORMATS`: ``json`` is ``layers.json``; ``peft`` the keys of a ``LoraConfig``; ``axolotl`` its
            ``unfrozen_parameters``; ``llamafactory`` its ``lora_target``; ``regex`` one expression that
            `re.search` finds in the name of a parameter of the chosen layers and in no other.
        model_type: type of model in config.json, for the names of a block's linear layers.

    Raises:
        UserError: an unknown format, or an empty selection.
    """
    if fmt not in FORMATS:
        raise UserError(f"--format={fmt}: expected {', '.join(FORMATS)}{did_you_mean(fmt, FORMATS)}")
    if not layer_set.layers:
        raise UserError(f"--format={fmt}: the selection {layer_set.rule} is empty; choose at least one layer")
    layers, linears = layer_set.layers, block_linears(model_type)
    if fmt == "json":
        return layer_set.to_json()
    if fmt == "peft":
        # Last names only: PEFT takes a target written out in full whatever layers_to_transform says.
        targets = [name.rpartition(".")[2] for name in linears]
        config = {"layers_to_transform": list(layers), "layers_pattern": "layers", "target_modules": targets}
        return json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}, indent=2) + "\n"
    if fmt == "axolotl":
        # axolotl escapes the dots itself and matches from the start; the last dot keeps layer 1 from matching 11.
        patterns = [f"  - ^model.layers.{layer}." for layer in layers]
        return "\n".join([f"# {layer_set}", "unfrozen_parameters:", *patterns]) + "\n"
    if fmt == "llamafactory":
        # finetuning_type freeze trains the first or last n layers only; LoRA targets may be whole module names.
        names = [f"model.layers.{layer}.{linear}" for layer in layers for linear in linears]
        return f"# {layer_set}\nfinetuning_type: lora\nlora_target: {','.join(names)}\n"
    return rf"^model\.layers\.({'|'.join(map(str, layers))})\." + "\n"


def config_files(directory: Path, layer_set: LayerSet, model_type: str | None = None) -> None:
    """Writes the selection in every trainer's words into ``configs/`` of a directory."""
    processes.make_directory(directory / "configs")
    for fmt, name in CONFIG_FILES.items():
        write_text(directory / "configs" / name, export_selection(layer_set, fmt, model_type))
