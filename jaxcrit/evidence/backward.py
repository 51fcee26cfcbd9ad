"""One backward pass over rows with responses, for every criterion that looks at gradients."""

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
from jaxcrit.evaluation.losses import rounded_scored
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Model
from jaxcrit.models.partition import FROZEN, TRAIN, Arrays, Bank, Partition, partition
from jaxcrit.training.objectives import TokenBatch, batch_loss
from jaxcrit.training.step import place

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Gradients:
    """Of one backward pass over N rows, by the blocks' weights; embeddings, final norm and head are held fixed.

    Attributes:
        total: ``[L]`` float64, norm of the gradient of the loss per response token over all rows.
        weights: ``[L]`` float64, norm of the weights.
        sizes: ``[L]`` int, number of weights.
        samples: ``[N, L]`` float64, squared norm of the gradient of each row's ``-log p(response | prompt)``; None
            where not asked for.
    """

    total: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray
    samples: np.ndarray | None


def response_gradients(
    model: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    budget: Budget | int,
    *,
    per_sample: bool,
    precision: str = "highest",
    progress: Progress | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Gradients:
    """Runs the rows forward and backward once.

    Per sample, rows go one by one through a compiled step per width: as many operations, less parallel. Two gradients
    of all blocks are held, float32.

    Args:
        model: model to differentiate.
        decoder: its weights.
        examples: N rendered rows with responses.
        budget: rows per pass, see `make_batches`.
        per_sample: keep each row's squared norm.
        precision: precision of matrix products.
        progress: called with (rows done, rows in all).
        shapes: shapes of batches, for a caller that gives the rows in parts; default those of these rows.
    """
    config, count = model.config, len(examples)
    parts = partition(config, range(config.num_layers))
    weights = decoder.weights()
    blocks = {path: value for path, value in weights.items() if path.startswith("blocks.")}
    rest = {path: value for path, value in weights.items() if path not in blocks}
    total: Arrays = {path: jnp.zeros(value.shape, jnp.float32, device=value.sharding) for path, value in blocks.items()}
    mesh = None if per_sample else model.mesh  # a single row cannot be split
    samples, tokens, done = np.zeros((count, config.num_layers)), 0, 0
    for batch in make_batches(examples, budget, shapes, prompt_only=False, max_length=config.max_length):
        rows = TokenBatch(batch.tokens, batch.lengths, response_mask(batch, examples))
        tokens += int(rows.learn[:, 1:].sum())
        with jax.default_matmul_precision(precision):
            grouped = _grouped(rows, per_sample, model)
            total, squares = _gradients(parts, {TRAIN: blocks, FROZEN: rest}, total, grouped, mesh)
        real = batch.rows < count
        if per_sample:
            samples[batch.rows[real]] = processes.whole(squares)[real]
        done += int(real.sum())
        if progress is not None:
            progress(done, count)
    held = sum(int(np.prod(value.shape[1:])) for value in blocks.values())
    return Gradients(
        np.sqrt(np.asarray(processes.whole(_squares(total)), np.float64)) / tokens,
        np.sqrt(np.asarray(processes.whole(_squares(blocks)), np.float64)),
        np.full(config.num_layers, held),
        samples if per_sample else None,
    )


def _grouped(rows: TokenBatch, per_sample: bool, model: Model) -> TokenBatch:
    """``[groups, rows of a group, T]``; rows of a group are split over the mesh."""
    size = 1 if per_sample else len(rows.tokens)
    cut = jax.tree.map(lambda part: part.reshape(-1, size, *part.shape[1:]), rows)
    return dataclasses.replace(cut, scored=rounded_scored(cut.learn)) if per_sample else place(cut, model.mesh)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _gradients(
    parts: Partition, bank: Bank, total: Arrays, batch: TokenBatch, mesh: Mesh | None
) -> tuple[Arrays, jax.Array]:
    """Adds the gradient of the batch's summed loss to ``total``; and the squared norms ``[groups, L]``."""

    def loss(blocks: Arrays, rows: TokenBatch) -> jax.Array:
        given = {TRAIN: blocks, FROZEN: bank[FROZEN]}
        return batch_loss(parts, given, rows, dtype=bank[FROZEN]["embed"].dtype, mesh=mesh).loss

    def add(total: Arrays, rows: TokenBatch) -> tuple[Arrays, jax.Array]:
        gradient = jax.grad(loss)(bank[TRAIN], rows)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient), _squares(gradient)

    return jax.lax.scan(add, total, batch)


@jax.jit
def _squares(blocks: Arrays) -> jax.Array:
    """``[L]`` float32, squares summed over the weights of each layer."""
    each = [jnp.sum(jnp.square(value.astype(jnp.float32)), axis=range(1, value.ndim)) for value in blocks.values()]
    return jnp.sum(jnp.stack(each), axis=0)
