"""What each format says is read back: rules against what the tools themselves answered, and files that are wrong."""

from __future__ import annotations

import json
import re

import pytest
from support.other_trainers import GOLDEN, LAYERS, MODELS, OTHERS, cases, tensors, unfolded

from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSet
from jaxcrit.reporting import matchers
from jaxcrit.reporting.exporters import FORMATS, Asked, export_selection
from jaxcrit.reporting.readback import folded, read_back

ANSWERS = json.loads(GOLDEN.read_text(encoding="utf-8"))["formats"]
CASES = [(fmt, name) for fmt, files in ANSWERS.items() for name in files]
NOT_COUNTED = (("peft", "all-linear, mixture"), ("peft", "the router, mixture"))  # refused here, not by the tool
CHOSEN = LayerSet(LAYERS, "manual", "1,5,10", 12)


@pytest.fixture(autouse=True)
def rules_alone(monkeypatch):
    """The rules, also where PEFT is installed; that it agrees is told in tests/parity."""
    monkeypatch.setattr(matchers, "_own_peft", lambda: None)


def asked(family: str = "llama", **more) -> Asked:
    return Asked("MODEL", tensors(family).family, tensors(family), **more)


def written(tmp_path, text: str, name: str = "file.yml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_answers_are_of_every_case_and_of_the_texts_that_are_written_now():
    now = cases()
    assert {(fmt, name): case for fmt, files in now.items() for name, case in files.items()} == {
        (fmt, name): {key: ANSWERS[fmt][name][key] for key in ("model", "text")} for fmt, name in CASES
    }
    assert {*now, "json", "regex", "llamacpp"} == set(FORMATS)


@pytest.mark.parametrize(("fmt", "name"), CASES)
def test_rules_are_those_of_the_tool(fmt, name, tmp_path):
    case = ANSWERS[fmt][name]
    path = written(tmp_path, case["text"], "file.json" if fmt == "peft" else "file.yml")
    if "refused" in case or (fmt, name) in NOT_COUNTED:
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_back(path, fmt, CHOSEN, asked(case["model"]))
        return
    found = read_back(path, fmt, CHOSEN, asked(case["model"]))
    assert found.trained == unfolded(case["trains"])
    exact = name.startswith("ours, ") and "two" not in name and fmt != "llamafactory-freeze"
    assert bool(found.differing) != (exact or (fmt, name) == ("swift", "expression"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_written_is_read_as_exactly_the_selection(fmt, tmp_path):
    last = LayerSet((9, 10, 11), "manual", "last:3", 12)
    for chosen in (CHOSEN, LayerSet((1,), "manual", "1", 12), last):
        if fmt == "llamafactory-freeze" and chosen is not last:
            continue
        path = written(tmp_path, export_selection(chosen, fmt, asked=asked()))
        found = read_back(path, "", chosen, asked())
        assert found.format is FORMATS[fmt] or fmt == "llamafactory-freeze"
        assert found.differing == {} and found.trained


def test_adapters_of_two_ranks_and_of_some_linears(tmp_path):
    two = asked(rank=4, rest=2, targets=("q", "v"))
    config = json.loads(export_selection(CHOSEN, "peft", asked=two))
    assert (config["r"], config["lora_alpha"]) == (2, 4)  # alpha is twice the rank, as in jaxcrit finetune
    assert list(config["rank_pattern"].values()) == [4] and list(config["alpha_pattern"].values()) == [8]
    path = written(tmp_path, json.dumps(config), "peft.json")
    found = read_back(path, "", CHOSEN, two)
    assert found.differing == {}
    q, v = (f"model.layers.{{}}.self_attn.{x}_proj" for x in "qv")
    assert found.trained[q.format(1)] == 4 * 16 and found.trained[v.format(2)] == 2 * 12
    assert len(read_back(path, "", CHOSEN, asked(rank=4, targets=("q", "v"))).differing) == 18


LAYER = "of each layer "
WRONG = {  # by format a file that says 1, 5 and 10 otherwise, and a line of what is told
    "json": (None, "{2,6,11}: " + LAYER + "496 weights train, 0 were"),
    "peft": ("off by one", "{2,6,11}: " + LAYER + "128 weights train, in adapters, 0 were meant to: self_attn.q_proj"),
    "trl": ("1 is the start of 10", "{11}: " + LAYER + "128 weights train, in adapters, 0 were"),
    "axolotl": ("dots escaped twice", "{1,5,10}: " + LAYER + "0 weights train, 496 were"),
    "llamafactory": ("all", "{0,2-4,6-9,11}: " + LAYER + "928 weights train, in adapters, 0 were"),
    "llamafactory-freeze": ("norm is a part of names", "8 weights train, 0 were meant to: model.norm.weight"),
    "swift": ("nothing trains", "{1,5,10}: " + LAYER + "0 weights train, 496 were"),
    "torchtune": ("names of transformers", "{1,5,10}: " + LAYER + "0 weights train, 496 were"),
    "maxtext": ("scanned, all", "{0,2-4,6-9,11}: " + LAYER + "288 weights train, 0 were"),
    "tunix": ("dots", "{1,5,10}: " + LAYER + "0 weights train, in adapters, 928 were"),
    "nnx": ("1 is a part of 10", "{11}: " + LAYER + "496 weights train, 0 were"),
    "mergekit": ("off by one", "{1,10}: " + LAYER + "496 weights stay, 0 were"),
    "llamacpp": ("--prune-layers 1,5,100\n", "{10}: " + LAYER + "496 weights stay, 0 were"),
    "regex": (r"layers\.(1|5|10)", "{11}: " + LAYER + "496 weights train, 0 were"),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_command_catches_a_wrong_file(fmt, tmp_path, capsys):
    text, told = WRONG[fmt]
    if text is None:
        text = LayerSet((2, 6, 11), "manual", "2,6,11", 12).to_json()
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"]))
    path = written(tmp_path, OTHERS.get(fmt, {}).get(text, text), "wrong.txt")
    flags = [f"--model={tmp_path}", "--layers=1,5,10", f"--check={path}", f"--format={fmt}"]
    assert main(["select", *flags, f"--out={tmp_path / 'all.tsv'}"]) == 1
    out = capsys.readouterr().out
    assert f"differs: {'model.layers.' if told[0] == '{' else ''}{told}" in out
    assert re.search(r"not layers 1, 5, 10 of 12 \(1,5,10 by manual\): \d+ tensors differ$", out.strip())
    (tmp_path / "right.txt").write_text("")
    assert main(["select", *flags[:2], f"--format={fmt}", f"--out={path}"]) in (0, 2)
    if fmt != "llamafactory-freeze":
        assert main(["select", *flags, f"--out={tmp_path / 'all.tsv'}"]) == 0
        listed = dict(line.split("\t") for line in (tmp_path / "all.tsv").read_text().splitlines())
        assert capsys.readouterr().out.splitlines()[-2].split()[:3] == [
            str(len(listed)),
            "tensors,",
            f"{sum(map(int, listed.values())):,}",
        ]


REFUSED = {
    ("llamafactory-freeze", CHOSEN): "layers 1,5,10 of 12 are neither; nearest are last:3 and first:3",
    ("mergekit", LayerSet(tuple(range(12)), "manual", "all", 12)): "leaves the selection out, and all is every layer",
    ("swift", LayerSet((), "manual", "none", 12)): "is empty",
    ("pefd", CHOSEN): "did you mean 'peft'",
}


@pytest.mark.parametrize(("asked_for", "message"), REFUSED.items())
def test_what_cannot_be_said_is_refused_with_what_comes_nearest(asked_for, message):
    with pytest.raises(UserError, match=re.escape(message)):
        export_selection(asked_for[1], asked_for[0], asked=asked())


def test_options_of_other_formats_and_families_without_names():
    with pytest.raises(UserError, match="--rest_rank is of peft"):
        export_selection(CHOSEN, "trl", asked=asked(rest=2))
    with pytest.raises(UserError, match="--lora_targets is of peft"):
        export_selection(CHOSEN, "axolotl", asked=asked(targets=("q",)))
    with pytest.raises(UserError, match="give --model=DIR"):
        export_selection(CHOSEN, "torchtune")
    with pytest.raises(UserError, match=r"phi3 in a way that is not known.*self_attn.qkv_proj.*llama, mistral, qwen2"):
        export_selection(CHOSEN, "torchtune", asked=asked("phi3"))


HOSTILE = {
    "a: &a [1]\nb: *a\nunfrozen_parameters: []\n": "aliases",
    "unfrozen_parameters: [[[[\n": "expected YAML",
    "unfrozen_parameters: 2024-99-99\n": "expected YAML",
    "unfrozen_parameters: 7\n": "unfrozen_parameters",
    "unfrozen_parameters: ['(']\n": "no regular expression",
    "unfrozen_parameters: ['^lm_head.weight$[9:99]']\n": "rows 9 to 99 of 16",
    "unfrozen_parameters: [x]\nadapter: lora\n": "trains adapters",
    '"peft_type": 1': "expected peft_type to be text",
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": -1}': "r",
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "use_dora": true}': "plain LoRA",
    "tuner_type: lora\ntrainable_parameters: [model]\n": "only full reads",
    "tuner_type: full\nfreeze_parameters_ratio: 0.5\n": "only 0 and 1",
    "slices: [{sources: [{model: x, layer_range: [0, 1000000000000]}]}]\nmerge_method: passthrough\n": "beyond the 12",
    "slices: [{sources: [{model: x, layer_range: [0, 2]}]}]\nmerge_method: slerp\n": "passthrough",
    "--prune-layers a,b": "numbers and commas",
    "nnx.All(__import__('os').system('true'))": "one filter",
    "nnx.All(": "one filter",
    "nothing": "of no format",
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.items())
def test_files_that_are_none(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_back(written(tmp_path, text), "", CHOSEN, asked())


def test_what_is_written_is_read_at_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["mixture"]))
    flags = ["select", f"--model={tmp_path}", "--layers=1", "--format=trl"]
    assert main([*flags, "--lora_targets=q,v"]) == 0
    assert main([*flags, "--lora_targets=q"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--format=trl: cannot say layers 1 of 12" in err and "and 8 more would differ" in err


def test_folding_keeps_numbers_and_names_apart():
    assert folded({"model.layers.3.a": 1, "model.layers.4.a": 1, "model.layers.5.a": 2, "lm_head": 1}) == [
        ("model.layers.{3-4}.a", 1),
        ("model.layers.{5}.a", 2),
        ("lm_head", 1),
    ]
