from math import erf

import numpy as np
import pytest
from support.oracles import states

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores
from jaxcrit.criteria.delta import layer_scores, values_without_each
from jaxcrit.selection import choose, mean_rank, selection_probability
from jaxcrit.selection.choice import jackknife_noise
from jaxcrit.similarity import sweep


def scores_of(values, direction="low", name="delta_debiased", **meta):
    values = np.asarray(values, np.float64)
    return LayerScores(name, values, ~np.isnan(values), direction, None, meta)


def test_mean_rank_by_hand():
    nan = np.nan
    first = scores_of([nan, 0.2, 0.1, 0.4, 0.3], window=3, dataset="a")
    second = scores_of([nan, 9.0, 9.0, 7.0, nan], window=3, dataset="b")
    joined = mean_rank([first, second])
    np.testing.assert_array_equal(joined.values, [nan, 1.25, 0.75, 1.0, nan])  # 1, 0, 2 and 1.5, 1.5, 0
    np.testing.assert_array_equal(joined.valid, [False, True, True, True, False])
    assert joined.name == "delta_debiased" and joined.direction == "low" and joined.stderr is None
    assert joined.meta == {"window": 3, "consensus": "mean_rank", "of": 2}


def test_mean_rank_respects_direction():
    joined = mean_rank([scores_of([1.0, 3.0, 2.0], "high")] * 2)
    np.testing.assert_array_equal(joined.values, [2, 0, 1])
    assert joined.direction == "low"


def test_one_score_is_its_own_consensus():
    score = scores_of([1.0, 2.0])
    assert mean_rank([score]) is score


@pytest.mark.parametrize(
    "others", [[], [scores_of([1.0, 2.0]), scores_of([1.0])], [scores_of([1.0]), scores_of([2.0], name="step")]]
)
def test_scores_that_do_not_belong_together(others):
    with pytest.raises(UserError, match="scores of one criterion and one model"):
        mean_rank(others)


def test_choose():
    score = scores_of(np.abs(np.arange(20) - 9.5) + 1)
    assert choose(score).layers == (8, 9, 10)  # round(0.15 * 20); 8 and 11 tie
    assert choose(score).rule == "critical:3"
    assert choose(score, 4).layers == (8, 9, 10, 11)
    assert choose(score, fraction=0.1).layers == (9, 10)
    assert choose(score, fraction=0.001, model_hash="abc").model_hash == "abc"
    assert choose(scores_of(-score.values), 2, trim=0).layers == (0, 19)
    with pytest.raises(UserError, match="fraction in"):
        choose(score, fraction=1.5)
    with pytest.raises(UserError, match="fraction in"):
        choose(score, 3, fraction=0.5)
    with pytest.raises(UserError, match="at most 16 layers"):
        choose(score, 17)


def measured(seed=0, **options):
    tables = sweep(states(samples=60, layers=14, planted=7, seed=seed, **options))
    key = "step_debiased"
    return layer_scores(tables)[key], values_without_each(tables, key)


@pytest.mark.parametrize("multiplier", ["gaussian", "exponential"])
def test_probability_finds_the_planted_layer(multiplier):
    score, left = measured()
    probability = selection_probability([score], [left], 1, multiplier=multiplier)
    assert probability.shape == (14,) and probability.argmax() == 7 and probability[7] > 0.95
    np.testing.assert_allclose(probability.sum(), 1)


def test_probability_spreads_where_nothing_is_planted():
    probability = selection_probability(*([part] for part in measured(jump=0.95)), 3)
    assert probability.max() < 0.95 and (probability > 0.02).sum() > 4
    np.testing.assert_allclose(probability.sum(), 3)
    np.testing.assert_array_equal(probability[[0, 1, 12, 13]], 0)


def test_draws_stay_at_the_debiased_value():
    """Unlike resampling with replacement, which goes to the biased one (see similarity/test_inference.py)."""
    hidden = np.random.default_rng(0).standard_normal((6, 60, 300)).astype(np.float32)
    tables = sweep(hidden)
    scores, left = layer_scores(tables), values_without_each(tables, "step_debiased")
    drawn = jackknife_noise(left[:, 1:], np.random.default_rng(0), 2000) + scores["step_debiased"].values[1:]
    np.testing.assert_allclose(drawn.mean(axis=0), scores["step_debiased"].values[1:], atol=0.005)
    assert (np.quantile(drawn, 0.999, axis=0) < 0.2).all() and (scores["step"].values[1:] > 0.8).all()


def test_drawn_values_have_the_jackknifes_variance():
    """Two layers apart by d: the chance that they swap is the normal tail of d over the jackknife's error of it."""
    rng = np.random.default_rng(0)
    left = 0.01 * rng.standard_normal((50, 2))
    values = np.array([0.5, 0.6])
    difference = left[:, 1] - left[:, 0]
    error = np.sqrt(49 / 50 * ((difference - difference.mean()) ** 2).sum())
    probability = selection_probability([scores_of(values)], [left], 1, trim=0, draws=20_000)
    expected = 0.5 * (1 + erf(0.1 / error / np.sqrt(2)))
    assert probability[0] == pytest.approx(expected, abs=0.015)


def test_probability_is_seeded_and_joins_datasets():
    scores, left = zip(*(measured(seed) for seed in range(3)), strict=True)
    first = selection_probability(scores, left, 2, draws=500, seed=4)
    np.testing.assert_array_equal(first, selection_probability(scores, left, 2, draws=500, seed=4))
    assert (first != selection_probability(scores, left, 2, draws=500, seed=5)).any()
    assert first.argmax() == 7
    with pytest.raises(UserError, match="at most 10 layers"):
        selection_probability(scores, left, 11)
