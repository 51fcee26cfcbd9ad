"""Each exported selection is read back as its trainer reads it, against the parameter names of real models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSet
from jaxcrit.reporting.exporters import CONFIG_FILES, config_files, export_selection

NUM_LAYERS = 32
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
MODULES = {
    "llama": [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    "mixtral": [f"self_attn.{x}_proj" for x in "qkvo"],  # experts are no linear layers of their own
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
}
SELECTIONS = [(1,), (1, 11, 21), (0, 31), (7, 8, 9), tuple(range(10, 14)), (2, 3, 13, 23, 30)]


def chosen(layers: tuple[int, ...]) -> LayerSet:
    return LayerSet(layers, "delta_debiased", f"critical:{len(layers)}", NUM_LAYERS, "abc")


def modules(family: str, layers=range(NUM_LAYERS)) -> set[str]:
    return {f"model.layers.{layer}.{module}" for layer in layers for module in MODULES[family]}


def parameters(family: str, layers=range(NUM_LAYERS)) -> set[str]:
    inside = {f"{name}.weight" for name in modules(family, layers)}
    return inside | {f"model.layers.{layer}.{norm}" for layer in layers for norm in NORMS}


def everything(family: str) -> set[str]:
    return parameters(family) | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def peft_targets(config: dict, name: str) -> bool:
    """Whether PEFT (0.21, check_target_module_exists) wraps a module, for a list of targets."""
    if name in config["target_modules"]:
        return True
    if not any(name.endswith(f".{target}") for target in config["target_modules"]):
        return False
    if "layers_to_transform" not in config:
        return True
    found = re.match(rf".*\.{config['layers_pattern']}\.(\d+)\.", name)
    return found is not None and int(found[1]) in config["layers_to_transform"]


def axolotl_unfreezes(pattern: str, name: str) -> bool:
    """Whether axolotl (utils/freeze.py) trains a parameter: dots are literal, an index range may end the pattern."""
    assert not re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", pattern), "would be read as a range of rows"
    return re.compile(re.sub(r"\.(?!\+)", "\\.", pattern)).match(name) is not None


@pytest.mark.parametrize("layers", SELECTIONS)
@pytest.mark.parametrize("family", MODULES)
class TestReadBack:
    def test_peft(self, family, layers):
        config = json.loads(export_selection(chosen(layers), "peft", family))
        names = {name.removesuffix(".weight") for name in everything(family)}
        assert {name for name in names if peft_targets(config, name)} == modules(family, layers)

    def test_peft_of_unknown_family(self, family, layers):
        config = json.loads(export_selection(chosen(layers), "peft"))
        assert {name for name in modules(family) if peft_targets(config, name)} == modules(family, layers)

    def test_axolotl(self, family, layers):
        config = yaml.safe_load(export_selection(chosen(layers), "axolotl", family))
        patterns = config["unfrozen_parameters"]
        trained = {name for name in everything(family) if any(axolotl_unfreezes(p, name) for p in patterns)}
        assert trained == parameters(family, layers)

    def test_llamafactory(self, family, layers):
        config = yaml.safe_load(export_selection(chosen(layers), "llamafactory", family))
        assert config["finetuning_type"] == "lora"
        targets = {"target_modules": [target.strip() for target in config["lora_target"].split(",")]}
        names = {name.removesuffix(".weight") for name in everything(family)}
        assert {name for name in names if peft_targets(targets, name)} == modules(family, layers)

    def test_regex(self, family, layers):
        pattern = export_selection(chosen(layers), "regex", family).strip()
        assert {name for name in everything(family) if re.search(pattern, name)} == parameters(family, layers)

    def test_json(self, family, layers, tmp_path):
        (tmp_path / "layers.json").write_text(export_selection(chosen(layers), "json", family))
        assert LayerSet.load(tmp_path / "layers.json") == chosen(layers)


def test_refuses_unknown_format_and_empty_selection():
    with pytest.raises(UserError, match="did you mean 'peft'"):
        export_selection(chosen((1,)), "pefts")
    with pytest.raises(UserError, match="empty"):
        export_selection(chosen(()), "peft")


def test_config_files_are_of_every_format(tmp_path: Path):
    config_files(tmp_path, chosen((3, 4)), "llama")
    assert {path.name for path in (tmp_path / "configs").iterdir()} == set(CONFIG_FILES.values())
    for fmt in CONFIG_FILES:
        assert (tmp_path / "configs" / CONFIG_FILES[fmt]).read_text() == export_selection(chosen((3, 4)), fmt, "llama")
