"""Data that no similarity can be computed from is refused by name, not scored."""

import numpy as np
import pytest
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import DegenerateError, centred_grams, cka
from jaxcrit.similarity._survey import _repeats


def hidden_states():
    return oracles.chain(4, 20, 16)


def refused(hidden, match, **options):
    for call in (cka, centred_grams):
        with pytest.raises(DegenerateError, match=match) as caught:
            call(hidden, **options)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value, kernel):
    hidden = hidden_states()
    hidden[2, 3, 4] = value
    assert refused(hidden, "layers 2: activations are NaN", kernel=kernel).layers == (2,)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("level", [0.0, 3.0])
def test_constant_layer(level, noise):
    """Rows that differ by float noise only are equal."""
    hidden = hidden_states()
    hidden[1] = level * (1 + noise * hidden[1])
    hidden[3] = hidden[3, :1]
    assert refused(hidden, "layers 1, 3 are constant: all 20 samples").layers == (1, 3)


def test_identical_samples():
    hidden = np.repeat(hidden_states()[:, :1], 20, axis=1)
    refused(hidden, "all 20 samples are identical in every layer")


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_repeated_samples(noise):
    hidden = hidden_states()
    hidden[:, 11] = hidden[:, 4] * (1 + noise)
    hidden[:, 17] = hidden[:, 4]
    hidden[:, 13] = hidden[:, 2]
    error = refused(hidden, r"3 of 20 samples repeat an earlier one in every layer \(first: samples 4 and 11")
    assert error.samples == (4, 11)


def test_repeated_samples_on_request():
    hidden = hidden_states()
    hidden[:, 17] = hidden[:, 4]
    np.testing.assert_allclose(centred_grams(hidden, allow_repeats=True)[0], oracles.gram(hidden[0]), atol=1e-5)


def test_samples_equal_in_some_layers_only_are_scored():
    hidden = hidden_states()
    hidden[:3, 11] = hidden[:3, 4]
    assert np.isfinite(cka(hidden)).all()


def test_near_samples_are_not_duplicates():
    hidden = hidden_states()
    hidden[:, 11] = hidden[:, 4] + 1e-3 * hidden[:, 5]
    np.testing.assert_allclose(cka(hidden), oracles.oracle(hidden), atol=1e-7)


def test_too_few_samples():
    refused(hidden_states()[:, :3], "at least 4 samples, got 3")
    assert np.isfinite(cka(hidden_states()[:, :4], bias="debiased")).all()


def test_equally_far_apart_has_no_debiased_cka():
    hidden = np.stack([np.eye(20, 24, dtype=np.float32), oracles.chain(1, 20, 24)[0]])
    assert np.isfinite(cka(hidden)).all()
    with pytest.raises(DegenerateError, match="layers 0: all samples are equally far apart"):
        cka(hidden, bias="debiased")


def test_other_side_is_checked_too():
    constant = np.ones((2, 20, 8), np.float32)
    with pytest.raises(DegenerateError, match="identical"):
        cka(hidden_states(), other=constant)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda h: cka(h[0]), r"expected activations \[layers, samples, width\]"),
        (lambda h: cka(h.astype(np.int32)), "of floats, got int32"),
        (lambda h: cka(h, kernel="cosine"), "kernel='cosine': expected linear, rbf"),
        (lambda h: cka(h, bias="unbiased"), "bias='unbiased': expected"),
        (lambda h: cka(h, other=h[:, :10]), "same samples on both sides, got 20 and 10"),
    ],
)
def test_wrong_arguments(call, match):
    with pytest.raises(UserError, match=match):
        call(hidden_states())


def test_copies_that_others_stand_between_are_found():
    """Along the first direction six samples are one; those taken out bring the last two together."""
    numbers = np.array([0, 2, 1, 3, 4, 5])  # samples by their order there, as x z x' y' z' y
    x, z, y = np.eye(3, dtype=np.float32)
    hidden = np.zeros((1, 6, 3), np.float32)
    hidden[0, [0, 1, 2, 3, 4, 5]] = x, x, z, y, z, y
    projected = np.zeros((6, 4))
    projected[:, 0] = np.argsort(numbers) * 1e-9
    projected[:, 1:] = hidden[0]
    earlier, later = _repeats(hidden, projected, np.full(6, 1e-6))
    assert list(zip(earlier.tolist(), later.tolist(), strict=True)) == [(0, 1), (2, 4), (3, 5)]
