"""Knees of the entropy: where they were planted, and not named where prompts do not agree."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcrit.criteria.lens_entropy import KNEES, knees, lens_entropy

LAYERS, PROMPTS = 16, 60
NONE = dict.fromkeys(KNEES)


def curves(*drops, noise=0.3, seed=0):
    """Entropies ``[N, L]`` that fall by so much at some layers, each prompt with noise of its own."""
    found = np.full((PROMPTS, LAYERS), 6.0) + noise * np.random.default_rng(seed).standard_normal((PROMPTS, LAYERS))
    for layer, fall in drops:
        found[:, layer:] -= fall
    return found


def test_two_planted_drops_are_the_knees_in_their_order():
    for drops in ([(3, 1.0), (9, 3.0)], [(3, 3.0), (9, 1.0)]):
        found = knees(curves(*drops))
        assert found["knees"] == {"first": 3, "second": 9}
        assert min(found["agreement"].values()) > 0.95
    measured = lens_entropy(curves((3, 1.0), (9, 3.0)))
    assert measured.meta == knees(curves((3, 1.0), (9, 3.0)))
    np.testing.assert_allclose(measured.values, curves((3, 1.0), (9, 3.0)).mean(axis=0))


def test_a_drop_over_two_layers_is_one_knee():
    """An eighth of the layers apart: of layers 3 and 4 the larger counts, and layer 9 is the other, though smaller."""
    assert knees(curves((3, 2.0), (4, 2.5), (9, 1.5)))["knees"] == {"first": 4, "second": 9}
    assert knees(curves((3, 2.0), (5, 2.5), (9, 1.5)))["knees"] == {"first": 3, "second": 5}


def test_of_pure_noise_hardly_a_knee_is_named():
    found = [knees(curves(seed=seed)) for seed in range(40)]
    assert np.mean([one["knees"]["first"] is not None for one in found]) <= 0.05
    # Where half the resamples were enough, chance would name many.
    assert np.mean([one["agreement"]["first"] > 0.5 for one in found]) > 0.1


def test_a_knee_that_prompts_disagree_on_is_not_named():
    """Half of the prompts drop a second time at layer 8, the others at 13: which is larger is a coin."""
    split = curves((2, 4.0))
    split[::2, 8:] -= 1.0
    split[1::2, 13:] -= 1.0
    assert knees(split)["knees"] == {"first": 2, "second": None}


@pytest.mark.parametrize(
    "entropies",
    [
        curves((3, 1.0), (9, 3.0))[:9],
        np.arange(LAYERS)[None] + curves(noise=0.01),
        curves((3, 1.0), noise=0)[:, ::-1],
        curves((3, 1.0), (9, 3.0))[:, :1],
    ],
    ids=["too few prompts", "it rises", "no drop", "one layer"],
)
def test_no_knee_at_all(entropies):
    assert knees(entropies) == {"knees": NONE, "agreement": NONE}
