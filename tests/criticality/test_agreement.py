"""Rank correlation and overlap between datasets."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.criticality import overlap_matrix, spearman_matrix


def scores(values, direction="low"):
    values = np.array(values, float)
    return LayerScores("delta", values, np.isfinite(values), direction)


def test_spearman_over_common_layers():
    a, b = scores([np.nan, 3, 1, 2, 2, 5]), scores([1, 1, 4, 2, 3, np.nan], "high")
    found = spearman_matrix([a, b, a])
    assert found.shape == (3, 3)
    expected = spearmanr([3, 1, 2, 2], [-1, -4, -2, -3]).statistic
    np.testing.assert_allclose(found, [[1, expected, 1], [expected, 1, expected], [1, expected, 1]])
    assert spearman_matrix([a]).shape == (1, 1)


def test_a_constant_curve_has_no_correlation():
    assert np.isnan(spearman_matrix([scores([1, 2, 3]), scores([1, 1, 1])])[0, 1])


def test_refuses():
    for given, message in (
        ([], "got none"),
        ([scores([1, 2, 3]), scores([1, 2])], r"got \[2, 3\] layers"),
        ([scores([1, 2, np.nan])], "3 layers that all scores are valid for, got 2"),
    ):
        with pytest.raises(UserError, match=message):
            spearman_matrix(given)


def test_overlap():
    sets = [LayerSet((1, 2, 3), 9, "delta", "critical:3"), LayerSet((3, 4), 9, "delta", "critical:2")]
    np.testing.assert_allclose(overlap_matrix(sets), [[1, 0.5], [0.5, 1]])
