"""Published choices: by hand on planted scores, and beside what the authors' released code chooses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.selection.recipes import RECIPES, by_recipe, lint

GOLDEN = Path(__file__).parent.parent / "goldens" / "recipes.json"
CURVES = SHARED / "paper/llama2_7b_chat_delta5_figures.csv"
AUTHORS = json.loads(GOLDEN.read_text(encoding="utf-8"))
SCORES = {name: LayerScores.from_json(name, entry) for name, entry in AUTHORS["scores"].items()}
DEPTH = 16


def planted(key: str, values: list[float], stderr: float | None = None, **meta) -> LayerScores:
    found = np.array(values, float)
    valid = np.isfinite(found)
    return LayerScores(key, found, valid, "low", None if stderr is None else np.where(valid, stderr, np.nan), meta)


NONE = float("nan")
BY_HAND = {  # 8 layers; values, and the layers chosen of them
    "liu2025:2": ("delta", [0.1, 0.2, 0.9, 0.5, 0.8, 0.4, 0.1, 0.1], (3, 5)),
    "ogawa2026": ("step", [NONE, 0.9, 0.3, 0.8, 0.7, 0.2, 0.9, 0.7], (0, 2, 4, 5)),
    "spectrum:3": ("weight_snr", [1.0, 3.0, 2.0, 1.0, 3.0, 2.0, 0.5, 0.1], (1, 2, 4)),
    "shortgpt:3": ("block_influence", [0.1, 0.3, 0.1, 0.2, 0.05, 0.2, 0.9, 0.9], (0, 2, 4)),
    "gromov:3": ("angular_distance", [0.0, 0.0, 0.4, 0.2, 0.1, 0.2, 0.1, 0.9], (4, 5, 6)),
    "tail:3": ("delta", [0.1] * 8, (5, 6, 7)),
}


@pytest.mark.parametrize("text", BY_HAND)
def test_planted_scores(text):
    key, values, layers = BY_HAND[text]
    _, chosen = by_recipe(text, {key: planted(key, values)}, 8)
    assert chosen.layers == layers
    assert chosen.rule == f"recipe {text if ':' in text else text + ':4'}"


def test_the_default_numbers_are_those_of_32_layers():
    expected = {"liu2025": 5, "ogawa2026": 16, "spectrum": 16, "shortgpt": 8, "gromov": 8, "tail": 8}
    assert {name: recipe.count(32) for name, recipe in RECIPES.items()} == expected


@pytest.mark.parametrize("name", AUTHORS["authors"])
def test_beside_the_authors_code_on_the_embedded_model(name):
    _, chosen = by_recipe(name, SCORES, DEPTH)
    theirs = AUTHORS["authors"][name]
    if name in ("gromov:7", "gromov:8"):  # angles add up to more than the angle across: runs that start elsewhere
        assert list(chosen.layers) != theirs
    else:
        assert list(chosen.layers) == theirs


def test_their_steps_are_ours_but_for_layer_0():
    theirs = np.array(AUTHORS["steps"])
    assert theirs[0] == 0  # the last token of every prompt is the same, and so is its embedding
    np.testing.assert_allclose(theirs[1:], SCORES["step"].values[1:], atol=2e-6)


@pytest.mark.skipif(not CURVES.exists(), reason="needs the paper's curves, ../shared/paper")
def test_liu2025_on_the_published_curve():
    rows = list(csv.DictReader(CURVES.read_text(encoding="utf-8").splitlines()))
    values = np.full(32, np.nan)
    for row in rows:
        values[int(row["center_layer"])] = float(row["dolly"])
    _, chosen = by_recipe("liu2025", {"delta": planted("delta", values.tolist())}, 32)
    assert chosen.layers == (11, 12, 13, 14, 15)


LOOK_OUT = {
    "padding": ({"step": planted("step", [NONE, 0.9, 0.0, 0.8])}, "ogawa2026", "CKA is 0.000 at layers 2"),
    "unknown tap": ({"step": planted("step", [NONE, 0.9, 0.3, 0.8])}, "ogawa2026", "a last column is padding"),
    "sink": (
        {"step": planted("step", [NONE, 0.9, 0.3, 0.8], position="mean")},
        "ogawa2026",
        "at position 0 too: where it is an attention sink",
    ),
    "sink of all tokens": (
        {"block_influence": planted("block_influence", [0.1, 0.9, 0.3, 0.8], position="last")},
        "shortgpt",
        "at position 0 too",
    ),
    "flat": (
        {"delta": planted("delta", [0.9, 0.9, 0.91, 0.9, 0.92, 0.9, 0.9], stderr=0.01, position="last")},
        "liu2025",
        "flat curve: its range 0.0200 is within 3 standard errors (0.0100)",
    ),
    "not determined": (
        {"delta": planted("delta", [0.9, 0.9, 0.50, 0.9, 0.51, 0.9, 0.9], stderr=0.01, position="last")},
        "liu2025:1",
        "layer 2 is chosen and 4 is not, and they differ by 0.0100 with a standard error of 0.0141",
    ),
    "depth": (
        {"angular_distance": planted("angular_distance", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])},
        "gromov",
        "depth alone orders these layers (ρ -1.00)",
    ),
    "circle": (
        {
            "weight_snr": planted(
                "weight_snr", [1.0, 3.0, 2.0, 1.0], trained={"layers": [1, 2], "criteria": ["weight_snr"]}
            )
        },
        "spectrum",
        "only layers 1-2 of this model were trained",
    ),
    "bias": (
        {
            "delta": planted("delta", [0.9, 0.9, 0.5, 0.9, 0.8, 0.9, 0.9], position="last"),
            "delta_debiased": planted("delta_debiased", [0.9, 0.9, 0.8, 0.9, 0.5, 0.9, 0.9], position="last"),
        },
        "liu2025:1",
        "without the bias it would be layers 4",
    ),
}


@pytest.mark.parametrize("case", LOOK_OUT)
def test_lint_names_where_a_recipe_misleads(case):
    scores, text, told = LOOK_OUT[case]
    depth = len(next(iter(scores.values())).values)
    recipe, chosen = by_recipe(text, scores, depth)
    assert any(told in line for line in lint(recipe, scores, chosen)), lint(recipe, scores, chosen)


def test_lint_is_silent_where_nothing_was_found():
    values = [0.9, 0.8, 0.5, 0.9, 0.8, 0.95, 0.9]
    scores = {key: planted(key, values, stderr=0.01, position="last") for key in ("delta", "delta_debiased")}
    recipe, chosen = by_recipe("liu2025:1", scores, 7)
    assert lint(recipe, scores, chosen) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("liu25", "did you mean 'liu2025'"),
        ("tail:0", "expected tail:K with a whole number"),
        ("shortgpt:17", "17 layers are more than it can choose of 16"),
        ("gromov:16", "more than it can choose"),
        ("liu2025:13", "more than it can choose"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError, match=message):
        by_recipe(text, SCORES, DEPTH)


def test_command(tmp_path, capsys):
    write_scores(tmp_path / "scores.json", SCORES)
    flags = ["select", f"--scores={tmp_path / 'scores.json'}"]
    assert main([*flags, "--recipe=ogawa2026", "--format=mergekit"]) == 0
    out, err = capsys.readouterr()
    assert "layer_range: [3, 4]" in out and "layers 0, 1, 2, 4, 5, 6, 14, 15 of 16 (recipe ogawa2026:8 by step)" in err
    assert "look out: these are layers to train, which --format=mergekit does not do" in err
    assert main(["select", "--recipe=tail:2", "--model=tinyllama-1.1b", "--format=llamacpp"]) == 0
    assert capsys.readouterr().out == "--prune-layers 20,21\n"
    for wrong, message in {
        "--recipe=liu25": "did you mean 'liu2025'",
        "--recipe=tail --layers=last:2": "give one of them",
        "--format=pefd": "did you mean 'peft'",
        "--lora_targets=q,w": "no 'w'; expected some of q,k,v,o,gate,up,down",
        "--check=x": "expected --model=DIR too",
        "--model=tinyllama-1.1b": "has 22 layers, but the scores are of 16",
    }.items():
        assert main([*flags, *wrong.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err.splitlines()[-1]
