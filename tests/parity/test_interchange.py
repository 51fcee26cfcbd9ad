"""Which modules PEFT puts adapters on, by its own function and by the rules that stand in for it."""

from __future__ import annotations

import json
import random

import pytest
from support.other_trainers import GOLDEN, LAYERS, tensors, unfolded

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSet
from jaxcrit.reporting import matchers
from jaxcrit.reporting.exporters import Asked
from jaxcrit.reporting.readback import read_back

pytest.importorskip("peft", reason="needs peft: pip install 'jaxcrit[parity]'")
MODULES = tensors("llama").modules
PARTS = ("q_proj", "mlp.up_proj", "layers.1", "1", "model.layers.11.self_attn.v_proj", "lm_head", "layers", "h", "attn")


def test_rules_agree_with_peft_on_lists_expressions_layers_and_what_is_left_out():
    own, drawn = matchers._own_peft(), random.Random(0)
    assert own is not None
    found = set()
    for _ in range(400):
        config: matchers.Peft = {"target_modules": drawn.sample(PARTS, drawn.randint(1, 3))}
        if drawn.random() < 0.3:
            config["target_modules"] = (
                rf".*{drawn.choice(['1', '(1|11)', '[0-9]'])}\..*{drawn.choice(['q', 'up'])}_proj"
            )
        elif drawn.random() < 0.7:
            config["layers_to_transform"] = drawn.choice([1, [], [1, 11], [0, 5, 10]])
            config["layers_pattern"] = drawn.choice([None, "layers", ["h", "layers"], "h"])
        if drawn.random() < 0.3:
            config["exclude_modules"] = drawn.choice([["q_proj"], r".*\.1\..*", ["layers.3.mlp.up_proj"]])
        if drawn.random() < 0.2:
            config["modules_to_save"] = drawn.choice([["lm_head"], ["layers.1"], ["mlp"]])
        theirs = [module for module in MODULES if own(config, module)]
        assert [module for module in MODULES if matchers.peft_matches(config, module)] == theirs, config
        found.add(len(theirs))
    assert len(found) > 10  # of none, some and many


@pytest.mark.parametrize("fmt", ["peft", "trl", "llamafactory"])
def test_with_its_own_function_answers_are_those_of_the_tool(fmt, tmp_path):
    answers = json.loads(GOLDEN.read_text(encoding="utf-8"))["formats"][fmt]
    chosen, told = LayerSet(LAYERS, "manual", "1,5,10", 12), 0
    for name, case in answers.items():
        path, held = tmp_path / f"{fmt}.{'json' if fmt == 'peft' else 'yml'}", tensors(case["model"])
        path.write_text(case["text"], encoding="utf-8")
        try:
            found = read_back(path, fmt, chosen, Asked("MODEL", held.family, held)).trained
        except UserError:
            assert "refused" in case or name in ("all-linear, mixture", "the router, mixture")
            continue
        assert found == unfolded(case["trains"]), name
        told += 1
    assert told >= 6
