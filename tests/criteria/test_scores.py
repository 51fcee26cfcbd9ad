import numpy as np
import pytest
from support.oracles import states

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.delta import CURVES, delta, layer_scores, values_without_each
from jaxcrit.criteria.step import step
from jaxcrit.similarity import from_tables, sweep


def test_four_scores_of_the_sweep():
    tables = sweep(states())
    scores = layer_scores(tables, window=3, include_self=False, meta={"dataset": "walk"})
    assert list(scores) == ["delta", "delta_debiased", "step", "step_debiased"] == list(CURVES)
    for bias, suffix in (("biased", ""), ("debiased", "_debiased")):
        matrix = from_tables(tables, bias)
        np.testing.assert_array_equal(scores["delta" + suffix].values, delta(matrix, 3, include_self=False)[0])
        np.testing.assert_array_equal(scores["step" + suffix].values, step(matrix)[0])
        np.testing.assert_array_equal(scores["step" + suffix].valid, step(matrix)[1])
    assert all(score.direction == "low" and score.name == key for key, score in scores.items())
    assert scores["delta"].meta == {
        "dataset": "walk",
        "bias": "biased",
        "num_samples": 40,
        "window": 3,
        "include_self": False,
    }
    assert "window" not in scores["step"].meta
    assert scores["delta"].to_json()["stderr"][0] is None


@pytest.mark.parametrize("key", list(CURVES))
def test_stderr_is_the_jackknife_by_deletion(key):
    hidden = states(samples=16, layers=6)
    brute = np.array([layer_scores(sweep(np.delete(hidden, m, axis=1)))[key].values for m in range(16)])
    expected = np.sqrt(15 / 16 * ((brute - brute.mean(0)) ** 2).sum(0))
    tables = sweep(hidden)
    np.testing.assert_allclose(values_without_each(tables, key), brute, atol=1e-6)
    score = layer_scores(tables)[key]
    np.testing.assert_allclose(score.stderr, expected, rtol=1e-4)
    np.testing.assert_array_equal(np.isnan(score.stderr), ~score.valid)


def test_stderr_is_the_spread_over_fresh_samples():
    drawn = [layer_scores(sweep(states(samples=60, seed=seed)))["step_debiased"] for seed in range(60)]
    spread = np.std([score.values[1:] for score in drawn], axis=0, ddof=1)
    estimated = np.mean([score.stderr[1:] for score in drawn], axis=0)
    assert 0.8 < np.mean(estimated / spread) < 1.3


def test_four_samples_have_no_debiased_stderr():
    scores = layer_scores(sweep(states(samples=4)))
    assert scores["delta_debiased"].stderr is None and scores["delta"].stderr is not None


def test_unknown_score():
    with pytest.raises(UserError, match=r"did you mean 'step_debiased'\?"):
        values_without_each(sweep(states()), "step_debias")


def test_window_that_does_not_fit():
    with pytest.raises(UserError, match="window=11: expected an odd number from 3 to the 10 layers"):
        layer_scores(sweep(states()), window=11)


def test_planted_transition():
    """step names the block of the jump; delta, whose window looks both ways, cannot tell it from the block before."""
    draws, by_step, by_delta, off_by_one = 200, 0, 0, 0
    for seed in range(draws):
        planted = 4 + seed % 9
        tables = sweep(states(samples=60, layers=16, planted=planted, seed=seed, width=64))
        matrix = from_tables(tables, "debiased")
        by_step += int(np.nanargmin(step(matrix)[0])) == planted
        lowest = int(np.nanargmin(delta(matrix)[0]))
        by_delta += lowest == planted
        off_by_one += lowest == planted - 1
    assert by_step >= 0.99 * draws
    assert by_delta + off_by_one >= 0.99 * draws
    assert 0.3 < off_by_one / draws < 0.7
