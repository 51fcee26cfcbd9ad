"""What CKA must not see, and what it must."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles

from jaxcrit.similarity import cka, null_mean, sweep

SHAPE = (3, 24, 16)  # one shape, so one compile per kernel
KERNELS = st.sampled_from(["linear", "rbf"])
BIASES = st.sampled_from(["biased", "debiased"])
SEEDS = st.integers(0, 2**31 - 1)
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)


def states(seed):
    return oracles.chain(*SHAPE, seed=seed)


def orthogonal(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def same(hidden, changed, kernel, bias, atol=1e-6):
    np.testing.assert_allclose(
        cka(changed.astype(np.float32), kernel=kernel, bias=bias), cka(hidden, kernel=kernel, bias=bias), atol=atol
    )


@EXAMPLES
@given(SEEDS, KERNELS, BIASES)
def test_rotation(seed, kernel, bias):
    rng = np.random.default_rng(seed)
    hidden = states(seed)
    same(hidden, np.stack([x @ orthogonal(rng, 16) for x in hidden.astype(np.float64)]), kernel, bias)


@EXAMPLES
@given(SEEDS, KERNELS, BIASES, st.lists(st.floats(-6, 6), min_size=3, max_size=3))
def test_scale_of_each_layer(seed, kernel, bias, powers):
    hidden = states(seed)
    same(hidden, hidden * 10.0 ** np.array(powers)[:, None, None], kernel, bias)


@EXAMPLES
@given(SEEDS, KERNELS, BIASES, st.floats(0, 1e3))
def test_shift(seed, kernel, bias, size):
    """Up to the rounding of the shifted input itself; beside the oracle on that input there is no error to speak of."""
    hidden = states(seed)
    shifted = (hidden + size * np.random.default_rng(seed).standard_normal((3, 1, 16))).astype(np.float32)
    same(hidden, shifted, kernel, bias, atol=1e-6 + 4e-8 * size)
    product = {"biased": oracles.biased_product, "debiased": oracles.u_centred_product}[bias]
    gram = {"linear": oracles.gram, "rbf": oracles.rbf_gram}[kernel]
    expected = oracles.ratio(product, [gram(x) for x in shifted])
    np.testing.assert_allclose(cka(shifted, kernel=kernel, bias=bias), expected, atol=2e-7)


@EXAMPLES
@given(SEEDS, KERNELS, BIASES)
def test_order_of_samples(seed, kernel, bias):
    hidden = states(seed)
    same(hidden, hidden[:, np.random.default_rng(seed).permutation(24)], kernel, bias)


@EXAMPLES
@given(SEEDS, KERNELS, BIASES)
def test_columns_of_zeros(seed, kernel, bias):
    hidden = states(seed)
    same(hidden, np.pad(hidden, ((0, 0), (0, 0), (0, 8))), kernel, bias)


@EXAMPLES
@given(SEEDS, KERNELS, BIASES)
def test_symmetric_with_unit_diagonal(seed, kernel, bias):
    values = cka(states(seed), kernel=kernel, bias=bias)
    np.testing.assert_array_equal(values.diagonal(), 1)
    np.testing.assert_array_equal(values, values.T)
    if bias == "biased":
        assert values.min() >= 0 and values.max() <= 1 + 1e-7


@EXAMPLES
@given(SEEDS, KERNELS)
def test_biased_gram_of_layers_is_positive(seed, kernel):
    assert np.linalg.eigvalsh(cka(states(seed), kernel=kernel)).min() > -1e-6


@EXAMPLES
@given(SEEDS, KERNELS, BIASES)
def test_equal_layers_score_one(seed, kernel, bias):
    hidden = states(seed)
    hidden[2] = hidden[0]
    np.testing.assert_allclose(cka(hidden, kernel=kernel, bias=bias)[0, 2], 1, atol=1e-6)


def test_general_linear_maps_are_seen():
    """CKA is not CCA: it weighs directions by their variance."""
    hidden = states(0)
    changed = hidden.copy()
    changed[1] = hidden[1] @ np.diag(10.0 ** np.linspace(-1, 1, 16)).astype(np.float32)
    assert np.abs(cka(changed) - cka(hidden)).max() > 0.05


@pytest.mark.parametrize(("samples", "width", "seeds"), [(8, 4, 200), (300, 4096, 6)])
def test_unrelated_layers(samples, width, seeds):
    """Debiased: mean 0. Biased: the exact null mean, which is 0.93 at N=300, D=4096."""
    debiased, biased, null = [], [], []
    for seed in range(seeds):
        hidden = np.random.default_rng(seed).standard_normal((2, samples, width), np.float32)
        debiased.append(cka(hidden, bias="debiased")[0, 1])
        biased.append(cka(hidden)[0, 1])
        null.append(null_mean(sweep(hidden))[0, 1])
    assert abs(np.mean(debiased)) < 4 * np.std(debiased, ddof=1) / np.sqrt(seeds)
    difference = np.subtract(biased, null)
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / np.sqrt(seeds)
    if width == 4096:
        assert np.mean(biased) == pytest.approx(0.931, abs=2e-3)
