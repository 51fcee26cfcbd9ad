"""Operations and bytes of the forms at L=32, D=4096, counted from programs that never run."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.parallel.accounting import collectives, product_flops
from jaxcrit.similarity import _features, _grams, _sharded, _tiled, choose_form, product_sharding
from jaxcrit.similarity._survey import blocks

L, D = 32, 4096
# Prompts, and with ``position=all`` their tokens: 300 prompts of 33 are 9,900 samples.
SAMPLES = [304, 1000, 10_000]
# All rows of Grams, which errors come from, take 4 L^2 N^2; CKA alone 2 L^2 N^2.
ROWS, SUMS = 4, 2
PERMUTED = re.compile(r"= f32\[([\d,]+)\]\S* collective-permute\(")


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def gram_once(count, contraction):
    """SIMILARITY's formula: every Gram once, and all pairs of layers by one contraction."""
    return 2 * L * count**2 * D + contraction * L**2 * count**2


def tile_arguments(size, own=floats):
    side = _tiled.Samples(floats(L, size, D), 0, jax.ShapeDtypeStruct((size,), bool), *(own(L, size) for _ in range(3)))
    return side, side, _tiled.Layers(floats(L, D), floats(L), floats(L), floats(L)), 0


@pytest.mark.parametrize("count", SAMPLES)
def test_resident(count):
    found = product_flops(lambda x: _grams._sweep((x,), "linear", False, None)[0], floats(L, count, D))
    assert found == gram_once(count, ROWS)


@pytest.mark.parametrize("count", SAMPLES)
def test_tiles_halve_the_products(count):
    """Half of all Grams' products, and the diagonal's tiles whole."""
    size = min(count, _tiled._default_tile(L, count))
    tiles = len(blocks(count, size))
    pairs = tiles * (tiles + 1) // 2
    options = {"kernel": "linear", "one_cpu": True, "band": None, "both": True}
    for program, contraction in ((_tiled._contract, 2 * ROWS), (_tiled._contract_sums, SUMS)):
        one = product_flops(lambda *given, p=program: p(*given, **options), *tile_arguments(size))
        # A tile off the diagonal counts for two, so its rows are contracted twice; of sums, once.
        assert one == 2 * L * size**2 * D + contraction * L**2 * size**2
        halved = L * (count * size + (tiles * size) ** 2) * D  # where blocks overlap, a little is done twice
        assert pairs * 2 * L * size**2 * D <= halved * (1 + 1 / tiles)
    assert pairs * size**2 <= (1 + size / count) ** 2 * (count**2 + count * size) / 2


@pytest.mark.parametrize("by", ["samples", "width"])
@pytest.mark.parametrize("count", SAMPLES)
def test_a_device_of_eight_does_an_eighth(count, by):
    """Each device makes its own rows whole; of samples a ring passes them all by, two blocks at a time."""
    devices, by_width = mesh(), by == "width"
    share = count if by_width else count // 8
    size = _features.block_size(None, share, "tile")
    program = _sharded._program(devices, ("data",), by_width, size, "ring", "linear", None, False, False)
    over = PartitionSpec(None, None, "data") if by_width else PartitionSpec(None, "data")
    small = NamedSharding(devices, PartitionSpec() if by_width else PartitionSpec(None, "data"))
    mean = NamedSharding(devices, PartitionSpec(None, "data") if by_width else PartitionSpec())
    facts = (floats(L, count, sharding=small) for _ in range(3))
    layers = _tiled.Layers(floats(L, D, sharding=mean), *(floats(L) for _ in range(3)))
    given = (floats(L, count, D, sharding=NamedSharding(devices, over)), *facts, layers)
    # What a device does: the trace of a shard_map has its own shapes.
    assert product_flops(program, *given) == gram_once(count, ROWS) // 8
    compiled = program.lower(*given).compile()
    memory, states = compiled.memory_analysis(), 4 * L * count * D / 8
    assert memory.argument_size_in_bytes <= 1.02 * states + 16 * L * count + 4 * L * D * 2
    moved = collectives(compiled.as_text())
    if by_width:
        assert set(moved) == {"reduce-scatter"}
        assert moved["reduce-scatter"][1] == 4 * L * count**2 // 8
    else:
        assert set(moved) == {"collective-permute"} and moved["collective-permute"][0] == 7
        # In each of seven turns, a device's samples and their diagonals; the other facts are of the RBF kernel.
        turn = sum(4 * math.prod(map(int, shape.split(","))) for shape in PERMUTED.findall(compiled.as_text()))
        assert turn == states + 4 * L * count / 8
    # Two blocks of samples on their way, a tile of all layers, its rows, and the table: never N x N.
    tile, table = 4 * L * size**2, 2 * 4 * count // 8 * 2 * L**2
    assert memory.temp_size_in_bytes <= 2 * states + 12 * tile + 4 * table


@pytest.mark.parametrize("band", [2, None])
def test_streamed_sums_of_eight_devices(band):
    """2 P D^2 operations a sample and 8 P D^2 bytes of sums, an eighth of both on a device, whatever N."""
    first, second = _features.layer_pairs(L, band)
    pairs, block = len(first), _features.BLOCK
    sharding = product_sharding(mesh(), D)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    moments = _features._Moments(
        floats(2, pairs, D, D, sharding=sharding), *(floats(2, of, D, sharding=everywhere) for of in (pairs, pairs, L))
    )
    given = (moments, floats(L, block, D, sharding=everywhere), jax.ShapeDtypeStruct((block,), bool))
    given = (*given, floats(L, D), floats(L), first, second)
    lean = 4 * pairs * block * D  # sums of lengths times states, of which an eighth's worth is not asked
    program = partial(_features._accumulate, everywhere=everywhere)
    assert product_flops(program, *given) == 2 * pairs * block * D**2 + lean
    compiled = _features._accumulate.lower(*given, everywhere).compile()
    memory = compiled.memory_analysis()
    sums = 8 * pairs * D**2 / 8
    small = 4 * L * block * D + 16 * pairs * D + 8 * L * D
    assert memory.argument_size_in_bytes <= sums + 1.05 * small
    assert memory.alias_size_in_bytes >= sums  # the sums are added to where they are
    assert memory.temp_size_in_bytes <= 4 * L * block * D * 4 + 8 * 8 * D**2
    # Of every pair's product a device makes its rows alone.
    text = compiled.as_text()
    assert f"f32[{D // 8},{D}]" in text and f"f32[{D},{D}]" not in text
    # A block is whole on every device, and nothing is sent.
    assert not collectives(text)


@pytest.mark.parametrize("count", SAMPLES)
def test_what_a_form_says_it_costs(count):
    """`choose_form`'s figures are the formulas of these programs."""
    costs = {
        name: choose_form(count, D, L, memory=math.inf, asked=name)
        for name in ("resident", "tiled", "features", "streamed")
    }
    assert costs["resident"].flops == gram_once(count, ROWS)
    assert costs["tiled"].flops == gram_once(count, ROWS) - L * count**2 * D
    pairs = L * (L + 1) // 2
    assert costs["streamed"].flops == costs["features"].flops == 2 * pairs * count * D**2
    shared = choose_form(count, D, L, memory=math.inf, asked="streamed", devices=8)
    assert shared.memory == pytest.approx(pairs * D**2 + 8 * L * min(1024, count) * D)
    assert np.isclose(costs["streamed"].memory, 8 * pairs * D**2 + 8 * L * min(1024, count) * D)
