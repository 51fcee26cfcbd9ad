"""Every form of a sweep gives the numbers of the float64 oracle; the choice among them is by cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.delta import delta, layer_scores
from jaxcrit.criteria.step import step
from jaxcrit.similarity import (
    DegenerateError,
    FeatureSums,
    GramSums,
    _cka,
    _forms,
    _grams,
    choose_form,
    cka_without_each,
    features,
    from_tables,
    null_mean,
    participation_ratio,
    sampled_bandwidths,
    sweep,
    tiled,
    unit_rows,
)
from jaxcrit.similarity import _survey as surveys
from jaxcrit.similarity._tiled import _default_tile

BIASES = ["biased", "debiased"]


def streamed(hidden, batch=16, block=16, band=None, pad=3):
    """Batches as capture gives them: the rows that only fill one up hold anything."""
    hidden = np.asarray(hidden)
    sums = FeatureSums(len(hidden), hidden.shape[2], band=band, block=block)
    for start in range(0, hidden.shape[1], batch):
        states = hidden[:, start : start + batch]
        junk = np.full((len(hidden), pad, hidden.shape[2]), np.nan, hidden.dtype)
        samples = np.concatenate([start + np.arange(states.shape[1]), np.full(pad, -1)])
        sums.add(np.concatenate([states, junk], axis=1), samples)
    return sums.tables()


def forms(block):
    """Name -> form; ``block`` is the tile, the block, the batch."""
    return {
        "resident": sweep,
        "tiled": functools.partial(tiled, tile=block),
        "features": functools.partial(features, block=block),
        "features, one pair at a time": functools.partial(features, block=block, memory=1),
        "streamed": functools.partial(streamed, batch=block, block=16),
    }


def check(hidden, block, atol=1e-6):
    exact = np.asarray(hidden, np.float64)
    expected = {bias: oracles.oracle(exact, bias) for bias in BIASES}
    relative = [np.trace(g) / np.linalg.norm(g) for g in map(oracles.gram, exact)]
    for name, form in forms(block).items():
        tables = form(hidden)
        for bias in BIASES:
            np.testing.assert_allclose(from_tables(tables, bias), expected[bias], atol=atol, rtol=0, err_msg=name)
        null = np.outer(relative, relative) / (exact.shape[1] - 1)
        np.testing.assert_allclose(null_mean(tables), null, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(participation_ratio(tables), np.square(relative), rtol=1e-5, err_msg=name)


# N, D, L and block: wide and narrow, blocks of one, that divide, that do not, and all at once
GRID = [(24, 90, 3, 24), (24, 90, 3, 7), (61, 16, 4, 16), (61, 16, 4, 1), (150, 33, 5, 64), (8, 5, 2, 3)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, np.float32) for shape in GRID), *((GRID[1], dtype) for dtype in (np.float64, np.float16, jnp.bfloat16))],
    ids=lambda value: str(value) if isinstance(value, tuple) else np.dtype(value).name,
)
def test_float64_oracle_over_a_grid(shape, dtype):
    samples, width, layers, block = shape
    hidden = oracles.chain(layers, samples, width, rho=0.6, seed=samples)
    check(jnp.asarray(hidden, dtype) if dtype != np.float64 else hidden.astype(dtype), block)


@pytest.mark.parametrize("outlier", [None, (30, 3), (100, 3), (500, 5), (2000, 10)], ids=str)
def test_stress_table(outlier):
    """Large, nearly constant dimensions: the pilot mean comes before any product."""
    hidden = oracles.chain(3, 120, 256)
    check(oracles.with_outliers(hidden, *outlier) if outlier else hidden, 50)


def test_wide_activations_whose_debiased_value_is_a_small_difference():
    check(np.random.default_rng(0).standard_normal((3, 60, 1024), np.float32), 25)


@pytest.mark.parametrize("seed", range(6))
def test_four_samples(seed):
    """The fewest there can be: the debiased value moves by up to 1.2e-6 where only the activations are rounded."""
    hidden = oracles.chain(2, 4, 5, seed=seed)
    check(hidden, 3, atol=1e-6 + 4 * moved_by_rounding(hidden))


def moved_by_rounding(hidden, draws=200):
    """How far the float64 debiased values move when every activation is put off by less than float32 rounds it."""
    exact, rng = np.asarray(hidden, np.float64), np.random.default_rng(0)
    rounded = (exact * (1 + rng.uniform(-1, 1, exact.shape) * 2.0**-24) for _ in range(draws))
    return max(np.abs(oracles.oracle(one, "debiased") - oracles.oracle(exact, "debiased")).max() for one in rounded)


def test_a_sample_far_from_all_others():
    """Its squared length, of 100 times the others', is what the debiased value is the small rest of."""
    hidden = oracles.chain(2, 40, 64, rho=0.6)
    hidden[:, 7] *= 10
    check(hidden, 16)


@pytest.mark.parametrize("band", [None, 1])
@pytest.mark.parametrize("name", ["resident", "tiled", "features", "streamed"])
def test_rows_of_unit_length(name, band):
    """``--normalize=row``: rows of any length, two of them far longer."""
    hidden = oracles.with_outliers(oracles.chain(4, 61, 30), 100, 3)
    hidden[:, [3, 40]] *= np.array([1e3, 1e-3], np.float32)[:, None]
    exact = hidden / np.linalg.norm(hidden.astype(np.float64), axis=2, keepdims=True)
    tables = forms(16)[name](unit_rows(hidden), band=band)
    near = np.abs(np.subtract.outer(range(4), range(4))) <= (band or 4)
    for bias in BIASES:
        np.testing.assert_allclose(
            from_tables(tables, bias)[near], oracles.oracle(exact, bias)[near], atol=1e-6, rtol=0
        )
        assert np.isnan(from_tables(tables, bias)[~near]).all()


def test_a_row_of_zeros_is_named_as_its_sample():
    hidden = oracles.chain(3, 4, 5)
    hidden[1, 2:] = 0
    with pytest.raises(DegenerateError, match="layer 1: 71 are samples of zeros") as caught:
        unit_rows(hidden, np.array([5, 8, 71, -1]))
    assert caught.value.samples == (71,)


def test_a_first_batch_unlike_the_rest():
    """The pilot is then far from the mean, and what it misses is put right at the end."""
    hidden = oracles.chain(3, 90, 24)
    hidden[:, :16] += 30 * np.random.default_rng(1).standard_normal((3, 1, 24)).astype(np.float32)
    expected = {bias: oracles.oracle(hidden, bias) for bias in BIASES}
    for batch, block in ((1, 16), (16, 16), (90, 8)):
        for bias in BIASES:
            np.testing.assert_allclose(from_tables(streamed(hidden, batch, block), bias), expected[bias], atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 5, 8, 24]), st.sampled_from([1, 7, 24]), st.floats(-6, 6))
def test_blocks_batches_order_and_scale_do_not_matter(seed, block, batch, power):
    hidden = oracles.chain(3, 24, 16, seed=seed)
    scales = 10.0 ** np.array([0, power, -power])[:, None, None]
    shuffled = (hidden * scales).astype(np.float32)[:, np.random.default_rng(seed).permutation(24)]
    tables = (tiled(shuffled, tile=block), features(shuffled, block=block), streamed(shuffled, batch, block))
    for bias, of in itertools.product(BIASES, tables):
        np.testing.assert_allclose(from_tables(of, bias), from_tables(sweep(hidden), bias), atol=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_tiles_give_all_tables(kernel):
    hidden = oracles.with_outliers(oracles.chain(4, 61, 30), 500, 5)
    whole, parts = sweep(hidden, kernel=kernel), tiled(hidden, kernel=kernel, tile=16)
    for bias in BIASES:
        np.testing.assert_allclose(from_tables(parts, bias), from_tables(whole, bias), atol=1e-6)
        np.testing.assert_allclose(cka_without_each(parts, bias), cka_without_each(whole, bias), atol=1e-6)
    for name in ("rows", "weighted", "diagonals"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(parts, name), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kernel", "band"), [("linear", None), ("linear", 1), ("rbf", None)])
@pytest.mark.parametrize("tile", [61, 16])
def test_sums_of_tiles_are_sums_of_their_tables(kernel, band, tile):
    hidden = oracles.with_outliers(oracles.chain(4, 61, 30), 500, 5)
    whole = tiled(hidden, kernel=kernel, band=band, tile=tile)
    sums = tiled(hidden, kernel=kernel, band=band, tile=tile, sums=True)
    assert isinstance(sums, GramSums) and sums.num_samples == 61
    for bias in BIASES:
        np.testing.assert_allclose(from_tables(sums, bias), from_tables(whole, bias), atol=1e-7)
    np.testing.assert_allclose(null_mean(sums), null_mean(whole), rtol=1e-6)


def test_tiles_of_a_cpu_stay_in_its_cache():
    for layers, count in ((30, 3000), (32, 10_000), (2, 50), (400, 2000)):
        size = _default_tile(layers, count)
        assert 4 * layers * size**2 <= 2**25 and size <= max(count, 64)


@pytest.mark.parametrize("bias", BIASES)
def test_rbf_tiles_beside_the_float64_oracle(bias):
    hidden = oracles.chain(3, 50, 20)
    product = {"biased": oracles.biased_product, "debiased": oracles.song}[bias]
    expected = oracles.ratio(product, [oracles.rbf_gram(x) for x in hidden])
    np.testing.assert_allclose(from_tables(tiled(hidden, kernel="rbf", tile=13), bias), expected, atol=1e-6)


def test_sampled_bandwidth():
    """All pairs where they are few; else drawn by the seed, near the median, and CKA hardly notices."""
    hidden = oracles.chain(2, 300, 20)
    exact = [oracles.bandwidth(x) for x in hidden]
    np.testing.assert_allclose(sampled_bandwidths(hidden), exact, rtol=1e-5)
    drawn = sampled_bandwidths(hidden, pairs=20_000, seed=1)
    np.testing.assert_array_equal(drawn, sampled_bandwidths(hidden, pairs=20_000, seed=1))
    assert not np.array_equal(drawn, sampled_bandwidths(hidden, pairs=20_000, seed=2))
    np.testing.assert_allclose(drawn, exact, rtol=0.02)
    values = (from_tables(tiled(hidden, kernel="rbf", bandwidths=b), "debiased") for b in (drawn, exact))
    np.testing.assert_allclose(*values, atol=1e-3)


@pytest.mark.parametrize("band", [1, 2, 20])
@pytest.mark.parametrize("name", ["resident", "tiled", "features", "streamed"])
def test_a_band_is_a_part_of_all_pairs(name, band):
    hidden = oracles.chain(21, 24, 10)  # more layers than are contracted at a time
    whole, part = sweep(hidden), forms(9)[name](hidden, band=band)
    layers = np.arange(21)
    far = np.abs(layers[:, None] - layers) > band
    for bias in BIASES:
        values = from_tables(part, bias)
        assert np.isnan(values[far]).all()
        np.testing.assert_allclose(values[~far], from_tables(whole, bias)[~far], atol=1e-6)
        if not isinstance(part, GramSums):
            deleted = cka_without_each(part, bias)
            np.testing.assert_allclose(deleted[:, ~far], cka_without_each(whole, bias)[:, ~far], atol=1e-6)
    np.testing.assert_allclose(step(from_tables(part))[0], step(from_tables(whole))[0], atol=1e-6)
    window = 2 * min(band, 3) + 1
    expected = delta(from_tables(whole), window)[0]
    np.testing.assert_allclose(delta(from_tables(part), window)[0], expected, atol=1e-6)
    if band == 1:
        with pytest.raises(UserError, match=r"window=5: the sweep's band .* at least 2"):
            delta(from_tables(part), 5)


def test_sums_have_no_errors_and_say_so():
    hidden = oracles.chain(6, 30, 8)
    scores, whole = layer_scores(features(hidden)), layer_scores(sweep(hidden))
    for key, score in scores.items():
        assert score.stderr is None and whole[key].stderr is not None
        np.testing.assert_allclose(score.values, whole[key].values, atol=1e-6)
    with pytest.raises(UserError, match="--form=tiled"):
        cka_without_each(features(hidden))


NAMES = ["tiled", "features", "streamed"]


@pytest.mark.parametrize("name", ["resident", *NAMES])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_not_finite_names_layer_and_sample(name, value):
    hidden = oracles.chain(4, 40, 6)
    hidden[2, 23, 1] = value
    with pytest.raises(DegenerateError, match=r"layers 2: activations are NaN.* in samples 23;") as caught:
        forms(16)[name](hidden)
    assert caught.value.layers == (2,) and caught.value.samples == (23,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [0, 1e-6])
def test_constant_layer(name, noise):
    hidden = oracles.chain(4, 40, 6)
    hidden[1], hidden[3] = 3 + noise * hidden[1], 0
    with pytest.raises(DegenerateError, match="layers 1, 3 are constant: all 40 samples"):
        forms(16)[name](hidden)
    with pytest.raises(DegenerateError, match="all 40 samples are identical in every layer"):
        forms(16)[name](np.repeat(hidden[:, :1], 40, axis=1))


@pytest.mark.parametrize("form", [tiled, features])
@pytest.mark.parametrize("noise", [0, 1e-6])
def test_repeated_samples(form, noise):
    hidden = oracles.with_outliers(oracles.chain(4, 40, 60), 100, 3)
    hidden[:, 31] = hidden[:, 4] * (1 + noise)
    hidden[:, 17] = hidden[:, 4]
    hidden[:3, 20] = hidden[:3, 2]  # equal in some layers only
    with pytest.raises(DegenerateError, match=r"2 of 40 samples repeat .* samples 4 and 17,"):
        form(hidden)
    np.testing.assert_allclose(from_tables(form(hidden, allow_repeats=True)), oracles.oracle(hidden), atol=1e-6)


def test_many_copies_are_counted_by_few_comparisons(monkeypatch):
    """Large constant dimensions make neighbours of all samples along a direction; only what is equal is compared."""
    hidden = oracles.with_outliers(oracles.chain(3, 2000, 60), 1000, 3)
    compared = []
    monkeypatch.setattr(surveys, "_equal", lambda *given, equal=surveys._equal: compared.append(1) or equal(*given))
    surveys.survey(hidden)
    assert len(compared) < 20
    hidden[:, 500:700] = hidden[:, 699:700]
    with pytest.raises(DegenerateError, match=r"199 of 2000 samples repeat .* samples 500 and 501,"):
        surveys.survey(hidden)
    assert len(compared) < 600


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda h: tiled(h, tile=21), "tile=21: expected 1 to 20, the number of samples"),
        (lambda h: tiled(h, tile=0), "tile=0: expected 1 to 20"),
        (lambda h: features(h, block=21), "block=21: expected 1 to 20"),
        (lambda h: FeatureSums(3, 8, block=0), "block=0"),
        *((lambda h, form=form: form(h, band=3), "band=3: expected 1 to 2") for form in (sweep, tiled, features)),
        (lambda h: streamed(h, band=0), "band=0: expected 1 to 2"),
        (lambda h: tiled(h[:, :3]), "at least 4 samples, got 3"),
        (lambda h: features(h[:, :3]), "at least 4 samples, got 3"),
        (lambda h: streamed(h[:, :3]), "at least 4 samples, got 3"),
        (lambda h: tiled(h[0]), r"expected activations \[layers, samples, width\]"),
        (lambda h: tiled(h, kernel="cosine"), "kernel='cosine'"),
        (lambda h: features(h.astype(int)), "of floats"),
    ],
)
def test_wrong_arguments(call, match):
    with pytest.raises(UserError, match=match):
        call(oracles.chain(3, 20, 8))


GIB = 2.0**30


@pytest.mark.parametrize(
    ("shape", "options", "name"),
    [
        ((300, 4096, 32), {}, "resident"),
        ((1500, 576, 30), {}, "resident"),
        ((3000, 576, 30), {}, "tiled"),
        ((3000, 576, 30), {"grams": True}, "resident"),
        ((3000, 576, 30), {"kernel": "rbf"}, "resident"),
        ((4096, 64, 12), {}, "tiled"),  # features would be cheaper, but have no rows
        ((4097, 64, 12), {}, "streamed"),
        ((10_000, 4096, 32), {}, "tiled"),
        ((20_000, 4096, 32), {"band": 2}, "tiled"),
        ((30_000, 4096, 32), {"band": 2, "memory": 30 * GIB}, "streamed"),  # beyond 5.8 D = 23,800
        ((100_000, 4096, 32), {}, "tiled"),
        ((200_000, 4096, 32), {}, "streamed"),  # beyond D (L + 1) = 135,000
        ((1_000_000, 4096, 32), {"memory": 60 * GIB, "devices": 2}, "streamed"),
        ((20_000, 256, 12), {"memory": 4 * GIB}, "streamed"),
        ((20_000, 256, 12), {"memory": 4 * GIB, "kernel": "rbf"}, "tiled"),
        ((20_000, 256, 12), {"memory": 4 * GIB, "stored": True}, "features"),
        ((300, 4096, 32), {"asked": "tiled"}, "tiled"),
    ],
    ids=str,
)
def test_choice_of_form(shape, options, name):
    form = choose_form(*shape, **{"memory": 130 * GIB, **options})
    assert form.name == name, str(form)
    assert len(str(form)) <= 140 and ("no standard errors" in str(form)) is (not form.has_rows)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"memory": GIB}, "every form takes .* GiB or more, 1.0 are there; give a --band"),
        ({"asked": "sketched"}, "form='sketched': expected auto, resident"),
        ({"asked": "features", "kernel": "rbf"}, "rbf kernel has no feature space"),
        ({"asked": "streamed", "stored": True}, "activations are to be saved"),
        ({"band": 32}, "band=32: expected 1 to 31"),
    ],
    ids=str,
)
def test_no_form(options, match):
    with pytest.raises(UserError, match=match):
        choose_form(100_000, 4096, 32, **{"memory": 130 * GIB, **options})


@pytest.mark.parametrize("devices", [1, 8])
def test_what_a_form_is_said_to_hold_and_do(devices):
    """Bytes of float32 activations, Grams and tables that a device holds, and operations, by hand."""
    count, width, depth, near = 2000, 512, 12, 2
    pairs, near_pairs = depth * (depth + 1) // 2, sum(min(near, other) + 1 for other in range(depth))
    activations, tables = 4 * depth * count * width, 16 * count * depth**2
    tile = min(_forms.BLOCK, count)
    expected = {
        "resident": activations + 8 * depth * count**2 / devices + tables,
        "tiled": activations / devices + 12 * depth * tile**2 + tables,
        "features": activations + 8 * width**2 / devices,
        "streamed": 8 * pairs * width**2 / devices + 8 * depth * tile * width,
    }
    operations = {
        "resident": 2 * depth * count**2 * width + 4 * depth**2 * count**2,
        "tiled": depth * count**2 * width + 4 * depth**2 * count**2,
        "features": 2 * pairs * count * width**2,
        "streamed": 2 * pairs * count * width**2,
    }
    for name, held in expected.items():
        form = choose_form(count, width, depth, memory=GIB, devices=devices, asked=name)
        assert (form.flops, form.memory) == (operations[name], held), name
    banded = choose_form(count, width, depth, band=near, memory=GIB, asked="features")
    assert banded.flops == 2 * near_pairs * count * width**2
    tiled_band = choose_form(count, width, depth, band=near, memory=GIB, asked="tiled")
    assert tiled_band.flops == depth * count**2 * width + 4 * depth * (2 * near + 1) * count**2


def test_cka_of_many_samples_takes_sums_alone(monkeypatch):
    """They cost a third less than rows do, and say the same."""
    asked, hidden = [], np.random.default_rng(0).standard_normal((3, 40, 8), dtype=np.float32)
    monkeypatch.setattr(_cka, "RESIDENT_SAMPLES", 39)
    monkeypatch.setattr(_cka, "tiled", lambda *given, **options: asked.append(options) or tiled(*given, **options))
    found = _cka.cka(hidden)
    assert asked == [{"sums": True}]
    np.testing.assert_allclose(found, oracles.oracle(hidden), atol=1e-6)


def test_a_trace_is_brought_into_one_to_two():
    for trace in (1e-30, 0.5, 0.99, 1.0, 1.5, 2.0, 3e20):
        assert 1 <= trace * float(_grams.power_of_two(np.float32(trace))) < 2


def test_tiles_are_counted_from_one_to_all():
    seen = []
    hidden = np.random.default_rng(0).standard_normal((2, 10, 4), dtype=np.float32)
    tiled(hidden, tile=4, progress=lambda *counts: seen.append(counts))
    assert seen == [(number, 6) for number in range(1, 7)], "three blocks, six pairs of them"


def test_only_one_cpu_is_one_cpu():
    one, mesh = jnp.zeros(8), jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    many = jax.device_put(one, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert _grams.on_one_cpu(one) and not _grams.on_one_cpu(many) and not _grams.on_one_cpu(one, many)


@pytest.mark.parametrize("noise", [0, 1e-6, 2 * _grams.ROUNDING])
def test_a_constant_layer_of_a_stream(noise):
    hidden = oracles.chain(4, 40, 6)
    hidden[1], hidden[3] = 3 + noise * hidden[1], 0
    sums = FeatureSums(4, 6, block=16)
    sums.add(hidden)
    with pytest.raises(DegenerateError, match="layers 1, 3 are constant: all 40 samples"):
        sums.tables()
