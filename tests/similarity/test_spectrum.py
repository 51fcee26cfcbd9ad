"""Spectra and CCA against float64 decompositions of the activations themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import (
    canonical_correlations,
    cca,
    cca_without_each,
    centred_grams,
    decompose,
    directions,
    gram_tables,
    participation_ratio,
)

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)


def centred(x):
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


def oracle_cca(hidden, k):
    """Textbook CCA of the first k principal component scores: whiten, singular values of the cross covariance; mean."""

    def white(x):
        u, s, _ = np.linalg.svd(centred(x), full_matrices=False)
        scores = u[:, :k] * s[:k]
        values, vectors = np.linalg.eigh(scores.T @ scores)
        return scores @ vectors @ np.diag(values**-0.5) @ vectors.T

    sides = np.stack([white(x) for x in hidden])
    return np.linalg.svd(np.einsum("xnk,ynl->xykl", sides, sides), compute_uv=False).mean(axis=2)


@pytest.mark.parametrize("outlier", [None, (100, 3), (2000, 10)], ids=str)
@pytest.mark.parametrize("power", [0.3, 1.0])
def test_cca_is_the_float64_oracle(power, outlier):
    hidden = oracles.chain(4, 120, 400, power=power)
    if outlier:
        hidden = oracles.with_outliers(hidden, *outlier)
    spectrum = decompose(centred_grams(hidden), 10)
    for k in (1, 3, 10):
        found = canonical_correlations(spectrum, k)
        # A float32 Gram is rounded relative to its largest eigenvalue, which outliers raise above the tenth: up to 1e3
        # times (1.6e-6 off) and 1e4 times (1.2e-5 off at most, over the instruction sets tried).
        atol = {None: 1e-6, (100, 3): 2e-6, (2000, 10): 2e-5}[outlier]
        np.testing.assert_allclose(found.mean(2), oracle_cca(hidden, k), atol=atol, rtol=0)
        np.testing.assert_array_equal(cca(spectrum, k).diagonal(), 1)
    first = spectrum.scores[:, :, 0]
    np.testing.assert_allclose(cca(spectrum, 1), np.abs(first @ first.T), atol=1e-12)
    np.testing.assert_allclose(cca(spectrum, 3, decompose(centred_grams(hidden[1:]), 3)), cca(spectrum, 3)[:, 1:])


@pytest.mark.parametrize(("samples", "width"), [(60, 200), (60, 20)])
def test_decomposition(samples, width):
    """Singular values, what is made of them, and the directions they come with."""
    hidden = oracles.chain(3, samples, width, power=0.5)
    spectrum = decompose(centred_grams(hidden))
    rank = min(samples - 1, width)
    assert spectrum.scores.shape == (3, samples, samples - 1) and spectrum.rank.tolist() == [rank] * 3
    for layer, x in enumerate(hidden):
        u, s, v = np.linalg.svd(centred(x), full_matrices=False)
        s = s[:rank]
        np.testing.assert_allclose(spectrum.singular_values[layer, :rank], s, rtol=1e-5)
        assert (spectrum.singular_values[layer, rank:] == 0).all()
        signs = np.sign((spectrum.scores[layer, :, :5] * u[:, :5]).sum(0))
        np.testing.assert_allclose(spectrum.scores[layer, :, :5] * signs, u[:, :5], atol=1e-4)
        np.testing.assert_allclose(spectrum.explained_variance[layer, :rank], s**2 / np.sum(s**2), rtol=1e-4)
        p = s / s.sum()
        np.testing.assert_allclose(spectrum.effective_rank[layer], np.exp(-np.sum(p * np.log(p))), rtol=1e-5)
        found = directions(x, spectrum.scores[layer, :, :5], spectrum.singular_values[layer, :5])
        np.testing.assert_allclose(found * signs[:, None], v[:5], atol=1e-4)
        coordinates = spectrum.scores[layer, :, :5] * spectrum.singular_values[layer, :5]
        np.testing.assert_allclose(centred(x) @ found.T, coordinates, atol=1e-3)
        largest = np.abs(spectrum.scores[layer]).argmax(0)
        assert (np.take_along_axis(spectrum.scores[layer], largest[None], 0) > 0).all()
    np.testing.assert_allclose(
        spectrum.participation_ratio, participation_ratio(gram_tables(centred_grams(hidden))), rtol=1e-5
    )
    together = directions(hidden, spectrum.scores[:, :, :5], spectrum.singular_values[:, :5])
    np.testing.assert_allclose(together[-1], found, atol=1e-6)


@EXAMPLES
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, 10]))
def test_cca_sees_neither_rotation_nor_scale_nor_the_order_of_samples(seed, k):
    rng = np.random.default_rng(seed)
    hidden = oracles.chain(3, 24, 16, power=1.0, seed=seed)
    rotated = np.stack([(x @ np.linalg.qr(rng.standard_normal((16, 16)))[0]) for x in hidden.astype(np.float64)])
    before = decompose(centred_grams(hidden), k)
    after = decompose(centred_grams(rotated.astype(np.float32)[:, rng.permutation(24)]), k)
    scaled = decompose(centred_grams((rotated * 10.0 ** rng.uniform(-6, 6, (3, 1, 1))).astype(np.float32)), k)
    # Float32 activations are off by 6e-8; components turn by that over their gap.
    tolerance = 2e-6 / decompose(centred_grams(hidden)).gaps[:, k - 1].min()
    np.testing.assert_allclose(cca(after, k), cca(before, k), atol=tolerance)
    np.testing.assert_allclose(cca(scaled, k), cca(before, k), atol=tolerance)


def weighted_cca(x, y, k, weights):
    """Mean canonical correlation of the first k components where samples have weights."""
    weights = weights / weights.sum()

    def scores(z):
        z = np.asarray(z, np.float64)
        z = (z - weights @ z) * np.sqrt(weights)[:, None]
        return np.linalg.svd(z, full_matrices=False)[0][:, :k]

    return np.linalg.svd(scores(x).T @ scores(y), compute_uv=False).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_first_order_deletion_is_the_derivative(k):
    """Against central differences of CCA in each sample's weight."""
    hidden = oracles.chain(3, 30, 12, power=1.0, rho=0.8)
    spectrum = decompose(centred_grams(hidden))
    left = cca_without_each(spectrum, k)
    np.testing.assert_allclose(left.diagonal(axis1=1, axis2=2), 1)
    np.testing.assert_allclose(left, left.swapaxes(1, 2), atol=1e-9)
    step = 1e-4
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for sample in (0, 7, 29):
            more, less = np.ones(30), np.ones(30)
            more[sample], less[sample] = 1 + step, 1 - step
            slope = weighted_cca(hidden[i], hidden[j], k, more) - weighted_cca(hidden[i], hidden[j], k, less)
            influence = slope / (2 * step) * 30  # of a contamination: d weight / N
            expected = cca(spectrum, k)[i, j] - influence / 29
            np.testing.assert_allclose(left[sample, i, j], expected, atol=1e-5)


def test_gaps():
    """Two equal singular values are one plane, not two components."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(np.c_[np.ones(40), rng.standard_normal((40, 4))])[0][:, 1:]
    gram = (u * np.array([16.0, 4.0, 4.0, 1.0])) @ u.T
    spectrum = decompose(gram[None])
    np.testing.assert_allclose(spectrum.gaps[0, :4], [0.75, 0, 0.75, 1], atol=1e-9)
    assert [spectrum.separation(i)[0] > spectrum.sampling_gap for i in range(4)] == [True, False, False, True]
    assert spectrum.sampling_gap == pytest.approx((2 / 40) ** 0.5)
    left = cca_without_each(decompose(np.stack([gram, gram])), 2)
    assert left.shape == (40, 2, 2)  # no error bar may come of it, but no warning either


def test_bad_input():
    hidden = oracles.chain(2, 20, 5)
    grams = np.array(centred_grams(hidden))
    with pytest.raises(UserError, match="25 components of 20 samples: expected 1 to 19"):
        decompose(grams, 25)
    with pytest.raises(UserError, match="layers 0, 1: expected at most 5 components"):
        cca(decompose(grams), 6)
    with pytest.raises(UserError, match="30 components of 20 samples"):
        cca(decompose(grams), 30)
    with pytest.raises(UserError, match="at most the 2 components that were kept"):
        cca(decompose(grams, 2), 3)
    with pytest.raises(UserError, match="at least 1"):
        cca(decompose(grams, 2), 0)
    with pytest.raises(UserError, match="the same samples"):
        cca(decompose(grams), 2, decompose(grams[:, 1:, 1:]))
    with pytest.raises(UserError, match="expected Grams"):
        decompose(hidden)
    with pytest.raises(UserError, match="all 19 scores, got 4"):
        cca_without_each(decompose(grams, 4), 3)
    grams[1, 3, 3] = np.nan
    with pytest.raises(UserError, match="layers 1: the Grams hold NaN"):
        decompose(grams)


def test_every_layer_is_told_once():
    told = []
    decompose(centred_grams(np.random.default_rng(0).standard_normal((5, 12, 8))), progress=told.append)
    assert told == [1] * 5
