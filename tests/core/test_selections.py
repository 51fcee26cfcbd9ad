"""The grammar of selections: what it reads, how it prints, what it means for a model, and every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import WORDS, LayerSpec, default_count, resolve, span, split_specs


def scores(values, direction="low", key="delta_debiased"):
    values = np.asarray(values, float)
    return LayerScores(key, values, np.isfinite(values), direction)


CURVE = scores([math.nan, math.nan, 0.9, 0.5, 0.7, 0.5, 0.8, 0.95, math.nan, math.nan])
RISING = scores(np.arange(10.0), "high", "fisher")
SCORES = {"delta_debiased": CURVE, "fisher": RISING}


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
        ("fisher:2", [6, 7]),
        ("fisher", [6, 7]),
        ("delta_debiased:3", [3, 4, 5]),
        ("boundary(critical:3)", [3, 5]),
        ("boundary(noncritical:1)", [7]),
        ("boundary(2,4-6)", [2, 6]),
        ("boundary(boundary(fisher:4))", [4, 7]),
        (" boundary( first:4 ) ", [0, 3]),
    ],
)
def test_resolve(text, layers):
    chosen = resolve(LayerSpec.parse(text), 10, scores=SCORES)
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
        ("boundary", r"boundary\(critical:5\)"),
        ("boundary:2", r"boundary\(critical:5\)"),
        ("boundary()", "expected all"),
        ("boundary(critical:3", "expected all"),
        ("boundary(critcal:3)", "did you mean 'critical'"),
        ("fisher:0", "at least 1"),
        ("fisher:2:3", "expected fisher:K"),
        ("critical:²", "critical:K"),
        ("٣", "expected all"),
        ("9" * 5000, "expected layers below 10,000"),
        ("0-99999999", "expected layers below 10,000"),
        ("critical:" + "9" * 5000, "critical:K"),
        ("boundary(" * 1200 + "all" + ")" * 1200, "expected one selection inside boundary"),
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
        ("8-12", CURVE, "--layers=8-12: expected layers 0 to 9, got 10-12"),
        ("critical", None, "needs scores"),
        ("critical", scores([0.5] * 6), "of 6 layers"),
    ],
)
def test_what_the_model_does_not_have(text, given_scores, message):
    with pytest.raises(UserError, match=message):
        resolve(LayerSpec.parse(text), 10, scores=given_scores)


KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,7}", fullmatch=True).filter(
    lambda key: key not in WORDS and not any(key[:2] == word[:2] for word in WORDS)
)
SIMPLE = st.one_of(
    st.sampled_from(["all", "critical", "noncritical", "fisher"]),
    st.builds("{}:{}".format, st.sampled_from(["critical", "noncritical", "first", "last"]), st.integers(1, 99)),
    st.builds("{}:{}".format, KEYS, st.integers(1, 99)),
    st.builds("random:{}:{}".format, st.integers(1, 99), st.integers(0, 9)),
    st.lists(st.integers(0, 99), min_size=1).map(lambda layers: ",".join(map(str, layers))),
    st.builds("@{}".format, st.text("abc/.()", min_size=1)),
)
SPECS = st.recursive(SIMPLE, lambda inner: inner.map("boundary({})".format), max_leaves=4)


@given(SPECS)
@example("boundary(@(((((((()")
def test_a_spec_prints_as_it_reads(text):
    spec = LayerSpec.parse(text)
    assert str(spec) == text
    assert LayerSpec.parse(str(spec)) == spec


def resolvable(num_layers):
    """Selections of a model of so many layers, which `SCORES` of it can rank."""
    counts = st.integers(1, num_layers)
    simple = st.one_of(
        st.just("all"),
        st.builds("{}:{}".format, st.sampled_from(["critical", "noncritical", "fisher", "first", "last"]), counts),
        st.builds("random:{}:{}".format, counts, st.integers(0, 9)),
        st.lists(st.integers(0, num_layers - 1), min_size=1).map(lambda layers: ",".join(map(str, layers))),
    )
    return st.recursive(simple, lambda inner: inner.map("boundary({})".format), max_leaves=3)


@given(st.integers(1, 12).flatmap(lambda count: st.tuples(st.just(count), resolvable(count), st.integers(0, 99))))
def test_a_boundary_is_the_ends_of_its_selection_and_a_rule_says_how_to_choose_again(drawn):
    num_layers, text, seed = drawn
    values = np.random.default_rng(seed).permutation(num_layers)
    ranking = {"delta_debiased": scores(values), "fisher": scores(values, "high", "fisher")}
    chosen = resolve(LayerSpec.parse(text), num_layers, scores=ranking, trim=0)
    ends = resolve(LayerSpec.parse(f"boundary({text})"), num_layers, scores=ranking, trim=0)
    assert set(ends.layers) == {chosen.layers[0], chosen.layers[-1]} <= set(chosen.layers)
    again = LayerSpec.parse(chosen.rule)
    assert str(again) == chosen.rule
    assert resolve(again, num_layers, scores=ranking, trim=0) == chosen
    assert resolve(LayerSpec.parse(span(chosen.layers)), num_layers).layers == chosen.layers


@given(st.integers(1, 10), st.integers(0, 5))
def test_most_critical_by_a_key_is_the_end_that_its_direction_says(count, trim):
    values = np.random.default_rng(count).permutation(20)
    low, high = (resolve(LayerSpec.parse(f"x:{count}"), 20, scores={"x": scores(signed, direction, "x")}, trim=trim)
                 for signed, direction in ((values, "low"), (-values, "high")))  # fmt: skip
    assert low.layers == high.layers and low.criterion == "x" and low.rule == f"x:{count}"
    assert all(trim <= layer < 20 - trim for layer in low.layers)


def test_a_score_given_alone_is_the_one_that_ranks():
    assert resolve(LayerSpec.parse("critical:2"), 10, scores=RISING).layers == (6, 7)
    assert resolve(LayerSpec.parse("critical:2"), 10, scores=SCORES, criterion="fisher").layers == (6, 7)
    with pytest.raises(UserError, match=r"--layers=critical:2: ranks by delta_debiased.* one of fisher, as KEY:K"):
        resolve(LayerSpec.parse("critical:2"), 10, scores={"fisher": RISING})


@pytest.mark.parametrize(
    ("text", "needs", "key"),
    [
        ("critical", True, ""),
        ("boundary(noncritical:3)", True, ""),
        ("fisher", True, "fisher"),
        ("boundary(boundary(fisher:3))", True, "fisher"),
        ("boundary(first:3)", False, ""),
        ("@a.json", False, ""),
    ],
)
def test_what_a_selection_needs(text, needs, key):
    spec = LayerSpec.parse(text)
    assert (spec.needs_scores, spec.score_key) == (needs, key)


@pytest.mark.parametrize("text", ["fihser:2", "boundary(fihser:2)"])
def test_an_absent_score_is_named_with_those_there_are(text):
    spec = LayerSpec.parse(text)
    with pytest.raises(UserError) as caught:
        resolve(spec, 10, scores=SCORES)
    words = "no score 'fihser' (did you mean 'fisher'?); there are delta_debiased, fisher"
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^--arms=.*no score 'fihser'.*there are delta$"):
        spec.check_key(["delta"], "arms")


def test_the_boundary_of_a_file_and_of_nothing(tmp_path):
    LayerSet((2, 3, 5), "delta_debiased", "critical:3", 10).save(tmp_path / "layers.json")
    LayerSet((), "manual", "full", 10).save(tmp_path / "none.json")
    ends = resolve(LayerSpec.parse(f"boundary(@{tmp_path}/layers.json)"), 10)
    assert ends == LayerSet((2, 5), "delta_debiased", "boundary(critical:3)", 10)
    assert resolve(LayerSpec.parse(f"boundary(@{tmp_path}/none.json)"), 10).layers == ()


def test_the_flag_that_gave_a_selection_is_named():
    with pytest.raises(UserError, match=r"^--sets=x y: expected all"):
        LayerSpec.parse("x y", "sets")
    with pytest.raises(UserError, match=r"^--sets=12: expected layers 0 to 9"):
        resolve(LayerSpec.parse("12", "sets"), 10, flag="sets")


def test_lists_of_selections_split_outside_parentheses():
    assert split_specs("full, boundary(3-5,9),7", ",") == ["full", "boundary(3-5,9)", "7"]
    assert split_specs("3-5,9;boundary(boundary(a:1));@x.json", ";") == ["3-5,9", "boundary(boundary(a:1))", "@x.json"]
    assert split_specs("", ",") == [""]
