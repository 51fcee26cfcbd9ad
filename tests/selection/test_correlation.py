"""Correlation of two scores: against scipy and written-out permutations, and honest where layers are alike."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr

from jaxcrit.core.deletions import Deletions, read_deletions, write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.selection import correlate, overlap_matrix, spearman_matrix
from jaxcrit.selection.correlation import (
    block_permutation_p,
    circle,
    circular_shift_p,
    jackknife_interval,
    meaning,
    naive_p,
    partial_given_depth,
    smallest_significant,
    spearman,
    tied,
)


def scores(values, direction="low", name="delta", **meta):
    values = np.array(values, float)
    return LayerScores(name, values, np.isfinite(values), direction, None, meta)


def averaged(rng, layers, window=5):
    """Noise averaged over a window, as δ and a substitution's loss are."""
    return np.convolve(rng.standard_normal(layers + window - 1), np.ones(window) / window, "valid")


vectors = hnp.arrays(float, st.integers(4, 12), elements=st.integers(-4, 4).map(float))


@given(vectors, st.randoms(use_true_random=False))
def test_against_scipy(x, random):
    y = np.array([random.randint(-3, 3) for _ in x], float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(spearman(x, y)) and np.isnan(circular_shift_p(x, y))
        return
    found = correlate(scores(x), scores(y))
    expected = spearmanr(x, y)
    np.testing.assert_allclose(found.rho, expected.statistic, atol=1e-12)
    np.testing.assert_allclose(found.p_naive, expected.pvalue, atol=1e-9)
    np.testing.assert_allclose(found.tau, kendalltau(x, y).statistic, atol=1e-12)
    shifted = [abs(spearmanr(x, np.roll(y, k)).statistic) for k in range(len(x))]
    assert found.p_shift == np.mean(np.array(shifted) >= abs(expected.statistic) - 1e-9)
    assert found.p_shift >= 1 / len(x)


def test_partial_is_that_of_the_residual_ranks():
    rng = np.random.default_rng(0)
    x, y, depth = rng.standard_normal(20), rng.standard_normal(20), np.arange(20)
    x, y = x + 0.2 * depth, y - 0.2 * depth

    def left(values):
        ranks = rankdata(values)
        return ranks - np.polyval(np.polyfit(depth, ranks, 1), depth)

    xy, xd, yd = (spearmanr(a, b).statistic for a, b in ((x, y), (x, depth), (y, depth)))
    rho, p = partial_given_depth(x, y)
    np.testing.assert_allclose(rho, pearsonr(left(x), left(y)).statistic, atol=1e-12)
    np.testing.assert_allclose(rho, (xy - xd * yd) / np.sqrt((1 - xd**2) * (1 - yd**2)), atol=1e-12)
    shifted = [abs(pearsonr(left(x), np.roll(left(y), k)).statistic) for k in range(20)]
    assert p == np.mean(np.array(shifted) >= abs(rho) - 1e-9)
    assert np.isnan(partial_given_depth(depth, y)).all()  # nothing is left of a score that is the depth itself


def test_depth_alone_makes_a_correlation_that_partial_takes_away():
    rng = np.random.default_rng(1)
    depth = np.arange(32)
    found = correlate(scores(depth + rng.normal(0, 3, 32)), scores(-depth + rng.normal(0, 3, 32)))
    assert found.rho < -0.8 and found.p_naive < 1e-6
    assert abs(found.partial) < 0.35 and found.p_partial > 0.05
    assert found.depth[0] > 0.8 > -0.8 > found.depth[1]


def test_blocks_of_one_layer_are_plain_permutations():
    x, y = np.array([1.0, 4, 2, 5, 3, 6, 7]), np.array([2.0, 1, 5, 3, 4, 7, 6])
    everything = [abs(spearmanr(x, p).statistic) for p in itertools.permutations(y)]
    exact = np.mean(np.array(everything) >= abs(spearman(x, y)) - 1e-9)
    assert block_permutation_p(x, y, 1) == pytest.approx(exact, abs=0.015)
    assert block_permutation_p(x, y, 7) == pytest.approx(circular_shift_p(x, y), abs=0.03)  # one block only turns


def test_shift_p_is_uniform_where_the_naive_p_is_not():
    """As benchmarks/correlation_null.py, for 28 layers: unrelated scores, each averaged over windows of 5."""
    rng = np.random.default_rng(0)
    pairs = [(averaged(rng, 28), averaged(rng, 28)) for _ in range(1000)]
    naive, shift, block = (
        np.array([p(x, y) for x, y in pairs])
        for p in (naive_p, circular_shift_p, lambda x, y: block_permutation_p(x, y, 10, draws=199))
    )
    assert np.mean(naive <= 0.05) > 0.2
    for hits in (1, 2, 3, 7, 14, 21):  # p takes multiples of 1/28 only
        level = hits / 28
        assert abs(np.mean(shift <= level + 1e-9) - level) < 3.3 * np.sqrt(level * (1 - level) / 1000), hits
    assert np.mean(block <= 0.05) < 0.08


def test_interval_covers_as_often_as_it_says():
    """rho of the population's curves, from samples whose mean curve is what is measured."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 20))
    other = other + one
    truth, hits, widths = spearman(one, other), 0, []
    for draw in range(60):
        samples = one + rng.standard_normal((200, 20)) * 2
        left = (samples.sum(axis=0) - samples) / 199
        low, high = jackknife_interval(
            samples.mean(axis=0), other, Deletions(left, range(200)), None, draws=500, seed=draw
        )
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits >= 51 and 0.01 < np.mean(widths) < 0.4


def test_interval_knows_shared_samples():
    """The same samples in both scores: their noise moves both alike, and the correlation hardly."""
    rng = np.random.default_rng(0)
    samples = np.linspace(0, 1, 20) + rng.standard_normal((100, 20)) * 3
    left, mean = (samples.sum(axis=0) - samples) / 99, samples.mean(axis=0)
    ids = [str(i) for i in range(100)]
    assert jackknife_interval(mean, mean, Deletions(left, ids), Deletions(left, ids)) == pytest.approx((1, 1))
    low, _ = jackknife_interval(mean, mean, Deletions(left, ids), Deletions(left, [f"other {i}" for i in ids]))
    assert low < 0.9
    assert jackknife_interval(mean, mean, None, None) is None


def test_deletions_are_read_back(tmp_path):
    values = np.arange(6.0).reshape(3, 2)
    assert read_deletions(tmp_path, "delta") is None
    write_deletions(tmp_path, {"delta": values}, ["a", "b", "c"])
    assert read_deletions(tmp_path, "step") is None
    found = read_deletions(tmp_path, "delta")
    np.testing.assert_array_equal(found.values, values)
    assert found.sample_ids == ["a", "b", "c"]


def test_common_layers_and_their_window():
    nan = np.nan
    a, b = scores([nan, 3, 1, 2, 2, 5, 4], window=3), scores([1, 1, 4, 2, 3, 1, nan], "high", window=1)
    found = correlate(a, b)
    assert (found.num_layers, found.first, found.last, found.block) == (5, 1, 5, 6)
    np.testing.assert_allclose(found.rho, spearmanr([3, 1, 2, 2, 5], [1, 4, 2, 3, 1]).statistic)


def test_smallest_significant():
    """Textbook values of the two-sided 5 % level."""
    for layers, value in ((5, 0.878), (10, 0.632), (28, 0.374)):
        assert smallest_significant(layers) == pytest.approx(value, abs=5e-4)


def test_matrix_turns_high_scores_round_and_takes_what_each_pair_has():
    nan = np.nan
    a, b = scores([nan, 3, 1, 2, 2, 5]), scores([1, 1, 4, 2, 3, nan], "high")
    found = spearman_matrix([a, b, a])
    expected = spearmanr([3, 1, 2, 2], [-1, -4, -2, -3]).statistic
    np.testing.assert_allclose(found, [[1, expected, 1], [expected, 1, expected], [1, expected, 1]])
    assert spearman_matrix([a]).shape == (1, 1)
    for too_little in ([1, 1, 1], [1, 2, nan]):
        assert np.isnan(spearman_matrix([scores([1, 2, 3]), scores(too_little)])[0, 1])


def test_refuses():
    nan = np.nan
    for given_scores, message in (
        ([], "got none"),
        ([scores([1, 2, 3]), scores([1, 2])], r"got \[2, 3\] layers"),
    ):
        with pytest.raises(UserError, match=message):
            spearman_matrix(given_scores)
    for a, b, message in (
        ([1, 2, 3], [1, 2], "one model, got delta of 3 layers and delta of 2"),
        ([1, 2, 3, nan, nan], [nan, nan, 1, 2, 3], r"got 1 \(delta: 0-2 and delta: 2-4\)"),
        ([1, 2, 3], [4, 4, 4], "same value 4 in all 3 layers"),
    ):
        with pytest.raises(UserError, match=message):
            correlate(scores(a), scores(b))
    with pytest.raises(UserError, match="at least 1 layer"):
        block_permutation_p(np.arange(3), np.arange(3), 0)


def test_overlap():
    sets = [LayerSet((1, 2, 3), 9, "delta", "critical:3"), LayerSet((3, 4), 9, "delta", "critical:2")]
    np.testing.assert_allclose(overlap_matrix(sets), [[1, 0.5], [0.5, 1]])


def test_a_circle_is_refused_by_what_chose_and_what_was_trained():
    rng = np.random.default_rng(0)
    trained = {"layers": [2, 3], "criteria": ["delta_debiased"], "rules": ["critical:2"]}
    loss = scores(averaged(rng, 20), "high", "substitution", trained=trained)
    for name in ("delta", "delta_debiased"):
        chose = scores(averaged(rng, 20), name=name)
        for pair in ((chose, loss), (loss, chose)):
            assert "layers 2-3 of the tuned model" in circle(*pair)
            with pytest.raises(UserError, match="chosen by delta_debiased"):
                correlate(*pair)
            assert np.isfinite(correlate(*pair, circular=True).rho)
    assert not circle(scores(averaged(rng, 20), name="step"), loss)
    assert not circle(scores(averaged(rng, 20)), scores(averaged(rng, 20), "high", "substitution"))


def test_what_sign_and_p_mean():
    x = averaged(np.random.default_rng(0), 40)
    noise = averaged(np.random.default_rng(1), 40)
    depth = np.arange(40.0)

    def told(a, b, directions=("low", "high")):
        both = scores(a, directions[0], "A"), scores(b, directions[1], "B")
        return meaning(correlate(*both), both, ("A", "B"))

    assert "by A (low values) tend to be critical by B (high values)" in told(x, -x) and "evidence of it" in told(x, -x)
    assert "tend to be uncritical by B (low values)" in told(x, -x, ("low", "low"))
    assert "of the circular shifts correlate as strongly: no evidence" in told(x, noise)
    assert "but given depth" in told(depth + 0.2 * x, depth + 0.2 * noise, ("high", "high"))


def test_ties_are_counted():
    assert tied(np.array([1.0, 1, 2, 3])) == 0.5
    assert tied(np.array([1.0, 2, 3])) == 0


def test_interval_leaves_out_layers_that_either_lacks():
    rng, parts = np.random.default_rng(0), []
    for gap in (2, 5):
        left = rng.standard_normal((30, 8)) * 0.01 + rng.permutation(8)
        left[:, gap] = np.nan
        parts.append((left.mean(axis=0), Deletions(left, np.arange(30).astype(str))))
    (x, without_x), (y, without_y) = parts
    kept = [0, 1, 3, 4, 6, 7]
    both = [Deletions(one.values[:, kept], one.sample_ids) for one in (without_x, without_y)]
    expected = jackknife_interval(x[kept], y[kept], *both)
    assert jackknife_interval(x, y, without_x, without_y) == pytest.approx(expected)
