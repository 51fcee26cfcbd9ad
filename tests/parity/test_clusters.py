"""k-means and normalised mutual information against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcrit.criteria.cluster_nmi import lloyd, nmi

cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")


@pytest.mark.parametrize("groups", [2, 10, 50])
def test_nmi_is_that_of_sklearn(groups):
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(groups)
    first = rng.integers(0, groups, 1000)
    for second in (
        first,
        rng.integers(0, groups, 1000),
        np.where(rng.random(1000) < 0.5, first, 0),
        np.zeros(1000, int),
    ):
        assert abs(nmi(first, second) - normalized_mutual_info_score(first, second)) < 1e-12


@pytest.mark.parametrize("repeats", [1, 10])
def test_lloyd_from_a_given_start_gives_the_labels_of_sklearn(repeats):
    """With repeats, rows are equal in tens, and start with three centres that are one: two are left empty."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((400 // repeats, 8)), repeats, axis=0).astype(np.float32)
    centres = rows[rng.choice(len(rows), 6, replace=False)]
    if repeats > 1:
        centres[:3] = centres[0]
    theirs = cluster.KMeans(6, init=centres, n_init=1, max_iter=50, tol=0, algorithm="lloyd").fit(rows)
    np.testing.assert_array_equal(np.asarray(lloyd(rows, centres)), theirs.labels_)
