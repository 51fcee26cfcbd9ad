"""Screening on states whose truth is planted, and the numbers under it against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

import jaxcrit as jc
from jaxcrit.criteria.cohesion_rise import cohesion_without_each, leave_one_out, measured, rise
from jaxcrit.studies.screening import Bounds, Distance, Rule, Screen, layer_of_interest, layers_around, separation

LAYERS, WIDTH = 12, 32


def cloud(count, tight, seed, mean=0, layers=LAYERS):
    """States ``[n, L, D]`` around a mean of seed ``mean`` (the same in all layers); less noise from ``tight`` on."""
    centre = 3 * np.random.default_rng(1000 + mean).standard_normal(WIDTH)
    noise = np.random.default_rng(seed).standard_normal((count, layers, WIDTH))
    noise[:, tight:] /= 10
    return (centre + noise).astype(np.float32)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def states(array):
    return jc.states(array, axes="nld")


def test_cohesion_is_the_cosine_with_the_mean_of_the_others():
    given = cloud(9, 6, 0)
    found, left = leave_one_out(given), cohesion_without_each(given)
    for i in range(9):
        others = np.delete(given, i, axis=0)
        again = leave_one_out(others).mean(axis=0)
        np.testing.assert_allclose(left[i], again, rtol=1e-9)
        for layer in range(LAYERS):
            assert found[i, layer] == pytest.approx(cosine(given[i, layer], others[:, layer].mean(axis=0)), abs=1e-6)
    # A mean that holds the prompt itself flatters a small class.
    whole = [cosine(one[0], given[:, 0].mean(axis=0)) for one in given]
    assert np.mean(whole) > found[:, 0].mean() + 0.01


@pytest.mark.parametrize("width", [1, 7, 33, 4096])
def test_two_opposite_states_have_cosine_minus_one_exactly(width):
    vector = np.random.default_rng(width).standard_normal((5, width)).astype(np.float32)
    assert (leave_one_out(np.stack([vector, -vector])) == -1).all()
    assert (leave_one_out(np.zeros((3, 2, width), np.float32)) == 0).all(), "no direction, no cosine"


def test_the_score_is_the_rise_weighted_by_classes_with_the_jackknife():
    given = np.concatenate([cloud(12, 7, 0), cloud(8, 9, 1, mean=1), cloud(3, 2, 2, mean=2)])
    labels = ["a"] * 12 + ["b"] * 8 + ["c"] * 3
    found = measured(given, labels)
    each = [rise(leave_one_out(part).mean(axis=0)) for part in (given[:12], given[12:20])]
    np.testing.assert_allclose(found.values, (12 * each[0] + 8 * each[1]) / 20, equal_nan=True)
    assert np.isnan(found.values[0]) and np.nanargmax(found.values) == 7
    without = rise(leave_one_out(np.delete(given[:12], 4, axis=0)).mean(axis=0))
    np.testing.assert_allclose(found.without_each[4], (11 * without + 8 * each[1]) / 19, equal_nan=True, rtol=1e-7)
    np.testing.assert_array_equal(found.without_each[21], found.values)
    assert found.meta == {"classes": 2, "prompts_in_classes": 20}


@pytest.mark.parametrize("planted", range(LAYERS // 2, LAYERS))
def test_the_layer_of_interest_is_the_planted_one(planted):
    bounds = Bounds.of(cloud(20, planted, planted), Rule())
    assert bounds.interest == planted and bounds.layers == (planted - 2, planted - 1, planted)
    assert bounds.weights.argmax() == 2 and bounds.weights.sum() == pytest.approx(1)


def test_layers_without_a_rise():
    assert layer_of_interest(rise(np.linspace(1, 0, 16))) is None
    assert layer_of_interest(rise(np.array([0.1, 0.9, 0.5, 0.5]))) is None, "a rise in the first half is none"
    assert layer_of_interest(rise(np.array([0.5]))) is None
    assert layers_around(None, 16) == (12, 13, 14) and layers_around(None, 5) == (2, 3)
    assert layers_around(None, 2) == (1,) and layers_around(None, 1) == (0,)
    assert layers_around(1, 3) == (0, 1)
    apart = np.random.default_rng(3).standard_normal((20, 1, WIDTH)).astype(np.float32)
    bounds = Bounds.of(3 + np.linspace(1, 9, LAYERS, dtype=np.float32)[:, None] * apart, Rule())
    assert bounds.interest is None and bounds.layers == (8, 9, 10)
    np.testing.assert_array_equal(bounds.weights, np.full(3, 1 / 3))


def test_each_class_has_its_own_layers_and_weights():
    given = np.concatenate([cloud(12, 6, 0, layers=16), cloud(15, 9, 1, mean=1, layers=16)])
    given[:12, 5:] = cloud(12, 0, 2, layers=16)[:, 5:]  # the first class gathers at 5, outside the second half of 16
    judge = Screen.of(given[:, :11], ["a"] * 12 + ["b"] * 15, Rule())  # of 11 layers the second half begins at 5
    a, b = judge.classes["a"], judge.classes["b"]
    assert (a.interest, b.interest) == (5, 9)
    assert a.layers == (3, 4, 5) and b.layers == (7, 8, 9)
    for one, rows in ((a, given[:12]), (b, given[12:])):
        rises = np.fmax(rise(leave_one_out(rows[:, :11]).mean(axis=0))[list(one.layers)], 0)
        np.testing.assert_allclose(one.weights, rises / rises.sum())


def planted(q, seed=0):
    """Benign samples; and in question 20 more, and 20 that are the same below layer q and elsewhere after."""
    benign, held = cloud(40, 8, seed), cloud(20, 8, seed + 1)
    poisoned = held.copy()
    poisoned[:, q:] = cloud(20, 8, seed + 2, mean=7)[:, q:]
    return benign, np.concatenate([held, poisoned])


@pytest.mark.parametrize("q", [1, 6, 11])
def test_auroc_is_a_half_below_the_planted_layer_and_one_from_it_on(q):
    benign, asked = planted(q)
    classes, truth = (["a"] * 40, ["a"] * 40), [0] * 20 + [1] * 20
    found = jc.screen(states(asked), benign=states(benign), classes=classes, truth=truth).found["truth"]
    values = [one["value"] for one in found["auroc"]["layers"]]
    assert values == [0.5] * q + [1.0] * (LAYERS - q)
    assert found["auroc"]["last_layer"]["value"] == found["auroc"]["mahalanobis"]["value"] == 1.0
    low, high = found["auroc"]["layers"][-1]["interval"]
    assert 0.8 < low < 0.9 and high == pytest.approx(1), "20 ordered pairs do not make it certain"
    assert found["auroc"]["score"]["value"] == (1.0 if q <= 8 else 0.5)


def test_flags_and_thresholds():
    benign, asked = planted(7)
    given = {"benign": states(benign), "classes": (["a"] * 40, ["a"] * 39 + ["z"])}
    found = jc.screen(states(asked), **given)
    assert [row["flagged"] for row in found.flags[20:]] == [True] * 19 + [None]
    assert found.flags[-1]["class"] == "z" and found.flags[-1]["score"] is None
    assert found.found["data"] == {"prompts": 40, "flagged": found.found["data"]["flagged"], "unknown": 1} | {
        "passed": 39 - found.found["data"]["flagged"]
    }
    bounds = Bounds.of(benign, Rule())
    scores = leave_one_out(benign)[:, list(bounds.layers)] @ bounds.weights
    row = found.flags[3]
    assert row["threshold"] == pytest.approx(scores.mean() - 2.5 * scores.std())
    expected = sum(
        weight * cosine(asked[3, layer], benign[:, layer].mean(axis=0))
        for weight, layer in zip(bounds.weights, bounds.layers, strict=True)
    )
    assert row["score"] == pytest.approx(expected, abs=1e-6) and row["layers"] == [6, 7, 8]
    assert row["z"] == pytest.approx((row["score"] - scores.mean()) / scores.std(), rel=1e-4)
    quantile = jc.screen(states(asked), **given, fpr=0.1)
    assert quantile.flags[3]["threshold"] == pytest.approx(np.quantile(scores, 0.1))
    assert quantile.warnings == ["one class only: prompts of every other one are unknown"]
    few = jc.screen(states(asked), **given, fpr=0.01).warnings[1]
    assert few.startswith("--fpr=0.01: takes 100 benign prompts to a class; 1 of 1 have fewer") and few.endswith(": a")
    named = jc.screen(states(asked), **given, layers="9-11")
    assert named.flags[0]["layers"] == [9, 10, 11]
    assert jc.screen(states(asked), **given, layers="cohesion_rise:1").flags[0]["layers"] == [8]


def test_held_out_false_positives_are_of_the_other_half():
    given = cloud(200, 8, 0)
    flagged, count = Screen.of(given, ["a"] * 200, Rule(fpr=0.2)).held_out
    assert count == 200 and 20 < flagged < 65
    assert Screen.of(given, ["a"] * 200, Rule(tau=100)).held_out == (0, 200)


def test_scale_and_order_change_nothing():
    benign, asked = planted(8)
    benign = np.concatenate([benign, cloud(10, 9, 5, mean=1)])
    classes = ["a"] * 40 + ["b"] * 10
    ids = [f"s{number}" for number in range(50)]

    def screened(order, factor, whole=1.0):
        given = jc.states(whole * benign[order], axes="nld", sample_ids=[ids[place] for place in order])
        changed = whole * asked.copy()
        changed[4] *= factor
        labels = [classes[place] for place in order], ["a"] * 40
        return jc.screen(states(changed), benign=given, classes=labels, truth=[0] * 20 + [1] * 20)

    whole = screened(np.arange(50), 1)
    order = np.random.default_rng(0).permutation(50)
    again = screened(order, 1)
    assert again.flags == whole.flags and again.found["held_out"] == whole.found["held_out"], "to the last bit"
    for one in (screened(np.arange(50), 7), screened(np.arange(50), 1, 7)):
        for row, expected in zip(one.flags, whole.flags, strict=True):
            assert row["flagged"] == expected["flagged"]
            assert row["score"] == pytest.approx(expected["score"], abs=1e-6)


def test_the_distance_is_mahalanobis_by_the_shrunk_covariance():
    rng = np.random.default_rng(0)
    apart = rng.standard_normal((30, 3, 5)) * np.linspace(0.5, 2, 5)
    asked = rng.standard_normal((4, 3, 5))
    found = Distance.of(apart)
    x = (apart / found.scale[:, None]).reshape(30, 15)
    np.testing.assert_allclose((x.reshape(30, 3, 5) ** 2).mean(axis=(0, 2)), 1)
    covariance, size = x.T @ x / 30, 15
    level = np.trace(covariance) / size
    off = ((covariance - level * np.eye(size)) ** 2).sum()
    noise = sum(((np.outer(one, one) - covariance) ** 2).sum() for one in x) / 30**2
    assert found.shrinkage == pytest.approx(min(1, noise / off))
    shrunk = (1 - found.shrinkage) * covariance + found.shrinkage * level * np.eye(size)
    z = (asked / found.scale[:, None]).reshape(4, 15)
    np.testing.assert_allclose(found(asked), np.sqrt(np.einsum("mi,ij,mj->m", z, np.linalg.inv(shrunk), z)))


def test_shares_of_the_truth_leave_unknown_rows_out():
    row = {"z": -1.0, "by_layer": [-1.0, -2.0], "distance": 1.0, "flagged": True}
    unknown = dict.fromkeys(row)
    rows = [row, {**row, "z": 1.0, "flagged": False}, unknown, unknown, {**row, "z": 0.0, "flagged": False}]
    found = separation(rows, [1, 0, 1, 0, 0])
    assert found["true_positives"] | {"interval": 0} == {"flagged": 1, "of": 1, "unknown": 1, "interval": 0}
    assert found["false_positives"] | {"interval": 0} == {"flagged": 0, "of": 2, "unknown": 1, "interval": 0}
    assert found["auroc"]["score"]["value"] == 1 and found["auroc"]["mahalanobis"]["value"] == 0.5
    nothing = separation([unknown], [1])
    assert nothing["auroc"]["layers"] == [] and nothing["true_positives"]["interval"] is None


def test_the_last_layer_behind_the_final_norm_is_never_of_interest():
    given = cloud(20, LAYERS - 1, 0)
    assert Bounds.of(given, Rule()).interest == LAYERS - 1
    assert Bounds.of(given, Rule(normed=True)).interest != LAYERS - 1


def mistake(message, **given):
    benign = given.pop("benign", states(cloud(20, 6, 0)))
    asked = given.pop("what", states(cloud(10, 6, 1)))
    with pytest.raises(jc.UserError) as caught:
        jc.screen(asked, benign=benign, **{"classes": (["a"] * 20, ["a"] * 10), **given})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes():
    several = [str(number // 4) for number in range(20)]
    mistake(
        "a class of 8 prompts or more, got 20 prompts in 5 classes, the largest of 4", classes=(several, ["0"] * 10)
    )
    mistake("classes: of states expected two lists", classes="next")
    mistake("classes: expected one for each of 20 samples, got 3", classes=(["a"] * 3, ["a"] * 10))
    mistake("truth: expected one for each of 10 samples, got 2", truth=[0, 1])
    mistake("truth: expected 0 or 1, got 2", truth=[0, 1] * 4 + [0, 2])
    mistake("benign: expected hidden states beside hidden states, got list", benign=["What?"])
    mistake("have 12 and 32", benign=states(cloud(20, 6, 0)[:, :5]))
    mistake("limit: needs a model", limit=3)
    mistake("rows: needs a model", rows=["What?"])
    mistake("tau=1.0 fpr=0.1: give one of them", tau=1.0, fpr=0.1)
    mistake("no score 'delta'", layers="delta:3")
    mistake("expected layers 0 to 11, got 12", layers="12")
    units = jc.states(cloud(20, 6, 0), axes="nld", units=[number // 2 for number in range(20)])
    mistake("several states come from one prompt", benign=units)
    equal = cloud(20, 6, 0)
    equal[:, 3] = equal[0, 3]
    with pytest.raises(jc.UserError, match=r"layer 3: all 20 benign states are the same; nothing to compare"):
        Screen.of(equal, ["a"] * 20, Rule())
    alike = np.concatenate([np.repeat(cloud(1, 6, mean, mean=mean), 10, axis=0) for mean in (0, 1)])
    with pytest.raises(jc.UserError, match="each of the 2 classes have equal states"):
        Screen.of(alike, ["a"] * 10 + ["b"] * 10, Rule())
    one = Screen.of(np.concatenate([alike[:10], cloud(10, 6, 3)]), ["a"] * 10 + ["b"] * 10, Rule())
    assert list(one.classes) == ["b"] and one.small == {"a": 10}
