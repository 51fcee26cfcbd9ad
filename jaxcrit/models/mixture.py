"""Mixtures of experts: which experts a token goes to, what they give it, and taps and edits of the router.

A router's logits ``[..., E]`` become shares, their softmax over all experts in float32; the ``experts_per_token``
largest are kept (of equal ones those of lower number), and made to sum to 1 where ``norm_topk``. An MLP then gives
``sum_e share_e down_e(act(gate_e x) * up_e x)`` over the kept ones (Shazeer et al., arXiv:1701.06538). Gradients go
through the shares; which of them are kept is a constant.

To read what routers say::

    out = forward(decoder, tokens, lengths=lengths, tap=ROUTING)
    out.taps["router"]  # Routing of [L, B, T, E]

To put shares in their place, in some layers and at some tokens, in `jaxcrit.models.decoder.forward`, ``run`` and
``run_span`` (``edit=OVERRIDE, edits=data``) and, with a gradient, in `jaxcrit.training.forward.hidden_states`
(``edit=(OVERRIDE, data)``)::

    data = Override(shares, on, begin, end)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcrit.models.attention import Attention
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.sites import Edit, Site, Tap
from jaxcrit.parallel.mesh import RULES, row_parts

Experts = tuple[jax.Array, jax.Array, jax.Array]
Act = Callable[[jax.Array], jax.Array]
_PLAIN = jax.lax.Precision.DEFAULT
_SMALL = 2**24  # tokens times weights of a projection; below, all experts take less time than the others to compile
_BLOCK = 8, 32  # fewest and most pairs of a block; as many as an expert has on average between


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the routers of a pass say.

    Attributes:
        logits: ``[L, B, T, E]`` float32.
        shares: their softmax over all experts, or what an edit put in its place; the largest of each token are used.
    """

    logits: jax.Array
    shares: jax.Array


def _read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> Routing:
    return Routing(before, after)


ROUTING = Tap(_read, ("router",))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Override:
    """Shares that take the place of the router's own; data of `OVERRIDE`, so that a change of them compiles nothing.

    Attributes:
        shares: ``[L, B, E]`` float32, of all experts, before the largest are kept; for logits u their softmax. They can
            be differentiated.
        on: ``[L]`` bool, in which layers.
        begin: ``[L, B]`` int32, the first position of a row at which they act: that of its last prompt token.
        end: ``[L, B]`` int32, the position behind the last one: ``begin + 1`` for the last prompt token alone, a number
            larger than any position for it and every new token.
    """

    shares: jax.Array
    on: jax.Array
    begin: jax.Array
    end: jax.Array


def _override(site: Site, before: jax.Array, after: jax.Array, data: Override, positions: jax.Array) -> jax.Array:
    inside = (positions >= data.begin[:, None]) & (positions < data.end[:, None])
    return jnp.where(data.on & inside[..., None], data.shares[:, None, :], after)


OVERRIDE = Edit(_override, ("router",))


def kept_shares(shares: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens go to ``[..., K]`` int32, and the weights of what these give ``[..., K]``.

    Args:
        shares: ``[..., E]``.
        config: config of the model.
    """
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(shares), config.experts_per_token)
    weights = jnp.take_along_axis(shares, chosen, axis=-1)
    return chosen, weights / weights.sum(-1, keepdims=True) if config.norm_topk else weights


def used(
    site: Site, before: jax.Array, after: jax.Array, positions: jax.Array, *, inside: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Of one layer's experts ``[E]`` float32: how many real tokens go to each, and the sum of their shares of it.

    A tap at ``router``; ``inside`` ``[B, T]`` bool are the real tokens.
    """
    chosen, _ = kept_shares(after, config)
    counts = jnp.sum(jax.nn.one_hot(chosen, config.experts) * inside[..., None, None], axis=(0, 1, 2))
    return counts, jnp.sum(jnp.where(inside[..., None], after, 0), axis=(0, 1))


def balance(counts: jax.Array, shares: jax.Array, tokens: jax.Array) -> jax.Array:
    """The balance loss of Switch (arXiv:2101.03961, equations 4 to 6) over all layers at once, as transformers has it.

    E times the sum over experts of the part of tokens that go to it times its mean share; experts_per_token where all
    are alike.

    Args:
        counts: ``[L, E]``, see `used`; no gradient goes through them.
        shares: ``[L, E]``.
        tokens: how many.
    """
    rows = len(counts) * tokens
    return counts.shape[1] * jnp.sum((jnp.sum(counts, axis=0) / rows) * (jnp.sum(shares, axis=0) / rows))


def give(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    experts: Experts,
    act: Act,
    how: Attention,
) -> jax.Array:
    """What the chosen experts give their tokens, ``[B, T, D]``.

    But for small passes, the chosen pairs of a token and an expert are computed and no other: in blocks of one expert's
    pairs on CPUs, where these take less time than all experts for all tokens and XLA's grouped product takes more
    (benchmarks/expert_dispatch.py); by that grouped product elsewhere. On a mesh each device does so for its own rows.

    Args:
        x: ``[B, T, D]``.
        chosen: ``[B, T, K]`` int32.
        weights: ``[B, T, K]``.
        experts: gate, up ``[E, F, D]`` and down ``[E, D, F]``.
        act: activation.
        how: platform and mesh of the model.
    """

    def flat(x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
        form = by_blocks if how.platform == "cpu" else by_groups
        if math.prod(x.shape[:2]) * experts[0].size < _SMALL:
            form = by_all
        rows, to, shares = (part.reshape(-1, part.shape[-1]) for part in (x, chosen, weights))
        return form(rows, to, shares, experts, act).reshape(x.shape)

    mesh = how.mesh
    if mesh is None or mesh.size == 1 or len(x) % row_parts(mesh):
        return flat(x, chosen, weights, experts)
    rows, inner = PartitionSpec(RULES["batch"]), RULES["ff"]
    wide, narrow = PartitionSpec(None, inner, None), PartitionSpec(None, None, inner)

    def own(*given: Any) -> jax.Array:
        return jax.lax.psum(flat(*given), inner)

    places = (rows, rows, rows, (wide, wide, narrow))
    return jax.shard_map(own, mesh=mesh, in_specs=places, out_specs=rows, check_vma=False)(x, chosen, weights, experts)


def by_all(x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts, act: Act) -> jax.Array:
    """Every expert of every token, weighed: the plain form, by which the others are checked; ``[N, D]``."""
    gate, up, down = experts
    at = chosen[..., None] == jnp.arange(len(gate))
    of_each = jnp.sum(jnp.where(at, weights[..., None], 0), axis=-2)
    inner = act(jnp.einsum("nd,efd->nef", x, gate)) * jnp.einsum("nd,efd->nef", x, up)
    return jnp.einsum("nef,edf->nd", inner * of_each[..., None], down)


def by_groups(x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts, act: Act) -> jax.Array:
    """Pairs in the order of their experts, by XLA's grouped product; ``[N, D]``."""
    gate, up, down = (part.swapaxes(1, 2) for part in experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    load = jnp.bincount(chosen.reshape(-1), length=len(gate))
    rows = order // chosen.shape[-1]
    mine = x[rows]
    # A precision asked for by name is of float32; TPUs' grouped product refuses bfloat16 with one (libtpu 0.0.50).
    product = functools.partial(jax.lax.ragged_dot, precision=None if x.dtype == jnp.float32 else _PLAIN)
    inner = act(product(mine, gate, load)) * product(mine, up, load)
    given = product(inner, down, load) * weights.reshape(-1)[order, None]
    return jnp.zeros_like(x).at[rows].add(given)


def by_blocks(x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts, act: Act) -> jax.Array:
    """Pairs in the order of their experts, in blocks of one expert each, filled up with zeros; ``[N, D]``."""
    gate, up, down = experts
    (rows, each), count = chosen.shape, len(gate)
    pairs = rows * each
    size = min(max(pairs // count, _BLOCK[0]), _BLOCK[1])
    blocks = (pairs + min(count, pairs) * (size - 1)) // size  # the most that any routing needs
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    load = jnp.bincount(expert, length=count)
    filled = -(-load // size) * size
    ends = jnp.cumsum(filled)
    place = (ends - filled - jnp.cumsum(load) + load)[expert[order]] + jnp.arange(pairs)
    pair = jnp.full(blocks * size, pairs, order.dtype).at[place].set(order)
    of = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks) * size, side="right"), count - 1)
    mine = jnp.concatenate([x, jnp.zeros_like(x[:1])])[pair // each].reshape(blocks, size, -1)
    inner = act(_product(mine, gate, of)) * _product(mine, up, of)
    given = _product(inner, down, of).reshape(blocks * size, -1)
    back = jnp.zeros_like(order).at[order].set(place.astype(order.dtype))
    return jnp.sum((given[back] * weights.reshape(-1, 1)).reshape(rows, each, -1), axis=1)


@jax.custom_vjp
def _product(x: jax.Array, matrices: jax.Array, of: jax.Array) -> jax.Array:
    """Each block ``[n, size, in]`` by its own of the matrices ``[E, out, in]``."""
    return jax.lax.map(lambda block: block[0] @ matrices[block[1]].T, (x, of))


def _product_forward(x: jax.Array, matrices: jax.Array, of: jax.Array) -> Any:
    return _product(x, matrices, of), (x, matrices, of)


def _product_backward(kept: Any, after: jax.Array) -> Any:
    """Adds each block's gradient to its own matrix in place; jax's rule would add all matrices for every block."""
    x, matrices, of = kept
    before = jax.lax.map(lambda block: block[0] @ matrices[block[1]], (after, of))

    def add(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return total.at[block[2]].add(block[1].T @ block[0]), None

    return before, jax.lax.scan(add, jnp.zeros_like(matrices), (x, after, of))[0], None


_product.defvjp(_product_forward, _product_backward)
