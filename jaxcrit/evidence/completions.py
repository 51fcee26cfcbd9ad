"""What a model makes of prompts and targets: how probable each target is, and whether the model itself would say it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.core.progress import bar
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.model import Bars, Model
from jaxcrit.parallel.mesh import batch_sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Completions:
    """Of N prompts with their targets.

    Attributes:
        log_p: ``[N]`` float64, log-probability of the whole target.
        first_p: ``[N]`` float64, probability of its first token.
        right: ``[N]`` bool, whether every token of the target is the model's greedy one, given those before it: then
            greedy decoding says the target.
        said: ``[N]`` int, the greedy token behind the prompt.
    """

    log_p: np.ndarray
    first_p: np.ndarray
    right: np.ndarray
    said: np.ndarray


def completions(
    model: Model, decoder: Decoder, examples: Sequence[Example], batch_size: int, bars: Bars | None = None
) -> Completions:
    """Runs prompts with their targets forward.

    Args:
        model: mesh and context.
        decoder: weights that complete.
        examples: N prompts, each with a target of at least one token.
        batch_size: rows per pass; rounded up to what divides over the mesh.
        bars: maker of progress bars.

    Raises:
        UserError: a row is longer than the context.
    """
    count = len(examples)
    log_p, right, said = np.zeros(count), np.zeros(count, bool), np.zeros(count, int)
    first_p = np.zeros(count)
    prompts = np.array([example.prompt_length for example in examples] + [1], np.int32)
    most = max(len(example.token_ids) - example.prompt_length for example in examples)
    budget = model.budget(min(batch_size, count))
    with bar(bars, total=count, desc="completions", unit=" prompts") as shown:
        for batch in make_batches(examples, budget, prompt_only=False, max_length=model.config.max_length):
            given = (batch.tokens, batch.lengths, prompts[batch.rows])
            placed = jax.device_put(given, batch_sharding(model.mesh))
            with jax.default_matmul_precision("highest"):
                found = processes.whole(_complete(decoder, *placed, most=most, mesh=model.mesh))
            real = batch.rows < count
            rows = batch.rows[real]
            log_p[rows], first_p[rows], right[rows], said[rows] = (part[real] for part in found)
            shown.update(int(real.sum()))
    return Completions(log_p, first_p, right, said)


@functools.partial(jax.jit, static_argnames=("most", "mesh"))
def _complete(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, prompts: jax.Array, *, most: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The fields of `Completions` of a batch; ``most`` is the number of tokens of the longest target."""
    behind = prompts[:, None] + jnp.arange(most)  # places of the target's tokens, [B, M]
    inside, behind = behind < lengths[:, None], jnp.minimum(behind, tokens.shape[1] - 1)
    hidden = forward(decoder, tokens, lengths=lengths, mesh=mesh).hidden
    scores = logits(decoder, jnp.take_along_axis(hidden, behind[..., None] - 1, axis=1)).astype(jnp.float32)
    targets = jnp.take_along_axis(tokens, behind, axis=1)
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    log_p, greedy = picked - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1)
    right = ((greedy == targets) | ~inside).all(axis=1)
    return jnp.where(inside, log_p, 0).sum(axis=1), jnp.exp(log_p[:, 0]), right, greedy[:, 0]
