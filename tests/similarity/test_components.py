"""Components as directions: against an SVD, and what is said of those that samples do not determine."""

import numpy as np
import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import principal_components


def activations(values, samples=40, width=12, layers=2, seed=0):
    """Centred activations ``[L, N, D]`` of these singular values, plus a mean."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        noise = rng.normal(size=(samples, len(values)))
        scores, _ = np.linalg.qr(noise - noise.mean(axis=0))
        basis, _ = np.linalg.qr(rng.normal(size=(width, len(values))))
        found.append(scores * values @ basis.T + rng.normal(size=width))
    return np.array(found, np.float32)


def test_parts_are_those_of_the_svd():
    hidden = activations([9.0, 5.0, 2.0, 1.0])
    found = principal_components(hidden, 3)
    for layer, states in enumerate(hidden.astype(np.float64)):
        u, s, v = np.linalg.svd(states - states.mean(axis=0), full_matrices=False)
        expected = (u[:, [0, 2]] * s[[0, 2]]) @ v[[0, 2]]
        np.testing.assert_allclose(found.part([0, 2])[layer], expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(found.mean, hidden.mean(axis=1))


@pytest.mark.parametrize(
    ("chosen", "doubtful"), [((0,), []), ((1,), [1]), ((1, 2), []), ((0, 1), [1]), ((0, 1, 2), []), ((2,), [1])]
)
def test_only_gaps_at_the_edges_of_a_set_count(chosen, doubtful):
    found = principal_components(activations([9.0, 5.0, 5.0, 1.0], layers=1), 4)
    warnings = found.unidentified(chosen, [0])
    assert [
        f"components {edge} and {edge + 1} are not told apart" in text
        for edge, text in zip(doubtful, warnings, strict=True)
    ] == [True] * len(doubtful)
    assert all("gap of their variances 0.000" in text for text in warnings)


def test_component_beyond_the_samples_or_the_rank():
    with pytest.raises(UserError, match=r"component 6 of 7 samples, width \d+: expected at most component 5"):
        principal_components(activations([3.0, 2.0, 1.0], samples=7), 7)
    with pytest.raises(UserError, match="component 40 of 60 samples, width 40: expected at most component 39"):
        principal_components(np.ones((2, 60, 40), np.float32), 41)
    with pytest.raises(UserError, match=r"layers 0, 1: component 3 is beyond the rank, 3 in layer 0"):
        principal_components(activations([3.0, 2.0, 1.0]), 4)
