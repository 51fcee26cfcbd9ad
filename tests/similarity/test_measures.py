"""Every measure against its definition in float64 on the activations, and what none of them may see."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist, pdist
from scipy.stats import pearsonr, spearmanr
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import (
    MEASURES,
    DegenerateError,
    centred_grams,
    cka,
    decompose,
    knn,
    measure,
    parse_measures,
    procrustes,
    rsa,
    svcca,
    unit_rows,
)
from jaxcrit.similarity._measures import _leading

EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)


def centred(x):
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


def by_procrustes(x, y):
    x, y = (centred(z) / np.linalg.norm(centred(z)) for z in (x, y))
    rotation, _ = orthogonal_procrustes(y, x)
    return 1 - np.linalg.norm(x - y @ rotation) ** 2 / 2


def by_neighbours(x, y, neighbours=10):
    shared = 0
    near = []
    for z in (x, y):
        distances = cdist(z.astype(np.float64), z.astype(np.float64))
        np.fill_diagonal(distances, np.inf)
        near.append([set(np.argsort(row)[:neighbours]) for row in distances])
    for one, other in zip(*near, strict=True):
        shared += len(one & other)
    return shared / (neighbours * len(x))


def by_svcca(x, y, variance=0.99):
    kept = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(centred(z), full_matrices=False)
        kept.append(u[:, : int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), variance)) + 1])
    return np.linalg.svd(kept[0].T @ kept[1], compute_uv=False).mean()


def by_cca(x, y):
    u, v = (np.linalg.svd(centred(z), full_matrices=False)[0][:, :10] for z in (x, y))
    return np.linalg.svd(u.T @ v, compute_uv=False).mean()


DEFINITIONS = {
    "procrustes": by_procrustes,
    "rsa": lambda x, y: pearsonr(pdist(x, "sqeuclidean"), pdist(y, "sqeuclidean")).statistic,
    "rsa_spearman": lambda x, y: spearmanr(pdist(x), pdist(y)).statistic,
    "knn": by_neighbours,
    "cca": by_cca,
    "svcca": by_svcca,
}


@pytest.mark.parametrize("width", [20, 100])
def test_definitions(width):
    """One layer's width is below N, the other's above."""
    assert MEASURES.keys() == DEFINITIONS.keys()
    hidden = oracles.chain(3, 50, width, power=0.5)
    hidden[2] = hidden[2, :, ::-1]
    found = measure(centred_grams(hidden), MEASURES)
    for name, definition in DEFINITIONS.items():
        expected = np.array([[definition(x, y) for y in hidden] for x in hidden.astype(np.float64)])
        np.testing.assert_allclose(found[name], expected, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(found[name].diagonal(), 1, atol=1e-12)


def test_two_models():
    left, right = oracles.chain(2, 40, 30, power=0.5), oracles.chain(3, 40, 60, power=0.5, seed=1)
    right[:, :, :30] += left[1]
    both = np.concatenate([np.pad(left, ((0, 0), (0, 0), (0, 30))), right])
    sides, joined = (centred_grams(left), centred_grams(right)), centred_grams(both)
    spectra, together = (decompose(sides[0]), decompose(sides[1])), decompose(joined)
    for found, expected in (
        (rsa(*sides), rsa(joined)),
        (knn(*sides), knn(joined)),
        (procrustes(*spectra), procrustes(together)),
        (svcca(*spectra), svcca(together)),
    ):
        np.testing.assert_allclose(found, expected[:2, 2:], atol=1e-6)


@EXAMPLES
@given(st.integers(0, 2**31 - 1))
def test_rotation_scale_and_order_of_samples(seed):
    rng = np.random.default_rng(seed)
    hidden = oracles.chain(3, 30, 20, power=0.5, seed=seed)
    turned = np.stack([x @ np.linalg.qr(rng.standard_normal((20, 20)))[0] for x in hidden.astype(np.float64)])
    turned = (turned * 10.0 ** rng.uniform(-5, 5, (3, 1, 1))).astype(np.float32)[:, rng.permutation(30)]
    before, after = (measure(centred_grams(h), MEASURES) for h in (hidden, turned))
    for name in before:
        # Components turn by the activations' rounding over their gap; a neighbour at a near-tie may swap,
        # and so may two of 435 distances: one swap moves Spearman's rho by up to 12 * 434 / (435 * (435**2 - 1)).
        atol = {"cca": 1e-4, "svcca": 1e-4, "knn": 1 / 300 + 1e-9, "rsa_spearman": 1.3e-4}.get(name, 2e-6)
        np.testing.assert_allclose(after[name], before[name], atol=atol, err_msg=name)
        np.testing.assert_allclose(before[name], before[name].T, atol=1e-9, err_msg=name)


def test_rows_of_unit_length():
    """CKA of normalised activations; one sample far out does not count more than the others."""
    hidden = oracles.chain(3, 40, 30)
    rows = hidden / np.linalg.norm(hidden.astype(np.float64), axis=2, keepdims=True)
    far = hidden.copy()
    far[:, 3] *= 1e5
    assert cka(far).min() > 0.999
    for scaled in (hidden, far, 1e-30 * hidden, 1e30 * hidden):
        for bias in ("biased", "debiased"):
            np.testing.assert_allclose(cka(unit_rows(scaled), bias=bias), oracles.oracle(rows, bias), atol=1e-6)


def test_bad_input():
    grams = centred_grams(oracles.chain(2, 11, 30))
    with pytest.raises(UserError, match="10 neighbours of 11 samples: expected 1 to 9"):
        knn(grams)
    with pytest.raises(UserError, match="all 10 scores, got 3"):
        procrustes(decompose(grams, 3))
    with pytest.raises(UserError, match="all 10 scores, got 3"):
        svcca(decompose(grams, 3))
    with pytest.raises(UserError, match="expected a share"):
        svcca(decompose(grams), variance=1.5)
    for call in (
        rsa,
        lambda a, b: knn(a, b, neighbours=3),
        lambda a, b: procrustes(decompose(a), decompose(b)),
        lambda a, b: svcca(decompose(a), decompose(b)),
    ):
        with pytest.raises(UserError, match="the same samples"):
            call(grams, grams[:, 1:, 1:])
    simplex = np.eye(11)[None] - 1 / 11
    with pytest.raises(DegenerateError, match="layers 0: all samples are equally far apart"):
        rsa(np.round(simplex * 11))
    zeros = oracles.chain(2, 11, 30)
    zeros[1, 4] = 0
    with pytest.raises(DegenerateError, match="layer 1: 4 are samples of zeros") as caught:
        unit_rows(zeros)
    assert (caught.value.layers, caught.value.samples) == ((1,), (4,))
    with pytest.raises(UserError, match="did you mean 'procrustes'"):
        parse_measures("rsa,procrusts")
    with pytest.raises(UserError, match="each name once"):
        parse_measures("rsa,rsa")
    assert parse_measures("") == () and parse_measures("rsa, knn") == ("rsa", "knn")


def test_svcca_takes_no_more_components_than_explain_the_share():
    """Of two of equal variance the first explains exactly half; and equal layers never exceed 1."""
    spectrum = decompose(centred_grams(np.random.default_rng(1).standard_normal((9, 40, 30), dtype=np.float32)))
    halves = dataclasses.replace(spectrum, singular_values=np.repeat([[1.0, 0]], [2, 37], axis=1).repeat(9, axis=0))
    for variance, count in ((0.4, 1), (0.5, 1), (0.6, 2)):
        assert {scores.shape[1] for scores in _leading(halves, variance)} == {count}
    found = svcca(spectrum)
    assert (found <= 1).all() and np.diagonal(found).min() > 1 - 1e-5
