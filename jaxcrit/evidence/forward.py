"""One forward pass over prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.criteria.block_influence import influence
from jaxcrit.criteria.lens_kl import divergence
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evidence.criterion import States
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding

Progress = Callable[[int, int], None]


def prompt_states(
    session: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    batch_size: int,
    *,
    lens: bool,
    precision: str = "highest",
    progress: Progress | None = None,
) -> States:
    """Runs the prompts forward once.

    Args:
        session: of the model.
        decoder: its weights.
        examples: N rendered rows; their responses are left out.
        batch_size: prompts per pass.
        lens: read every layer with final norm and head too, which costs L heads.
        precision: of matrix products.
        progress: called with (prompts done, prompts in all).
    """
    config, count = session.config, len(examples)
    hidden = np.zeros((config.num_layers + 1, count, config.width), np.float32)
    turned, read, tokens = np.zeros((count, config.num_layers)), np.zeros((count, config.num_layers)), np.zeros(count)
    done = 0
    for batch in make_batches(examples, batch_size, max_length=config.max_length):
        placed = jax.device_put((batch.tokens, batch.lengths), batch_sharding(session.mesh))
        with jax.default_matmul_precision(precision):
            states, summed, kl = processes.whole(_states(decoder, *placed, lens=lens, mesh=session.mesh))
        real = batch.rows < count
        rows = batch.rows[real]
        hidden[:, rows], turned[rows], read[rows] = states[:, real], summed.T[real], kl.T[real]
        tokens[rows] = batch.lengths[real]
        done += len(rows)
        if progress is not None:
            progress(done, count)
    return States(hidden, turned, tokens.astype(int), read if lens else None)


@functools.partial(jax.jit, static_argnames=("lens", "mesh"))
def _states(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, *, lens: bool, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Last states ``[L+1, B, D]``, `influence` summed over the tokens and KL of the lens ``[L, B]`` each."""
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]

    def last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0].astype(jnp.float32)

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> Any:
        if site == "embed":
            return last(after)
        return last(after), jnp.sum(jnp.where(inside, influence(before, after), 0), axis=1)

    taps = forward(decoder, tokens, lengths=lengths, tap=Tap(read, ("embed", "block")), mesh=mesh).taps
    states, turned = taps["block"]
    kl = divergence(decoder, states) if lens else jnp.zeros_like(turned)
    return jnp.concatenate([taps["embed"][None], states]), turned, kl
