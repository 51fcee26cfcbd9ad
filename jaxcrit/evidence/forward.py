"""One forward pass over prompts for every criterion that taps it.

A tap is a function ``(before, after, view) -> arrays [B, ...]`` of the residual stream ``[B, T, D]`` in front of a
block and behind it. It runs inside the scan over the blocks, so that nothing else of the stream is kept. The common
taps have names: `last_token`, `mean_token`, `all_tokens`, and `with_embedding`, which puts the embedding in front of
the layers. Criteria that name the same tap share what it gives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.data.batches import Budget, Shape, make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evidence.criterion import Criterion, Own
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding

Progress = Callable[[int, int], None]
_NEVER = 2**30  # place among the samples of what is no sample


@dataclasses.dataclass(frozen=True)
class View:
    """What a tap may look at beside the stream.

    Attributes:
        lengths: ``[B]`` int32, tokens of each prompt.
        inside: ``[B, T]`` bool, which tokens are real.
        places: ``[B, T]`` int32, place of each token among the samples of `all_tokens`.
    """

    lengths: jax.Array
    inside: jax.Array
    places: jax.Array

    def last(self, x: jax.Array) -> jax.Array:
        """Last token of each prompt, ``[B, T, D]`` to ``[B, D]`` float32."""
        return jnp.take_along_axis(x, self.lengths[:, None, None] - 1, axis=1)[:, 0].astype(jnp.float32)

    def sum(self, values: jax.Array) -> jax.Array:
        """Sum over the real tokens, ``[B, T]`` to ``[B]``."""
        return jnp.sum(jnp.where(self.inside, values, 0), axis=1)

    def mean(self, x: jax.Array) -> jax.Array:
        """Mean over the real tokens, ``[B, T, D]`` to ``[B, D]`` float32."""
        return jnp.sum(jnp.where(self.inside[..., None], x.astype(jnp.float32), 0), axis=1) / self.lengths[:, None]


Read = Callable[[jax.Array, jax.Array, View], Any]
Finish = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A tap, and where it reads. Two are equal where their fields are, and are then computed once.

    Attributes:
        read: the function.
        embedding: whether it reads the embedding too, as ``before`` and ``after``; ``[L+1, ...]``, embedding in front.
        tokens: 0 for one sample a prompt. Otherwise ``read`` gives ``[B, T, ...]``, and each token is a sample: the
            first so many of all prompts, prompt by prompt, without the first token of each.
    """

    read: Read
    embedding: bool = False
    tokens: int = 0


def last_token(before: jax.Array, after: jax.Array, view: View) -> jax.Array:
    """State behind the block at the last prompt token, ``[B, D]`` float32."""
    return view.last(after)


def mean_token(before: jax.Array, after: jax.Array, view: View) -> jax.Array:
    """State behind the block, mean over the prompt's tokens, ``[B, D]`` float32."""
    return view.mean(after)


def all_tokens(most: int) -> Reading:
    """State behind the block at every token but each prompt's first; so many tokens at most, in the order of prompts.

    The first token of a prompt attends to itself alone, and in many models carries a state of huge length.
    """
    return Reading(_state, tokens=most)


def _state(before: jax.Array, after: jax.Array, view: View) -> jax.Array:
    return after.astype(jnp.float32)


def with_embedding(tap: Read | Reading) -> Reading:
    """The tap, with what it reads of the embedding in front of the layers."""
    return dataclasses.replace(as_reading(tap), embedding=True)


def as_reading(tap: Read | Reading) -> Reading:
    """The tap as a `Reading`; a bare function reads behind the blocks, once a prompt."""
    return tap if isinstance(tap, Reading) else Reading(tap)


def forward_pass(
    model: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    budget: Budget | int,
    criteria: Mapping[str, Criterion],
    *,
    own: Own | None = None,
    precision: str = "highest",
    progress: Progress | None = None,
    shapes: Sequence[Shape] | None = None,
) -> dict[str, Any]:
    """Runs the prompts forward once, and keeps what the criteria's taps give.

    Args:
        model: model that is run.
        decoder: its weights.
        examples: N rendered rows; their responses are left out.
        budget: prompts per pass, see `make_batches`.
        criteria: criteria that need ``forward``, by key.
        own: options of criteria by their class; defaults where absent.
        precision: precision of matrix products.
        progress: function called with (prompts done, prompts in all).
        shapes: shapes of batches, for a caller that gives the prompts in parts; default those of these prompts.

    Returns:
        By key the samples of the criterion's tap, ``[N, L, ...]`` on the host, in the order of the rows. Criteria with
        the same tap and finish are given the same arrays.
    """
    wanted = {key: (as_reading(one.tapped(own or {})), one.finish) for key, one in criteria.items()}
    pairs, count, done = tuple(dict.fromkeys(wanted.values())), len(examples), 0
    later = np.array([example.prompt_length - 1 for example in examples])
    starts = np.append(np.cumsum(later) - later, _NEVER).astype(np.int32)  # a row that fills up the batch starts last
    sizes = [min(reading.tokens, int(later.sum())) if reading.tokens else count for reading, _ in pairs]
    kept: list[Any] = [None] * len(pairs)
    for batch in make_batches(examples, budget, shapes, max_length=model.config.max_length):
        given = (batch.tokens, batch.lengths, starts[batch.rows])
        placed = jax.device_put(given, batch_sharding(model.mesh))
        with jax.default_matmul_precision(precision):
            found = processes.whole(pass_step(decoder, *placed, pairs=pairs, mesh=model.mesh))
        for number, (values, places) in enumerate(found):
            rows = batch.rows if places is None else places
            kept[number] = _keep(kept[number], values, rows, sizes[number])
        done += int((batch.rows < count).sum())
        if progress is not None:
            progress(done, count)
    return {key: kept[pairs.index(pair)] for key, pair in wanted.items()}


def compiled_passes() -> int:
    """How many programs the pass has compiled to in this process: one per bucket, mesh and set of taps."""
    return pass_step._cache_size()  # type: ignore[attr-defined]


def _keep(kept: Any, values: Any, rows: np.ndarray, size: int) -> Any:
    """Puts a batch's ``[L, B, ...]`` where its rows belong in ``[size, L, ...]``; rows past the end belong nowhere."""
    if kept is None:
        kept = jax.tree.map(lambda one: np.zeros((size, len(one), *one.shape[2:]), one.dtype), values)
    real = rows < size
    for whole, part in zip(jax.tree.leaves(kept), jax.tree.leaves(values), strict=True):
        whole[rows[real]] = part.swapaxes(0, 1)[real]
    return kept


@functools.partial(jax.jit, static_argnames=("pairs", "mesh"))
def pass_step(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    *,
    pairs: tuple[tuple[Reading, Finish | None], ...],
    mesh: Mesh,
) -> list[tuple[Any, jax.Array | None]]:
    """Of each pair what is kept, ``[L, B, ...]``, and for tokens ``[M]`` int32, their places among the samples."""
    at = jnp.arange(tokens.shape[1])
    inside = at < lengths[:, None]
    view = View(lengths, inside, jnp.where(inside & (at > 0), starts[:, None] + at - 1, _NEVER))
    readings = tuple(dict.fromkeys(reading for reading, _ in pairs))
    chosen = {most: _chosen(view, most) for most in {reading.tokens for reading in readings} if most}

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> dict[int, Any]:
        found = {}
        for number, reading in enumerate(readings):
            if site == "block" or reading.embedding:
                found[number] = reading.read(before, after, view)
                if reading.tokens:
                    index = chosen[reading.tokens][0]
                    found[number] = jax.tree.map(lambda x, index=index: _flat(x)[index], found[number])
        return found

    sites: tuple[Site, ...] = ("embed", "block") if any(one.embedding for one in readings) else ("block",)
    taps = forward(decoder, tokens, lengths=lengths, tap=Tap(read, sites), mesh=mesh).taps
    results = []
    for reading, finish in pairs:
        number = readings.index(reading)
        values = taps["block"][number]
        if reading.embedding:
            values = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), taps["embed"][number], values)
        values = values if finish is None else finish(decoder, values)
        results.append((values, chosen[reading.tokens][1] if reading.tokens else None))
    return results


def _chosen(view: View, most: int) -> tuple[jax.Array, jax.Array]:
    """Which tokens of a batch ``[B T]`` are among the first so many of all prompts, and the place of each; ``[M]``."""
    places = view.places.ravel()
    size = min(most, places.size)
    (index,) = jnp.nonzero(places < most, size=size, fill_value=places.size)
    return index, places.at[index].get(mode="fill", fill_value=_NEVER)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])
