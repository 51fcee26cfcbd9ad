"""Next-token loss of the response alone, per token, per sample, and in the two averages in use.

Token-weighted: all response tokens count alike (what a step minimises). Mean of means: all samples count alike,
each by the mean over its response (how the paper reports test loss).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import rms_norm, shaped
from jaxcrit.parallel.mesh import AnyMesh, spec_for

# Logits of one chunk on a device, in float32, and as much again for their gradient: all of them outgrow the model.
_CHUNK_ELEMENTS = 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums that add up over batches; scalars, float32.

    Attributes:
        loss: summed over response tokens.
        tokens: how many.
        means: each sample's mean loss, summed.
        samples: how many samples have a response.
    """

    loss: jax.Array
    tokens: jax.Array
    means: jax.Array
    samples: jax.Array

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)

    @property
    def per_token(self) -> jax.Array:
        """Token-weighted loss, in nats."""
        return self.loss / self.tokens

    @property
    def per_sample(self) -> jax.Array:
        """Mean of means, in nats."""
        return self.means / self.samples


def token_losses(
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
) -> jax.Array:
    """Cross entropy of each target under final norm and head, in float32, a chunk of positions at a time.

    Args:
        hidden: ``[B, T, D]`` residual stream after the last block.
        norm: ``[D]``.
        head: ``[V, D]``.
        targets: ``[B, T]`` int32.
        config: config of the model that norm and head are of.
        mesh: that everything is split over.

    Returns:
        ``[B, T]`` float32, in nats.
    """
    batch, length, width = hidden.shape
    devices = 1 if mesh is None else mesh.size
    if mesh is not None:
        # Here once: within the loop its parts would come over the links for every chunk.
        spec = spec_for(("vocab", None), head.shape, mesh, "head")
        head = jax.lax.with_sharding_constraint(head.astype(hidden.dtype), NamedSharding(mesh, spec))
    most = max(1, _CHUNK_ELEMENTS * devices // (batch * head.shape[0]))
    chunk = max(size for size in range(1, length + 1) if length % size == 0 and size <= most)

    def losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        normed = rms_norm(hidden, norm, config)
        logits = jnp.einsum("btd,vd->btv", normed, head.astype(normed.dtype), preferred_element_type=jnp.float32)
        logits = shaped(logits, config)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    with jax.named_scope("loss"):
        if chunk == length:
            return losses(hidden, targets)
        parts = length // chunk
        cut = (hidden.reshape(batch, parts, chunk, width), targets.reshape(batch, parts, chunk))
        swapped = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), cut)
        found = jax.lax.map(jax.checkpoint(lambda part: losses(*part)), swapped)
        return jnp.moveaxis(found, 0, 1).reshape(batch, length)


def response_loss(
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    learn: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
) -> LossSums:
    """Sums of the loss over the tokens marked in ``learn``, each predicted from the position before it.

    Args:
        hidden: ``[B, T, D]`` residual stream after the last block.
        norm: ``[D]``.
        head: ``[V, D]``.
        tokens: ``[B, T]`` int32.
        learn: ``[B, T]`` bool, tokens of the response; the first of a row has nothing before it and never counts.
        config: config of the model that norm and head are of.
        mesh: that everything is split over.
    """
    losses, counted = response_losses(hidden, norm, head, tokens, learn, config, mesh)
    count = counted.sum(axis=1)
    has = (count > 0).astype(jnp.float32)
    return LossSums(losses.sum(), count.sum(), (losses.sum(axis=1) / jnp.maximum(count, 1)).sum(), has.sum())


def response_losses(
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    learn: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same token by token: ``[B, T]`` losses, 0 where nothing is to be predicted, and ``[B, T]`` 1 where it is.

    Place t stands for the prediction of token t+1. Arguments as of `response_loss`.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    counted = jnp.roll(learn, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)
    return token_losses(hidden, norm, head, targets, config, mesh) * counted, counted


@jax.jit
def divergence(scores: jax.Array, other: jax.Array) -> jax.Array:
    """KL(softmax(scores) || softmax(other)) in nats: ``[..., V]`` both, ``[...]``."""
    log_p, log_q = jax.nn.log_softmax(scores), jax.nn.log_softmax(other)
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0)  # rounding may take it below
