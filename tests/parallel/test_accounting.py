"""Costs read off programs, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.models.mixture import by_groups
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


def test_a_loop_that_counts_in_twos():
    """As the TPU compiler writes a product whose operand is gathered piece by piece: 8 pieces, two a turn."""
    program = """HloModule windowed
%condition (p: (bf16[4,8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="dot"}
  %p = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
%body (q: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two..sunk = u32[]{:T(128)} constant(2)
  %q = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  %x = bf16[4,8]{1,0} get-tuple-element(%q), index=0
  %other = u32[]{:T(128)} add(%j, %one)
  %sent = bf16[4,8]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %again = bf16[4,8]{1,0} collective-permute(%sent), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%j, %two..sunk)
  ROOT %out = (bf16[4,8]{1,0}, /*index=1*/u32[]{:T(128)}) tuple(%again, %next)
}
ENTRY %main (a: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %a = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
  ROOT %w = (bf16[4,8]{1,0}, u32[]{:T(128)}) while(%a), condition=%condition, body=%body
}
"""
    assert collectives(program) == {"collective-permute": (4 * 2, 4 * 2 * 64)}


def test_products_of_experts_are_those_of_the_pairs():
    """Three projections of each token by each expert it goes to; a gradient of everything takes twice as much again."""
    tokens, width, inner, count, each = 64, 16, 24, 8, 2
    chosen = jnp.zeros((tokens, each), jnp.int32)
    experts = (jnp.zeros((count, inner, width)),) * 2 + (jnp.zeros((count, width, inner)),)

    def run(x, weights, experts):
        return jnp.sum(by_groups(x, chosen, weights, experts, jax.nn.silu))

    given = jnp.zeros((tokens, width)), jnp.zeros((tokens, each)), experts
    assert product_flops(run, *given) == 6 * tokens * each * width * inner
    assert product_flops(jax.grad(run, argnums=(0, 1, 2)), *given) == 18 * tokens * each * width * inner
