"""Next-token loss of the response alone, per token, per sample, and in the two averages in use.

Token-weighted: all response tokens count alike (what a step minimises). Mean of means: all samples count alike,
each by the mean over its response (how the paper reports test loss).

The head is most of a small model. So it runs where a token of a response is predicted and nowhere else: `at_responses`
packs those positions, runs the head on them, and puts what is read of the logits back in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import rms_norm, shaped
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding, device_memory, row_parts, spec_for

# Logits of one chunk on a device, in float32, and as much again for their gradient: all of them outgrow the model. More
# than one chunk are computed twice where a gradient is taken, so chunks are as large as an eighth of the memory allows.
_CHUNK_ELEMENTS = 2**26
_MEMORY_PARTS = 8 * 2 * 4

# logits [B, P, V] float32 of a chunk and targets [B, P] -> float32 arrays [B, P]
Read = Callable[[jax.Array, jax.Array], Any]


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


def nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of each target ``[B, P]`` under logits ``[B, P, V]``."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def response_loss(
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    learn: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
    scored: int | None = None,
) -> LossSums:
    """Sums of the loss over the tokens marked in ``learn``; arguments as of `at_responses`."""
    return sums_of(*response_losses(hidden, norm, head, tokens, learn, config, mesh, scored))


def sums_of(losses: jax.Array, counted: jax.Array) -> LossSums:
    """Sums of what `response_losses` gives."""
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
    scored: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same token by token: ``[B, T]`` losses, 0 where nothing is to be predicted, and ``[B, T]`` 1 where it is."""
    return at_responses(nats, hidden, norm, head, tokens, learn, config, mesh, scored)


def response_exact(
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    learn: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
    scored: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, and ``[B]`` bool, whether greedy decoding would give a row's response; False for a row without one.

    Greedy decoding gives a text exactly where, fed that text, each token is the likeliest after those before it (ties
    aside). So one forward pass stands for prefill and decode, and tells of this spelling of the text in tokens.
    """

    def read(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nats(logits, targets), (jnp.argmax(logits, axis=-1) != targets).astype(jnp.float32)

    (losses, wrong), counted = at_responses(read, hidden, norm, head, tokens, learn, config, mesh, scored)
    return losses, counted, (wrong.sum(axis=1) == 0) & (counted.sum(axis=1) > 0)


def at_responses(
    read: Read,
    hidden: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    learn: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None = None,
    scored: int | None = None,
) -> tuple[Any, jax.Array]:
    """Reads the logits that predict the tokens marked in ``learn``, each from the position before it.

    Args:
        read: function of logits and targets of some positions, such as `nats`.
        hidden: ``[B, T, D]`` residual stream after the last block.
        norm: ``[D]``.
        head: ``[V, D]``.
        tokens: ``[B, T]`` int32.
        learn: ``[B, T]`` bool, tokens of the response; the first of a row has nothing before it and never counts.
        config: config of the model that norm and head are of.
        mesh: that everything is split over.
        scored: positions that the head runs on, for the rows of each part of the mesh, at least `most_scored`; None
            for all. Where they are too few, what is read is NaN.

    Returns:
        What ``read`` gives, as ``[B, T]``, 0 where nothing is to be predicted; and ``[B, T]`` float32, 1 where it is.
        Place t stands for the prediction of token t+1.
    """
    counted = jnp.roll(learn, -1, axis=1).at[:, -1].set(False)
    parts = 1 if mesh is None else row_parts(mesh)

    def flat(array: jax.Array) -> jax.Array:  # rows of a part of the mesh one behind the other: packed without traffic
        array = array.reshape(parts, -1, *array.shape[2:])
        return array if mesh is None else jax.lax.with_sharding_constraint(array, batch_sharding(mesh))

    with jax.named_scope("loss"):
        marked = flat(counted)
        places = jnp.argsort(~marked, axis=1, stable=True)[:, :scored]
        packed = jax.vmap(lambda array, at: array[at])
        states, targets = (packed(flat(array), places) for array in (hidden, jnp.roll(tokens, -1, axis=1)))
        found = _through_head(read, states, targets, norm, head, config, mesh)
        back = jnp.cumsum(marked, axis=1) - 1

        def unpacked(values: jax.Array) -> jax.Array:
            whole = jax.vmap(lambda values, at: values.at[at].get(mode="fill", fill_value=jnp.nan))(values, back)
            return jnp.where(marked, whole, 0).reshape(tokens.shape)

        return jax.tree.map(unpacked, found), counted.astype(jnp.float32)


def most_scored(learn: np.ndarray, mesh: AnyMesh | None = None) -> int:
    """Tokens to be predicted in the rows of a part of the mesh, in the part that has most.

    Args:
        learn: ``[..., B, T]`` bool, see `at_responses`.
        mesh: that rows are split over.
    """
    parts = 1 if mesh is None else row_parts(mesh)
    return max(1, int(learn[..., 1:].sum(axis=-1).reshape(-1, learn.shape[-2] // parts).sum(axis=1).max()))


def rounded_scored(learn: np.ndarray, mesh: AnyMesh | None = None) -> int:
    """The same rounded up to a quarter of all positions, so that many batches of a shape are a few compiles."""
    parts = 1 if mesh is None else row_parts(mesh)
    quarter = -(-learn.shape[-2] * learn.shape[-1] // (4 * parts))
    return -(-most_scored(learn, mesh) // quarter) * quarter


def _through_head(
    read: Read,
    hidden: jax.Array,
    targets: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    config: ModelConfig,
    mesh: AnyMesh | None,
) -> Any:
    """What is read of the logits of ``[B, P, D]`` under final norm and head, in float32, a chunk of P at a time."""
    batch, length, _ = hidden.shape
    devices = 1 if mesh is None else mesh.size
    if mesh is not None:
        # Here once: within the loop its parts would come over the links for every chunk.
        spec = spec_for(("vocab", None), head.shape, mesh, "head")
        head = jax.lax.with_sharding_constraint(head.astype(hidden.dtype), NamedSharding(mesh, spec))
    most = max(1, _chunk_elements(mesh) * devices // (batch * head.shape[0]))
    chunks = -(-length // most)
    chunk = -(-length // chunks)

    def through(hidden: jax.Array, targets: jax.Array) -> Any:
        normed = rms_norm(hidden, norm, config)
        logits = jnp.einsum("btd,vd->btv", normed, head.astype(normed.dtype), preferred_element_type=jnp.float32)
        return read(shaped(logits, config), targets)

    if chunks == 1:
        return through(hidden, targets)

    def cut(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(filled.reshape(batch, chunks, chunk, *array.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda part: through(*part)), (cut(hidden), cut(targets)))
    return jax.tree.map(lambda values: jnp.moveaxis(values, 0, 1).reshape(batch, -1)[:, :length], found)


def _chunk_elements(mesh: AnyMesh | None) -> int:
    """Logits of one chunk on a device; of devices that are not here the most there may be."""
    if mesh is not None and not (isinstance(mesh, Mesh) and mesh.devices.flat[0] in jax.devices()):
        return _CHUNK_ELEMENTS
    return min(_CHUNK_ELEMENTS, int(device_memory(jax.local_devices())) // _MEMORY_PARTS)


@jax.jit
def divergence(scores: jax.Array, other: jax.Array) -> jax.Array:
    """KL(softmax(scores) || softmax(other)) in nats: ``[..., V]`` both, ``[...]``."""
    log_p, log_q = jax.nn.log_softmax(scores), jax.nn.log_softmax(other)
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0)  # rounding may take it below
