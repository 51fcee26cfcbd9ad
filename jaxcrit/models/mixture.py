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

import jax
import jax.numpy as jnp

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.sites import Edit, Site, Tap


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


def of_all(chosen: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    """Weights ``[..., E]`` of all experts, 0 where a token does not go, from those of the chosen ``[..., K]``."""
    at = chosen[..., None] == jnp.arange(count)
    return jnp.sum(jnp.where(at, weights[..., None], 0), axis=-2)
