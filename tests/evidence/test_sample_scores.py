"""Both averages and their errors against leaving samples out one by one."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcrit.evidence.sample_scores import SampleLosses


@pytest.mark.parametrize("per_token", [False, True])
def test_scores_and_errors(per_token):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 11)
    losses, reference = rng.gamma(2, 1, (3, 11)), rng.gamma(2, 1, 11)
    samples = SampleLosses(np.array([1, 2, 4]), losses, reference, tokens, list("abcdefghijk"))
    score = samples.scores("x", 6, {"window": 3})["x_per_token" if per_token else "x"]

    def average(rows, keep):
        weights = tokens[keep] if per_token else np.ones(keep.sum())
        return (rows[..., keep] * weights).sum(axis=-1) / weights.sum()

    everyone, without = np.ones(11, bool), ~np.eye(11, dtype=bool)
    assert score.valid.tolist() == [False, True, True, False, True, False]
    np.testing.assert_allclose(score.values[[1, 2, 4]], average(losses, everyone))
    assert np.isnan(score.values[[0, 3, 5]]).all() and np.isnan(score.stderr[[0, 3, 5]]).all()
    left = np.array([average(losses - reference, keep) for keep in without])
    np.testing.assert_allclose(score.stderr[[1, 2, 4]], np.sqrt(10 / 11 * ((left - left.mean(0)) ** 2).sum(0)))
    deleted = samples.without_each(6, per_token=per_token)
    np.testing.assert_allclose(deleted[:, [1, 2, 4]], [average(losses, keep) for keep in without])
    np.testing.assert_array_equal(score.deletions.values, deleted)
    assert score.deletions.sample_ids == list("abcdefghijk")
    assert score.meta["unchanged"] == pytest.approx(average(reference, everyone)) and score.direction == "high"
    assert score.meta["window"] == 3


def test_error_of_a_mean_is_the_usual_one():
    rng = np.random.default_rng(1)
    losses, reference = rng.normal(size=(2, 20)), rng.normal(size=20)
    score = SampleLosses(np.arange(2), losses, reference, np.ones(20, int), range(20)).scores("x", 2, {})["x"]
    np.testing.assert_allclose(score.stderr, (losses - reference).std(axis=1, ddof=1) / np.sqrt(20))


def test_one_sample_has_no_error():
    one = SampleLosses(np.arange(2), np.ones((2, 1)), np.zeros(1), np.array([3]), ["a"])
    assert one.scores("x", 2, {})["x"].stderr is None
