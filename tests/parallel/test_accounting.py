"""Costs read off programs, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.parallel.accounting import collectives, product_flops, shard_bytes
from jaxcrit.parallel.mesh import abstract_mesh, make_mesh


def test_products_of_loops_and_branches():
    def function(a, b):
        a = jax.lax.fori_loop(0, 7, lambda _, a: a @ b, a)
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ b @ b, lambda a: a @ b, a)

    assert product_flops(function, jnp.ones((3, 5)), jnp.ones((5, 5))) == (7 + 2) * 2 * 3 * 5 * 5


def test_products_of_a_loop_whose_end_is_data():
    def function(a, b, stop):
        return jax.lax.fori_loop(0, stop, lambda _, a: a @ b, a)

    assert product_flops(function, jnp.ones((3, 5)), jnp.ones((5, 5)), jnp.int32(9), turns=9) == 9 * 2 * 3 * 5 * 5


def test_bytes_of_a_device_by_its_shards():
    mesh = abstract_mesh({"fsdp": 4, "tensor": 2}, 8)
    like = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    assert shard_bytes({"a": like, "b": jax.ShapeDtypeStruct((3,), jnp.float32)}) == 2 * 3 * 2 + 12


@pytest.mark.parametrize("known", [True, False])
def test_collectives_in_a_loop_count_every_turn(known):
    """Five turns, each gathering a [16, 8] float32 product from the devices; where the end is data, we say how many."""
    mesh = make_mesh({"tensor": 8})
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())

    def function(x, w, stop):
        def body(_, x):
            x = jax.lax.with_sharding_constraint(x @ w, split)
            return jax.lax.with_sharding_constraint(x, whole)

        return jax.lax.fori_loop(0, 5 if known else stop, body, x)

    x = jax.device_put(np.ones((16, 8), np.float32), whole)
    w = jax.device_put(np.ones((8, 8), np.float32), split)
    program = jax.jit(function).lower(x, w, np.int32(5)).compile().as_text()
    found = collectives(program, turns=1 if known else 5)
    assert found == {"all-gather": (5, 5 * 16 * 8 * 4)}
