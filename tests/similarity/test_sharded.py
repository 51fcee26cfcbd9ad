"""The same numbers on 1 and 8 devices, whatever is split and however samples travel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import (
    DegenerateError,
    FeatureSums,
    cka_without_each,
    features,
    from_tables,
    product_sharding,
    shard,
    sharded,
    sweep,
    unit_rows,
)

BIASES = ["biased", "debiased"]


def mesh(*sizes):
    names = ("data", "fsdp")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


HIDDEN = oracles.with_outliers(oracles.chain(5, 80, 48), 500, 5)
WAYS = {
    "ring": ("samples", {"exchange": "ring"}),
    "gather": ("samples", {"exchange": "gather"}),
    "ring, tiles that overlap": ("samples", {"exchange": "ring", "tile": 4}),
    "gather, tiles that overlap": ("samples", {"exchange": "gather", "tile": 3}),
    "width": ("width", {}),
    "width, tiles that overlap": ("width", {"tile": 24}),
}


@functools.cache
def expected(kernel):
    tables = sweep(HIDDEN, kernel=kernel)
    return {bias: (from_tables(tables, bias), cka_without_each(tables, bias)) for bias in BIASES}


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("way", WAYS)
def test_eight_devices(way, kernel):
    by, options = WAYS[way]
    tables = sharded(shard(HIDDEN, mesh(4, 2), by), kernel=kernel, **options)
    for bias in BIASES:
        values, deleted = expected(kernel)[bias]
        np.testing.assert_allclose(from_tables(tables, bias), values, atol=1e-6)
        np.testing.assert_allclose(cka_without_each(tables, bias), deleted, atol=1e-6)
        if kernel == "linear":
            np.testing.assert_allclose(from_tables(tables, bias), oracles.oracle(HIDDEN, bias), atol=1e-6)


@pytest.mark.parametrize("by", ["samples", "width"])
def test_rows_of_unit_length(by):
    """``--normalize=row``, all pairs and a band.

    Constant dimensions of 100 standard deviations would leave float32 rows of length 1 too few digits for 1e-6.
    """
    hidden = oracles.with_outliers(oracles.chain(5, 80, 48), 100, 3)
    rows = hidden / np.linalg.norm(hidden.astype(np.float64), axis=2, keepdims=True)
    split = shard(unit_rows(hidden), mesh(8), by)
    near = np.abs(np.subtract.outer(range(5), range(5))) <= 1
    for bias in BIASES:
        expected = oracles.oracle(rows, bias)
        np.testing.assert_allclose(from_tables(sharded(split), bias), expected, atol=1e-6)
        np.testing.assert_allclose(from_tables(sharded(split, band=1), bias)[near], expected[near], atol=1e-6)


@pytest.mark.parametrize("by", ["samples", "width"])
def test_bands_and_reduced_precision(by):
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    whole = from_tables(sweep(hidden), "debiased")
    part = from_tables(sharded(shard(hidden, mesh(8), by), band=1), "debiased")
    near = np.abs(np.subtract.outer(range(5), range(5))) <= 1
    assert np.isnan(part[~near]).all()
    np.testing.assert_allclose(part[near], whole[near], atol=1e-6)


@pytest.mark.parametrize("split", ["samples", "width"])
def test_features_on_eight_devices(split):
    """Products lie on all devices, none of them replicated; activations come split or in batches."""
    devices = mesh(4, 2)
    sharding = product_sharding(devices, 48)
    sums = FeatureSums(5, 48, block=32, sharding=sharding)
    for start in range(0, 80, 16):
        sums.add(shard(HIDDEN[:, start : start + 16], devices, split))
    products = sums._sums.moments.products
    assert products.addressable_shards[0].data.shape == (2, 15, 6, 48)
    for tables in (sums.tables(), features(shard(HIDDEN, devices, split), sharding=sharding, block=32)):
        for bias in BIASES:
            np.testing.assert_allclose(from_tables(tables, bias), expected("linear")[bias][0], atol=1e-6)


def test_what_a_ring_holds():
    """Two blocks of samples, not all of them, and one program for the whole sweep."""
    from jaxcrit.similarity._sharded import _program

    def compiled(exchange):
        devices = mesh(8)
        program = _program(devices, ("data",), False, 16, exchange, "linear", None, True, False)
        hidden, facts = jnp.zeros((4, 1024, 64)), np.zeros((3, 4, 1024), np.float32)
        layers = (np.zeros((4, 64), np.float32), *(np.ones(4, np.float32),) * 3)
        from jaxcrit.similarity import Layers

        return program.lower(shard(hidden, devices), *facts, Layers(*layers)).compile()

    ring, gather = compiled("ring"), compiled("gather")
    assert "collective-permute" in ring.as_text() and "all-gather" not in ring.as_text()
    assert "all-gather" in gather.as_text()
    block = 4 * 128 * 64 * 4
    difference = gather.memory_analysis().temp_size_in_bytes - ring.memory_analysis().temp_size_in_bytes
    assert difference > 3 * block


def test_bad_splits():
    devices = mesh(8)
    with pytest.raises(UserError, match=r"81 samples do not divide over the 8 devices"):
        shard(np.zeros((2, 81, 16)), devices)
    with pytest.raises(UserError, match=r"17 dimensions do not divide over the 8 devices"):
        shard(np.zeros((2, 80, 17)), devices, "width")
    with pytest.raises(UserError, match=r"width 17 does not divide over the 8 devices"):
        product_sharding(devices, 17)
    with pytest.raises(UserError, match=r"expected activations split by samples or by width"):
        sharded(jnp.asarray(HIDDEN))
    with pytest.raises(UserError, match=r"tile=11: expected 1 to 10"):
        sharded(shard(HIDDEN, devices), tile=11)
    with pytest.raises(UserError, match=r"tile=12: expected a multiple of 8"):
        sharded(shard(HIDDEN, devices, "width"), tile=12)
    with pytest.raises(UserError, match=r"band=5: expected 1 to 4"):
        sharded(shard(HIDDEN, devices), band=5)
    broken = HIDDEN.copy()
    broken[3, 66, 0] = np.inf
    with pytest.raises(DegenerateError, match=r"layers 3: .* in samples 66"):
        sharded(shard(broken, devices))
