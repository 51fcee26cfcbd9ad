"""Layer scores and layer sets: round trips and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores, write_scores
from jaxcrit.core.selections import LayerSpec, resolve


def scores(values, direction="low", **changes):
    values = np.asarray(values, float)
    return LayerScores("delta_debiased", values, np.isfinite(values), direction, **changes)


CURVE = scores([math.nan, math.nan, 0.9, 0.5, 0.7, 0.5, 0.8, 0.95, math.nan, math.nan])


def test_a_set_is_read_back_for_its_own_model_only(tmp_path):
    chosen = LayerSet((3, 5), "delta_debiased", "critical:2", 10, "a" * 64)
    chosen.save(tmp_path / "layers.json")
    assert LayerSet.load(tmp_path / "layers.json") == chosen
    spec = LayerSpec.parse(f"@{tmp_path}/layers.json")
    assert resolve(spec, 10, model_hash="a" * 64) == chosen
    with pytest.raises(UserError, match="made for 10 layers, but this model has 12"):
        resolve(spec, 12)
    with pytest.raises(UserError, match="made for model aaaaaaaaaaaa, this one is bbbbbbbbbbbb"):
        resolve(spec, 10, model_hash="b" * 64)
    assert "layers 3, 5 of 10" in str(chosen)


def test_scores_are_read_back_and_nothing_invalid_is_a_number(tmp_path):
    curve = scores(CURVE.values, stderr=np.where(CURVE.valid, 0.01, math.nan), meta={"window": 5})
    write_scores(tmp_path / "scores.json", {"delta_debiased": curve})
    raw = json.loads((tmp_path / "scores.json").read_text())
    assert raw["format"] == "jaxcrit.scores" and raw["format_version"] == 1 and raw["num_layers"] == 10
    assert raw["scores"]["delta_debiased"]["values"][:3] == [None, None, 0.9]
    back = read_scores(tmp_path / "scores.json")["delta_debiased"]
    np.testing.assert_array_equal(back.values, curve.values)
    np.testing.assert_array_equal(back.stderr, curve.stderr)
    np.testing.assert_array_equal(back.ranking(), curve.ranking())
    assert back.meta == {"window": 5}


def test_scores_carry_the_deletions_beside_them(tmp_path):
    write_scores(tmp_path / "scores.json", {"delta_debiased": CURVE, "step": CURVE})
    write_deletions(tmp_path, {"delta_debiased": np.ones((3, 10))}, ["a", "b", "c"])
    back = read_scores(tmp_path / "scores.json", deletions=True)
    assert back["delta_debiased"].deletions.values.shape == (3, 10) and back["step"].deletions is None
    assert read_scores(tmp_path / "scores.json")["delta_debiased"].deletions is None
    write_deletions(tmp_path, {"delta_debiased": np.ones((3, 7))}, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"expected delta_debiased to be floats \[3, 10\], got float64 \[3, 7\]"):
        read_scores(tmp_path / "scores.json", deletions=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON of format jaxcrit.scores"),
        ("[]", "expected format jaxcrit.scores, got None"),
        ('{"format": "jaxcrit.layers"}', "got 'jaxcrit.layers'"),
        ('{"format": "jaxcrit.scores", "format_version": 9}', "format_version 1, got 9"),
        ('{"format": "jaxcrit.scores", "format_version": 1, "num_layers": 2}', "damaged"),
        (
            '{"format": "jaxcrit.scores", "format_version": 1, "num_layers": 2,'
            ' "scores": {"delta": {"values": [1], "valid": [true], "direction": "low"}}}',
            r"expected 2 values in every score, got otherwise in \['delta'\]",
        ),
    ],
)
def test_a_damaged_scores_file_is_one_line(content, message, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_scores(tmp_path / "scores.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_scores(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["a"]}, r"expected layers\[0\] to be a whole number of 0 or more, got 'a'"),
        ({"layers": [9]}, "expected layers 0 to 8, got 9"),
        ({"num_layers": 10**7}, "expected num_layers to be a whole number of at most 10,000"),
        ({"num_layers": None}, "expected num_layers to be a positive whole number, got None"),
        ({"rule": 3}, "expected rule to be text, got 3"),
    ],
)
def test_a_damaged_layer_file_is_one_line(changes, message, tmp_path):
    LayerSet((3, 5), "delta_debiased", "critical:2", 9).save(tmp_path / "layers.json")
    content = json.loads((tmp_path / "layers.json").read_text()) | changes
    (tmp_path / "layers.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        LayerSet.load(tmp_path / "layers.json")


ENTRY = (
    '{"format": "jaxcrit.scores", "format_version": 1, "num_layers": LAYERS, "scores": {"d": {"values": VALUES,'
    ' "valid": [true, true], "direction": DIRECTION, "stderr": ERRORS, "meta": META}}}'
)
WHOLE = {"LAYERS": "2", "VALUES": "[1, 2]", "DIRECTION": '"low"', "ERRORS": "null", "META": "{}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LAYERS": "NaN"}, "NaN is no number of JSON"),
        ({"LAYERS": "2e9"}, "expected num_layers to be a whole number of at most 10,000"),
        ({"VALUES": "[1, 1e999]"}, r"expected scores.d.values\[1\] to be a number, got inf"),
        ({"VALUES": f"[1, {10**400}]"}, r"expected scores.d.values\[1\] to be a number"),
        ({"DIRECTION": '"up"'}, "expected scores.d.direction to be low or high, got 'up'"),
        ({"ERRORS": "[0.1]"}, "expected 2 values in every score"),
        ({"META": "null"}, "expected scores.d.meta to be a JSON object, got None"),
        ({"META": '{"window": "x"}'}, "meta.window to be a positive whole number, got 'x'"),
        ({"META": '{"trained": 1}'}, "meta.trained to be a JSON object, got 1"),
        ({"META": '{"unchanged": [1]}'}, "meta.unchanged to be a number, got"),
    ],
)
def test_entries_that_are_not_as_declared(changes, message, tmp_path):
    content = ENTRY
    for name, value in {**WHOLE, **changes}.items():
        content = content.replace(name, value)
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_scores(tmp_path / "scores.json")
