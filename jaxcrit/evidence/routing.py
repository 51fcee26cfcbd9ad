"""One pass over rows with responses, forward and backward, for what looks at a mixture's routers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.data.batches import Budget, Shape, make_batches, response_mask
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import response_losses
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.mixture import used
from jaxcrit.models.model import Model
from jaxcrit.models.sites import Edit, Site, Tap
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.step import place

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """What N rows say of the routers of L layers of E experts.

    Attributes:
        samples: ``[N, L]`` float64, norm of the gradient of each row's mean response loss by the logarithms of the
            shares at its last prompt token.
        load: ``[L, E]`` float64, part of the tokens of the rows that go to each expert.
    """

    samples: np.ndarray
    load: np.ndarray


def routed(
    model: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    budget: Budget | int,
    *,
    precision: str = "highest",
    progress: Progress | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Routed:
    """Runs the rows forward and backward once; arguments as of `jaxcrit.evidence.backward.response_gradients`.

    The gradient of a batch's summed loss by an offset of each row's own logits is each row's own gradient.
    """
    config, count, done = model.config, len(examples), 0
    samples, total, tokens = np.zeros((count, config.num_layers)), np.zeros((config.num_layers, config.experts)), 0
    last = np.array([example.prompt_length - 1 for example in examples] + [0], np.int32)
    for batch in make_batches(examples, budget, shapes, prompt_only=False, max_length=config.max_length):
        real = batch.rows < count
        rows = place(TokenBatch(batch.tokens, batch.lengths, response_mask(batch, examples)), model.mesh)
        at = last[np.minimum(batch.rows, count)]
        with jax.default_matmul_precision(precision):
            norms, counts = processes.whole(_routed(decoder, rows, at, np.where(real, batch.lengths, 0), model.mesh))
        samples[batch.rows[real]] = norms[real]
        total, tokens = total + counts, tokens + int(batch.lengths[real].sum())
        done += int(real.sum())
        if progress is not None:
            progress(done, count)
    return Routed(samples, total / tokens)


def _offset(
    site: Site, before: jax.Array, after: jax.Array, data: tuple[jax.Array, ...], positions: jax.Array
) -> jax.Array:
    """Shares whose logits are moved at one token of each row; by an offset of 0, the router's own."""
    offset, last = data
    return jnp.where((positions == last[:, None])[..., None], jax.nn.softmax(before + offset[:, None]), after)


_OFFSET = Edit(_offset, ("router",))


@functools.partial(jax.jit, static_argnames="mesh")
def _routed(
    decoder: Decoder, batch: TokenBatch, last: jax.Array, real: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Norms ``[B, L]``, and the tokens that go to each expert ``[L, E]``; ``real`` ``[B]`` are lengths, fillers' 0."""
    config, (rows, length) = decoder.config, batch.tokens.shape
    inside = jnp.arange(length) < real[:, None]
    tap = Tap(functools.partial(used, inside=inside, config=config), ("router",))
    layers = jnp.broadcast_to(last, (config.num_layers, rows))

    def loss(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        how = {"edit": _OFFSET, "edits": (offset, layers), "tap": tap, "remat": True, "mesh": mesh}
        out = forward(decoder, batch.tokens, lengths=batch.lengths, **how)  # type: ignore[arg-type]
        head = decoder.embed if decoder.head is None else decoder.head
        given = (out.hidden, decoder.norm[...], head[...], batch.tokens, batch.learn)
        losses, counted = response_losses(*given, config, mesh, batch.scored)
        each = losses.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)
        return each.sum(), out.taps["router"][0]

    gradient, counts = jax.grad(loss, has_aux=True)(jnp.zeros((config.num_layers, rows, config.experts), jnp.float32))
    return jnp.linalg.norm(gradient, axis=-1).T, counts
