import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import oracles

from jaxcrit.similarity import (
    PackedGrams,
    _grams,
    centred_grams,
    cka,
    cka_without_each,
    from_tables,
    gram_tables,
    hsic,
    pack_upper,
)

BIASES = ["biased", "debiased"]
OUTLIERS = [None, (30, 3), (100, 3), (500, 5), (2000, 10)]


@pytest.mark.parametrize("outlier", OUTLIERS, ids=str)
def test_float64_oracle_with_large_constant_dimensions(outlier):
    """The cases on which raw-Gram implementations return 0 or NaN."""
    hidden = oracles.chain(3, 300, 4096)
    if outlier:
        hidden = oracles.with_outliers(hidden, *outlier)
    for bias in BIASES:
        np.testing.assert_allclose(cka(hidden, bias=bias), oracles.oracle(hidden, bias), atol=1e-7, rtol=0)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_float64_oracle_over_spectra(power, bias):
    hidden = oracles.chain(4, 120, 600, power=power, rho=0.5)
    np.testing.assert_allclose(cka(hidden, bias=bias), oracles.oracle(hidden, bias), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("outlier", [None, (100, 3)], ids=str)
def test_papers_formulas(kernel, outlier):
    hidden = oracles.chain(4, 101, 80)
    if outlier:
        hidden = oracles.with_outliers(hidden, *outlier)
    np.testing.assert_allclose(cka(hidden, kernel=kernel), oracles.paper_cka(hidden, kernel), atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [60, 61])  # 1770 and 1830 pairs of samples, and the lower of two medians
@pytest.mark.parametrize("bias", BIASES)
def test_rbf_float64_oracle(samples, bias):
    hidden = oracles.with_outliers(oracles.chain(3, samples, 200), 500, 5)
    product = {"biased": oracles.biased_product, "debiased": oracles.song}[bias]
    expected = oracles.ratio(product, [oracles.rbf_gram(x) for x in hidden])
    np.testing.assert_allclose(cka(hidden, kernel="rbf", bias=bias), expected, atol=1e-6, rtol=0)


def test_rbf_leaves_zero_distances_out_of_its_median():
    """One layer may see equal samples (a closed vocabulary, say) as long as not every layer does."""
    hidden = oracles.chain(2, 40, 30)
    hidden[0] = hidden[0, np.arange(40) // 10]  # 4 distinct rows, 180 of 780 pairs at distance 0
    hidden[0] += 0.0
    np.testing.assert_allclose(cka(hidden, kernel="rbf"), oracles.paper_cka(hidden, "rbf"), atol=1e-6, rtol=0)


def test_debiased_sweep_is_song_and_u_centring():
    matrices = [oracles.gram(x) for x in oracles.chain(4, 30, 50)]
    from_sweep = hsic(oracles.tables_of(matrices), "debiased") / (30 * 27)
    for product in (oracles.song, oracles.u_centred_product):
        literal = np.array([[product(k, g) for g in matrices] for k in matrices])
        np.testing.assert_allclose(from_sweep, literal, rtol=1e-11)


def test_feature_form():
    hidden = oracles.chain(3, 50, 20)
    centred = np.asarray(hidden, np.float64) - hidden.mean(1, keepdims=True, dtype=np.float64)
    cross = np.array([[np.sum((x.T @ y) ** 2) for y in centred] for x in centred])
    norms = np.sqrt(cross.diagonal())
    np.testing.assert_allclose(cka(hidden), cross / norms[:, None] / norms, atol=1e-7)


def test_cka_through_spectra():
    """``sum (l_i m_j <u_i, v_j>)^2 / (|l^2| |m^2|)`` over eigenvalues and eigenvectors of two Grams."""
    hidden = oracles.chain(2, 30, 12, power=1.0)
    (left, u), (right, v) = (np.linalg.eigh(oracles.gram(x)) for x in hidden)
    expected = np.sum(np.outer(left, right) * (u.T @ v) ** 2) / np.linalg.norm(left) / np.linalg.norm(right)
    np.testing.assert_allclose(cka(hidden)[0, 1], expected, atol=1e-7)


def test_adding_a_constant_to_a_kernel_changes_nothing():
    """HSIC_1 does not see it, so centring and leaving exp(-1/2) out of the RBF kernel cost nothing."""
    hidden = oracles.chain(3, 30, 12)
    shifted = [oracles.rbf_gram(x) + shift for x, shift in zip(hidden, (0, -0.6, 5), strict=True)]
    expected = oracles.ratio(oracles.song, shifted)
    np.testing.assert_allclose(cka(hidden, kernel="rbf", bias="debiased"), expected, atol=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("bias", BIASES)
def test_other_model(kernel, bias):
    left, right = oracles.chain(3, 40, 30), oracles.chain(5, 40, 70, seed=1)
    right[:, :, :30] += left[2]
    wide = np.concatenate([np.pad(left, ((0, 0), (0, 0), (0, 40))), right])
    expected = cka(wide, kernel=kernel, bias=bias)[:3, 3:]
    crossed = cka(left, kernel=kernel, bias=bias, other=right)
    assert crossed.shape == (3, 5)
    np.testing.assert_allclose(crossed, expected, atol=1e-7)
    tables = gram_tables(centred_grams(left, kernel), centred_grams(right, kernel))
    np.testing.assert_allclose(from_tables(tables, bias), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
def test_types(dtype):
    """Activations of any float type are centred in float32: only their own rounding remains."""
    hidden = oracles.chain(3, 60, 90).astype(dtype)
    expected = oracles.oracle(hidden.astype(np.float32), "debiased")
    np.testing.assert_allclose(cka(hidden, bias="debiased"), expected, atol=1e-7)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec(None, None, "data")])
def test_eight_devices(kernel, spec):
    """Replicated, samples sharded, width sharded: the numbers of one device."""
    hidden = oracles.with_outliers(oracles.chain(5, 64, 128), 500, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(hidden, NamedSharding(mesh, spec))
    for bias in BIASES:
        np.testing.assert_allclose(
            cka(sharded, kernel=kernel, bias=bias), cka(hidden, kernel=kernel, bias=bias), atol=1e-6, rtol=0
        )


def test_sweep_compiles_once_per_shape():
    before = _grams._sweep_jit._cache_size()
    for seed in range(3):
        for bias in BIASES:
            cka(oracles.chain(3, 23, 31, seed=seed), bias=bias)
    assert _grams._sweep_jit._cache_size() == before + 1


@pytest.mark.parametrize("samples", [4, 16, 65])
def test_blocks_do_not_change_the_product(samples):
    x = jnp.asarray(oracles.chain(1, samples, 40)[0])
    build = jax.jit(_grams._linear_gram, static_argnums=2)
    np.testing.assert_allclose(build(x, x[0], True), build(x, x[0], False), atol=1e-4)
    np.testing.assert_array_equal(build(x, x[0], True), build(x, x[0], True).T)


def test_grams_are_centred_and_pack():
    hidden = oracles.chain(3, 21, 40)
    built = centred_grams(hidden)
    assert built.dtype == jnp.float32
    np.testing.assert_allclose(built, [oracles.gram(x) for x in hidden], atol=2e-5)
    packed = pack_upper(built)
    assert packed.shape == (3, 21 * 11) and packed.dtype == np.float32
    np.testing.assert_array_equal(packed[0, :3], built[0, 0, :3])
    restored = from_tables(gram_tables(PackedGrams(packed)), "debiased")
    np.testing.assert_allclose(restored, cka(hidden, bias="debiased"), atol=1e-7)


@pytest.mark.parametrize("unpacked", [4 * 5 * 21 * 4, 2**26])
def test_packed_grams_are_read_a_few_rows_at_a_time(unpacked, monkeypatch):
    monkeypatch.setattr(_grams, "_UNPACKED", unpacked)
    ours, theirs = np.array(centred_grams(oracles.chain(3, 21, 40))), np.array(centred_grams(oracles.chain(2, 21, 9)))
    for side in (ours, theirs):
        side[:] = (side + side.swapaxes(1, 2)) / 2
    packed, other = PackedGrams(pack_upper(ours)), PackedGrams(pack_upper(theirs))
    both = PackedGrams(*packed.parts, *other.parts)
    assert both.shape == (5, 21, 21) and len(list(both)) == 5
    np.testing.assert_array_equal(np.array(list(both)), np.concatenate([ours, theirs]))
    np.testing.assert_array_equal(both.rows(np.array([20, 0, 7])), np.concatenate([ours, theirs])[:, [20, 0, 7]])
    np.testing.assert_array_equal(packed.diagonals, np.diagonal(ours, axis1=1, axis2=2))
    for given, whole in (((packed,), (ours,)), ((packed, other), (ours, theirs))):
        found, expected = gram_tables(*given), gram_tables(*whole)
        for bias in BIASES:
            np.testing.assert_allclose(from_tables(found, bias), from_tables(expected, bias), atol=1e-7)
            np.testing.assert_allclose(cka_without_each(found, bias), cka_without_each(expected, bias), atol=1e-7)


@pytest.mark.parametrize("bias", BIASES)
def test_many_samples_go_by_tiles(bias, monkeypatch):
    monkeypatch.setattr("jaxcrit.similarity._cka.RESIDENT_SAMPLES", 20)
    monkeypatch.setattr("jaxcrit.similarity._cka.sweep", lambda *_, **__: pytest.fail("held every Gram"))
    hidden = oracles.with_outliers(oracles.chain(3, 61, 40), 500, 5)
    np.testing.assert_allclose(cka(hidden, bias=bias), oracles.oracle(hidden, bias), atol=1e-6)
