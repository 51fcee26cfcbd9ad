import itertools

import numpy as np
import oracles
import pytest
from oracles import tables_of

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import cka, cka_without_each, gram_tables, null_mean, participation_ratio, sweep

PRODUCTS = {"biased": oracles.biased_product, "debiased": oracles.song}


def without(gram, sample):
    return np.delete(np.delete(gram, sample, 0), sample, 1)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("bias", ["biased", "debiased"])
def test_jackknife_is_brute_force_deletion(bias, kernel):
    """In float64, and with the device's float32 tables; the RBF bandwidth is that of all samples."""
    hidden = oracles.chain(4, 15, 25)
    raw = [oracles.gram(x) if kernel == "linear" else oracles.rbf_gram(x) for x in hidden]
    expected = np.array([oracles.ratio(PRODUCTS[bias], [without(g, m) for g in raw]) for m in range(15)])
    h = np.eye(15) - 1 / 15
    exact = cka_without_each(tables_of([h @ g @ h for g in raw]), bias)
    np.testing.assert_allclose(exact, expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(cka_without_each(sweep(hidden, kernel=kernel), bias), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", ["biased", "debiased"])
def test_linear_jackknife_is_the_sweep_without_the_sample(bias):
    hidden = oracles.with_outliers(oracles.chain(3, 40, 200), 500, 5)
    expected = [oracles.oracle(np.delete(hidden, m, axis=1), bias) for m in range(40)]
    np.testing.assert_allclose(cka_without_each(sweep(hidden), bias), expected, atol=1e-6, rtol=0)


def test_jackknife_across_models():
    left, right = oracles.chain(2, 12, 9), oracles.chain(3, 12, 14, seed=3)
    tables = sweep(left, other=right)
    deleted = cka_without_each(tables, "debiased")
    assert deleted.shape == (12, 2, 3)
    expected = cka(np.delete(left, 5, 1), bias="debiased", other=np.delete(right, 5, 1))
    np.testing.assert_allclose(deleted[5], expected, atol=1e-6)


def test_debiased_jackknife_needs_five_samples():
    with pytest.raises(UserError, match="at least 5 samples"):
        cka_without_each(sweep(oracles.chain(3, 4, 9)), "debiased")


def test_null_mean_is_the_mean_over_permutations():
    hidden = oracles.chain(2, 8, 6)
    rng = np.random.default_rng(0)
    values = [cka(hidden[:1], other=hidden[1:, rng.permutation(8)])[0, 0] for _ in range(300)]
    expected = null_mean(sweep(hidden))[0, 1]
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(300)


def test_null_mean_where_all_permutations_are_few():
    """Exact at N=4 over all 24 orders."""
    k, g = (oracles.gram(x) for x in oracles.chain(2, 4, 5))
    values = [np.sum(k * g[np.ix_(p, p)]) for p in map(list, itertools.permutations(range(4)))]
    expected = np.mean(values) / np.linalg.norm(k) / np.linalg.norm(g)
    np.testing.assert_allclose(null_mean(tables_of([k, g]))[0, 1], expected, rtol=1e-12)


def test_participation_ratio():
    hidden = oracles.chain(3, 30, 40, power=1.0)
    values = [np.linalg.eigvalsh(oracles.gram(x)) for x in hidden]
    expected = [v.sum() ** 2 / (v**2).sum() for v in values]
    np.testing.assert_allclose(participation_ratio(gram_tables([oracles.gram(x) for x in hidden])), expected, rtol=1e-5)


def test_resampling_with_replacement_undoes_the_debiasing():
    """Why the library has no ordinary bootstrap: on unrelated layers it returns the biased value, not about 0."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 80, 400)).astype(np.float32)
    full = [oracles.gram(x) for x in hidden]
    drawn = []
    for _ in range(40):
        rows = rng.integers(0, 80, 80)
        drawn.append(oracles.ratio(oracles.song, [g[np.ix_(rows, rows)] for g in full])[0, 1])
    assert abs(cka(hidden, bias="debiased")[0, 1]) < 0.05
    assert np.mean(drawn) == pytest.approx(cka(hidden)[0, 1], abs=0.03)
    assert np.mean(drawn) > 0.75
