"""Layer scores, the grammar of --layers, and layer sets: round trips, defaults and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, default_count, read_scores, resolve, write_scores


def scores(values, direction="low", **changes):
    values = np.asarray(values, float)
    return LayerScores("delta_debiased", values, np.isfinite(values), direction, **changes)


CURVE = scores([math.nan, math.nan, 0.9, 0.5, 0.7, 0.5, 0.8, 0.95, math.nan, math.nan])


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(10)),
        ("critical", [3, 5]),
        ("critical:1", [3]),
        ("critical:3", [3, 4, 5]),
        ("noncritical:2", [2, 7]),
        ("first:3", [0, 1, 2]),
        ("last:2", [8, 9]),
        ("3-5,9", [3, 4, 5, 9]),
        ("7", [7]),
        ("5,3,3-4", [3, 4, 5]),
    ],
)
def test_resolve(text, layers):
    chosen = resolve(LayerSpec.parse(text), 10, scores=CURVE)
    assert chosen.layers == tuple(layers)
    assert chosen.complement() == tuple(sorted(set(range(10)) - set(layers)))


def test_random_layers_depend_on_the_seed_alone():
    one, same, other = (resolve(LayerSpec.parse(f"random:5{seed}"), 40) for seed in ("", ":0", ":1"))
    assert one.layers == same.layers != other.layers
    assert len(set(one.layers)) == 5 and one.rule == "random:5:0"


def test_high_scores_are_critical_where_the_criterion_says_so():
    curve = scores([0.1, 0.9, 0.3, 0.8], direction="high")
    assert resolve(LayerSpec.parse("critical:2"), 4, scores=curve, trim=0).layers == (1, 3)


def test_default_count_is_five_of_32():
    assert [default_count(layers) for layers in (1, 5, 16, 28, 32, 40, 80)] == [1, 1, 2, 4, 5, 6, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected all"),
        ("critcal:3", "did you mean 'critical'"),
        ("critical:0", "at least 1"),
        ("critical:x", "critical:K"),
        ("random", "random:K"),
        ("all:3", "expected all"),
        ("5-3", "lower layer first"),
        ("3;4", "expected all"),
        ("-1", "expected all"),
    ],
)
def test_what_is_not_of_the_grammar(text, message):
    with pytest.raises(UserError, match=message):
        LayerSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "given_scores", "message"),
    [
        ("critical:7", CURVE, "at most 6 layers after trimming 2"),
        ("first:11", CURVE, "at most 10"),
        ("8-12", CURVE, "expected layers 0 to 9, got 10, 11, 12"),
        ("critical", None, "needs scores"),
        ("critical", scores([0.5] * 6), "of 6 layers"),
    ],
)
def test_what_the_model_does_not_have(text, given_scores, message):
    with pytest.raises(UserError, match=message):
        resolve(LayerSpec.parse(text), 10, scores=given_scores)


@given(
    st.one_of(
        st.sampled_from(["all", "critical"]),
        st.builds("{}:{}".format, st.sampled_from(["critical", "noncritical", "first", "last"]), st.integers(1, 99)),
        st.builds("random:{}:{}".format, st.integers(1, 99), st.integers(0, 9)),
        st.lists(st.integers(0, 99), min_size=1).map(lambda layers: ",".join(map(str, layers))),
        st.builds("@{}".format, st.text("abc/.", min_size=1)),
    )
)
def test_a_spec_prints_as_it_reads(text):
    assert str(LayerSpec.parse(text)) == text


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
