"""Passes over prompts whose embeddings are changed a little, for criteria of how far the change is carried."""

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
from jaxcrit.core.errors import UserError, listed
from jaxcrit.data.batches import Budget, Shape, make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.perturbations import (
    find_perturbation,
    norms,
    perturbed_tokens,
    random_perturbation,
    relative_change,
    row_keys,
)
from jaxcrit.evidence.criterion import Criterion, Own
from jaxcrit.models.decoder import Context, Decoder, embed, forward, layer_windows, logits, run
from jaxcrit.models.model import Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for the perturbation that changes most; two that are equal are run once.

    Attributes:
        size: length allowed to each token, in units of the norm of its embedding.
        steps: steps of the ascent.
        own: whether every layer has a search of its own, for what moves its states most. Else there is one for all, for
            what moves the prediction at the last token most.
        seed: seed of the random starts.
    """

    size: float
    steps: int
    own: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The largest gain of each block by itself, for arbitrarily small changes.

    Attributes:
        rounds: rounds of power iteration.
        seed: seed of its starts.
    """

    rounds: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """How far the states of N prompts moved.

    Attributes:
        found: ``[N, L+1]`` float64, ``||h' - h|| / ||h||`` summed over the tokens but the first, under the perturbation
            that was found; the embedding in front.
        random: the same under a random one of the same size.
        tokens: ``[N]`` int, tokens that are summed over.
    """

    found: np.ndarray
    random: np.ndarray
    tokens: np.ndarray


def perturbed_pass(
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
    """Perturbs the prompts as each criterion's tap says. Arguments as of `jaxcrit.evidence.forward.forward_pass`.

    Returns:
        By key, `Moved` of a `Search`, and of `Blocks` the largest gains ``[N, L]`` float64.

    Raises:
        UserError: a prompt of one token, which has none to perturb.
    """
    short = [row for row, one in enumerate(examples, 1) if one.prompt_length < 2]
    if short:
        raise UserError(
            f"{', '.join(criteria)}: expected prompts of two tokens or more, for the first is not perturbed; row"
            f" {listed(short)} has one; leave such rows out"
        )
    asked = {key: one.tapped(own or {}) for key, one in criteria.items()}
    wanted, count, done = list(dict.fromkeys(asked.values())), len(examples), 0
    depth, tokens = model.config.num_layers, np.array([one.prompt_length - 1 for one in examples])
    found: dict[Any, np.ndarray] = {
        one: np.zeros((1, count, depth) if isinstance(one, Blocks) else (2, count, depth + 1)) for one in wanted
    }
    numbers = np.array([int(one.sample_id[:8], 16) for one in examples], np.uint32)
    for batch in make_batches(examples, budget, shapes, max_length=model.config.max_length):
        rows = np.where(batch.rows < count, batch.rows, 0)
        placed = jax.device_put((batch.tokens, batch.lengths, numbers[rows]), batch_sharding(model.mesh))
        real = batch.rows < count
        for one in wanted:
            with jax.default_matmul_precision(precision):
                if isinstance(one, Blocks):
                    made = block_gains(decoder, *placed, one.seed, one.rounds, mesh=model.mesh)[None]
                else:
                    made = jnp.stack(
                        moved(decoder, *placed, one.seed, one.size, steps=one.steps, own=one.own, mesh=model.mesh)
                    )
            found[one][:, batch.rows[real]] = processes.whole(made).swapaxes(1, 2)[:, real]
        done += int(real.sum())
        if progress is not None:
            progress(done, count)

    def evidence(one: Any) -> Any:
        if isinstance(one, Blocks):
            return found[one][0]
        searched, random = found[one] * tokens[:, None]
        return Moved(searched, random, tokens)

    made_of = {one: evidence(one) for one in wanted}
    return {key: made_of[one] for key, one in asked.items()}


@functools.partial(jax.jit, static_argnames=("steps", "own", "mesh"))
def moved(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    numbers: jax.Array,
    seed: jax.Array | int,
    size: jax.Array | float,
    *,
    steps: int,
    own: bool,
    mesh: Mesh | None = None,
    perturbed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Searches for a perturbation, and measures how far it moves the states, and how far a random one does.

    One for all takes ``3 steps + 4`` times the operations of a forward pass: of each step a forward pass, which is
    recomputed, and the gradient of the embedding output alone.

    Args:
        decoder: weights.
        tokens: ``[B, T]`` int32.
        lengths: ``[B]`` int32.
        numbers: ``[B]`` uint32, number of each row, from which its starts are drawn.
        seed: see `Search`.
        size: see `Search`.
        steps: see `Search`.
        own: see `Search`.
        mesh: see `forward`.
        perturbed: ``[B, T]`` bool, tokens that are perturbed and measured; default all real ones but the first.

    Returns:
        Twice ``[L+1, B]`` float32, the mean relative change over the tokens of a row: found, and random.
    """
    where = perturbed_tokens(lengths, tokens.shape[1]) if perturbed is None else perturbed
    keys, x = row_keys(seed, numbers), embed(decoder, tokens)

    def states(offset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        out = forward(decoder, tokens, lengths=lengths, offset=offset, tap=_STATES, remat=True, mesh=mesh)
        last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        read = jax.nn.log_softmax(logits(decoder, last).astype(jnp.float32), axis=-1)
        return jnp.concatenate([out.taps["embed"][None], out.taps["block"]]), read

    clean, answer = states(None)

    def changes(delta: jax.Array) -> jax.Array:
        return relative_change(clean, states(delta)[0], where)

    def search(objective: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        return find_perturbation(objective, x, where, keys, size=size, steps=steps)

    if own:
        layers = jnp.arange(len(clean))
        found = jax.lax.map(lambda layer: search(lambda delta: changes(delta)[layer])[1], layers)
    else:
        found = changes(search(lambda delta: jnp.sum(jnp.exp(answer) * (answer - states(delta)[1]), axis=-1))[0])
    return found, changes(random_perturbation(x, where, keys, size))


@functools.partial(jax.jit, static_argnames="mesh")
def block_gains(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    numbers: jax.Array,
    seed: jax.Array | int,
    rounds: jax.Array | int,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The largest gain of each block: of its derivative, from changes relative to the states in front to those behind.

    Args:
        decoder: weights.
        tokens: ``[B, T]`` int32; the first and what is behind the end are neither perturbed nor measured.
        lengths: ``[B]`` int32.
        numbers: see `moved`.
        seed: see `Blocks`.
        rounds: see `Blocks`.
        mesh: see `forward`.

    Returns:
        ``[L, B]`` float32, the largest singular value.
    """
    where, config = perturbed_tokens(lengths, tokens.shape[1])[..., None], decoder.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    context, windows = Context(positions, *config.rope.cos_sin(positions, lengths)), layer_windows(config)
    x = embed(decoder, tokens).astype(jnp.float32)
    if mesh is not None:
        x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
    drawn = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(row_keys(seed, numbers))

    def block(x: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        layer, window = step
        one = None if window is None else window[None]
        after = run(decoder.blocks, layer[None], x, context, windows=one).hidden
        before, behind = (jnp.where(where, norms(state), 0) for state in (x, after))

        def relative(change: jax.Array) -> jax.Array:
            y = run(decoder.blocks, layer[None], x + change * before, context, windows=one).hidden
            return jnp.where(where, y / jnp.where(behind > 0, behind, 1), 0)

        return after, largest_singular_value(relative, jnp.zeros_like(x), jnp.where(where, drawn, 0), rounds)

    return jax.lax.scan(block, x, (jnp.arange(config.num_layers), windows))[1]


def largest_singular_value(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, start: jax.Array, rounds: jax.Array | int
) -> jax.Array:
    """Of a function's derivative at x, by power iteration, each row by itself; it comes from below.

    Args:
        function: ``[B, ...]`` to ``[B, ...]``, whose rows do not depend on each other.
        x: ``[B, ...]`` float32.
        start: ``[B, ...]`` float32, where the iteration starts; 0 where nothing may change.
        rounds: rounds, each of one derivative forward and one backward.

    Returns:
        ``[B]`` float32.
    """
    _, along = jax.linearize(function, x)
    back = jax.linear_transpose(along, x)

    def length(v: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(v), axis=range(1, v.ndim), keepdims=True))

    def again(_: int, v: jax.Array) -> jax.Array:
        v = back(along(v))[0]
        return v / jnp.maximum(length(v), 1e-30)

    v = jax.lax.fori_loop(0, rounds, again, start / jnp.maximum(length(start), 1e-30))
    return length(along(v)).reshape(-1)


def _read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
    return after


_STATES = Tap(_read, ("embed", "block"))
