"""Bases and what comes of them: batches of text, how alike curves are, a tiny run that goes on."""

import base_and_instruct
import demo_recipe as recipe
import demo_tokenizer
import numpy as np
import pytest

from jaxcrit.core.layers import LayerScores
from jaxcrit.data import demo
from jaxcrit.selection.correlation import partial_given_depth


def test_text_has_no_marks_and_every_token_counts():
    tokenizer = demo_tokenizer.build(rows_per_family=300)
    text = recipe.batch_at(tokenizer, 0, 5, 100, recipe.encode_text, 1.0)
    marks = [tokenizer.token_to_id(mark) for mark in ("[INST]", "[/INST]")]
    assert not np.isin(text["tokens"], marks).any()
    filled = text["segments"] > 0
    last = filled & (text["targets"] == 0)
    assert (text["weights"][filled & ~last] == 1).all() and not text["weights"][~filled].any()
    assert np.isin(recipe.batch_at(tokenizer, 0, 5, 100)["tokens"], marks).any()


def scores(values):
    valid = (np.arange(16) > 1) & (np.arange(16) < 14)
    return {key: LayerScores(key, values, valid, "low", meta={"window": 5}).to_json() for key in base_and_instruct.KEYS}


def cell(rng, near=None):
    """A model; its curves are those of ``near`` and a little noise."""
    made = {"exact": dict.fromkeys(demo.FAMILIES, 0.5)}
    for form in base_and_instruct.TEMPLATES:
        made[form] = {}
        for family in demo.FAMILIES:
            values = rng.normal(size=16)
            if near is not None:
                values = 0.01 * values + np.array(near["plain"][family]["delta"]["values"], float)
            made[form][family] = scores(values)
    return made


@pytest.fixture
def planted():
    """Three seeds whose instruct models have their bases' curves."""
    rng, cells = np.random.default_rng(0), {}
    for seed in range(3):
        cells[f"base-{seed}"] = cell(rng)
        cells[f"instruct-{seed}"] = cell(rng, cells[f"base-{seed}"])
    return {"cells": cells, "planned": [*cells], "time": {"seconds": dict.fromkeys(cells, 60.0)}}


def test_what_a_base_hands_on_stands_apart_from_another_seeds(planted):
    one, other = (base_and_instruct.curves(planted["cells"][name], "plain", "delta") for name in ("base-0", "base-1"))
    t, p, shared = base_and_instruct.alike(one, other)
    layers = np.arange(2, 14)
    by_hand = [partial_given_depth(one[f].values[layers], other[f].values[layers], layers)[0] for f in demo.FAMILIES]
    assert t == pytest.approx(np.mean(by_hand)) and 1 / 24 <= p <= 1 and 0 <= shared <= 1
    kinds = base_and_instruct.pairs(planted["cells"])
    assert [len(found) for found in kinds.values()] == [3, 3, 3, 3, 6, 3, 3]
    rows = {line[-40:].split("  ")[-1]: line.split() for line in base_and_instruct.report(planted).splitlines()}
    own, others = rows["base and its instruct"], rows["base and another's instruct"]
    assert float(own[0]) > 0.9 and abs(float(others[0])) < 0.5
    assert own[3:6] == ["0.042"] * 3, "the floor of 12 layers, turned round too"


def test_a_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    little = ["--seeds=0", "--steps=2", "--layers=8", "--width=32", "--prompts=6", "--families=choice"]
    asked = [*little, f"--out={tmp_path}"]
    assert base_and_instruct.main([*asked, "--minutes=0.00001"]) == 0
    assert "not run: base-0, instruct-0" in capsys.readouterr().out
    assert base_and_instruct.main(asked) == 0
    text = capsys.readouterr().out
    assert "not run" not in text and "exact answers of" in text
    kept = (tmp_path / "base_and_instruct.json").read_bytes()
    monkeypatch.setattr(base_and_instruct, "trained", None)  # nothing is trained again
    assert base_and_instruct.main(asked) == 0 and capsys.readouterr().out == text
    assert (tmp_path / "base_and_instruct.json").read_bytes() == kept
    assert base_and_instruct.main([f"--read={tmp_path}/base_and_instruct.json"]) == 0
    assert capsys.readouterr().out == text
    assert base_and_instruct.main([*asked, "--steps=3"]) == 2 and "was begun with steps 2" in capsys.readouterr().err


def test_heads_fill_the_width(tmp_path, capsys):
    assert base_and_instruct.main([f"--out={tmp_path}/runs", "--width=100"]) == 2
    assert "--width=100: expected a multiple of 32" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "nothing is begun"
