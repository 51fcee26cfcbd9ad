"""Closed-form CCA against scikit-learn's iterative one, as the paper computes it."""

import os

import numpy as np
import pytest
from support import oracles

from jaxcrit.similarity import canonical_correlations, centred_grams, decompose

if os.environ.get("JAXCRIT_REQUIRE_PARITY") == "1":
    import sklearn  # noqa: F401
cross_decomposition = pytest.importorskip("sklearn.cross_decomposition")


@pytest.mark.parametrize("power", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_scikit_learns_cca(k, power):
    """The paper's steps: centre, SVD, scores of the first k, CCA(n_components=k), Pearson's r of each pair, mean."""
    hidden = oracles.chain(3, 150, 300, power=power, rho=0.8)
    found = canonical_correlations(decompose(centred_grams(hidden), k), k).mean(axis=2)
    scores = []
    for x in hidden.astype(np.float64):
        u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        scores.append(u[:, :k] * s[:k])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = cross_decomposition.CCA(n_components=k).fit_transform(scores[i], scores[j])
        expected = np.mean([np.corrcoef(a[:, c], b[:, c])[0, 1] for c in range(k)])
        assert abs(found[i, j] - expected) <= 1e-4, (found[i, j], expected)
        print(f"k={k} power={power}: {abs(found[i, j] - expected):.1e}")
