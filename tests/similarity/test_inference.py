import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import tables_of

from jaxcrit.core.errors import UserError
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.similarity import (
    _grams,
    _inference,
    centred_grams,
    cka,
    cka_without_each,
    cka_without_units,
    gram_tables,
    null_mean,
    null_variance,
    participation_ratio,
    permutation_null,
    sweep,
)

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


@pytest.mark.parametrize("bias", ["biased", "debiased"])
def test_jackknife_within_reach(bias):
    tables = sweep(oracles.chain(6, 12, 9))
    band = np.abs(np.subtract.outer(range(6), range(6))) <= 2
    np.testing.assert_array_equal(
        cka_without_each(tables, bias, reach=2), np.where(band, cka_without_each(tables, bias), 0)
    )


def test_jackknife_across_models():
    left, right = oracles.chain(2, 12, 9), oracles.chain(3, 12, 14, seed=3)
    tables = sweep(left, other=right)
    deleted = cka_without_each(tables, "debiased")
    assert deleted.shape == (12, 2, 3)
    expected = cka(np.delete(left, 5, 1), bias="debiased", other=np.delete(right, 5, 1))
    np.testing.assert_allclose(deleted[5], expected, atol=1e-6)
    i, j = _inference._wanted(tables, None)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == sorted(
        [(layer, layer) for layer in range(5)] + [(a, b) for a in (0, 1) for b in (2, 3, 4)]
    ), "pairs of one model are not asked for, and not computed"


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


@pytest.mark.parametrize("samples", [4, 5, 6])
@pytest.mark.parametrize("heavy", [False, True])
def test_null_moments_are_those_of_all_permutations(samples, heavy):
    """In float64 over all N! orders, and with a sample far from the rest."""
    hidden = np.array(oracles.chain(2, samples, 5, power=0.7), np.float64)
    hidden[:, 0] *= 9 if heavy else 1
    k, g = (oracles.gram(x) for x in hidden)
    values = [np.sum(k * g[np.ix_(p, p)]) for p in map(list, itertools.permutations(range(samples)))]
    values = np.array(values) / np.linalg.norm(k) / np.linalg.norm(g)
    tables = tables_of([k, g])
    np.testing.assert_allclose(null_mean(tables)[0, 1], values.mean(), rtol=1e-12)
    np.testing.assert_allclose(null_variance(tables)[0, 1], values.var(), rtol=1e-10)
    null = permutation_null(tables)
    np.testing.assert_allclose(null.score[0, 1], (values[0] - values.mean()) / values.std(), rtol=1e-9)


def test_null_p_is_the_share_of_permutations():
    """Its own tail: few dimensions, where a normal distribution would be wrong; and two models."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((1, 40, 3)), rng.standard_normal((1, 40, 2))
    right[0, :, 0] += 0.45 * left[0, :, 0]
    null = permutation_null(sweep(left.astype(np.float32), other=right.astype(np.float32)))
    assert null.p.shape == (1, 1)
    k, g = oracles.gram(left[0]), oracles.gram(right[0])
    orders = [rng.permutation(40) for _ in range(20_000)]
    drawn = np.array([np.sum(k * g[np.ix_(order, order)]) for order in orders])
    share = np.mean(drawn >= np.sum(k * g))
    assert 0.002 < share < 0.2
    assert null.p[0, 0] == pytest.approx(share, rel=0.25)
    np.testing.assert_allclose(permutation_null(sweep(np.repeat(left, 2, 0).astype(np.float32))).p[0, 1], 0, atol=1e-9)


UNITS = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 6])


@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("bias", ["biased", "debiased"])
def test_units_are_deleted_together(bias, order):
    units = UNITS if order == "sorted" else np.random.default_rng(0).permutation(UNITS)
    hidden = oracles.with_outliers(oracles.chain(3, len(units), 25), 100, 3)
    built = centred_grams(hidden)
    deleted = cka_without_units(built, gram_tables(built), units)[bias]
    expected = [oracles.oracle(hidden[:, units != unit], bias) for unit in range(7)]
    np.testing.assert_allclose(deleted, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("bias", ["biased", "debiased"])
def test_units_of_one_sample_are_samples(bias):
    built = centred_grams(oracles.chain(3, 40, 25))
    tables = gram_tables(built)
    deleted = cka_without_units(built, tables, np.arange(40))[bias]
    np.testing.assert_allclose(deleted, cka_without_each(tables, bias), atol=1e-7, rtol=0)


def test_tokens_of_a_prompt_are_one_draw():
    """Each prompt five times over, nearly: the error over prompts is that of the prompts, over tokens far too small."""
    rng = np.random.default_rng(0)
    hidden = oracles.chain(2, 60, 30)
    tokens = (np.repeat(hidden, 5, axis=1) + 0.02 * rng.standard_normal((2, 300, 30))).astype(np.float32)

    def stderr(left):
        return np.sqrt((len(left) - 1) * left[:, 0, 1].var())

    built = centred_grams(tokens)
    tables = gram_tables(built)
    by_prompt = stderr(cka_without_units(built, tables, np.repeat(np.arange(60), 5))["biased"])
    once = stderr(cka_without_each(sweep(hidden), "biased"))
    assert by_prompt == pytest.approx(once, rel=0.05)
    assert stderr(cka_without_each(tables, "biased")) < 0.6 * by_prompt


def test_too_few_units():
    built = centred_grams(oracles.chain(2, 9, 5))
    for units in (np.repeat([0, 1], [4, 5]), np.repeat([0, 1, 2], [6, 2, 1])):
        with pytest.raises(UserError, match="at least 3 prompts, and 4 samples beside each"):
            cka_without_units(built, gram_tables(built), units)


@pytest.mark.parametrize("blocks", [True, False])
def test_tables_of_all_statistics_cost_little_more_than_the_sweep(blocks):
    """At N=300, L=32, D=4096; what is left for the host is elementwise, N L^2 a term."""
    hidden = jax.ShapeDtypeStruct((32, 300, 4096), jnp.float32)

    def bare(hidden):
        flat = _grams._grams(hidden, "linear", blocks)[0].reshape(32, -1)
        return jnp.matmul(flat, flat.T)

    everything = product_flops(lambda hidden: _grams._sweep((hidden,), "linear", blocks, None), hidden)
    assert 1 < everything / product_flops(bare, hidden) < 1.02


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
