"""Changing facts in closed form: what ``down`` of a few layers must give at a subject's last token, and no more.

Of each fact, a vector is sought that, added to the stream behind a layer at the subject's last token, makes the model
say the new target (gradient descent on that vector alone). ``down`` is then changed so that the keys of the facts (what
it reads there) give those vectors, and keys of ordinary text give what they gave: least squares, weighted by the second
moment of such keys. ``full`` seeks the whole vector anew at each layer to be edited, of the model edited so far (BLUE,
arXiv 2502.03748); ``spread`` seeks it once at the last layer and gives each layer its part of what is left (MEMIT,
arXiv 2210.07229).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.progress import bar
from jaxcrit.core.remembered import Arrays, remembered
from jaxcrit.core.schema import Array
from jaxcrit.data.facts import GAP, Fact, Placed, placed
from jaxcrit.data.templates import Example
from jaxcrit.models.cache import Cache, LayerCache
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Context, Decoder, Output, embed, layer_windows, logits, run, run_span
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_rows, batch_sharding
from jaxcrit.parallel.preemption import Preempted, notice

SURE = 0.05  # total loss of a fact at which its vector is left as it is
DRIFT, DECAY = 0.0625, 0.5  # weights of what the subject means elsewhere, and of the vector's length
ESSENCE = f"Now {GAP} is a"  # a word in front, for the first position is one on which many models keep huge states
DOWN = "blocks.down"


@dataclasses.dataclass(frozen=True)
class Method:
    """How facts are changed.

    Attributes:
        residual: ``full`` or ``spread``.
        weight: weight of ordinary keys, in units of the feed-forward width.
        steps: steps of the search for a vector, at most.
        step_size: length of a step, in that of the state.
        clamp: length of a vector at most, in that of the state.
        openings: texts in front of the prompt, beside none, in which the vector must serve too.
        batch_size: rows at a time.
    """

    residual: Literal["full", "spread"]
    weight: float
    steps: int
    step_size: float
    clamp: float
    openings: tuple[str, ...]
    batch_size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompts of C facts, each in several contexts, and each subject in a sentence of its own.

    Attributes:
        tokens: ``[R, T]`` int32.
        lengths: ``[R]`` int32.
        fact: ``[R]`` int32, which of the C facts; C in a row that fills up.
        at: ``[R]`` int32, place of the subject's last token.
        tail: ``[R, S]`` int32, places from there to the last that is asked, and beyond in a shorter row.
        behind: ``[R, M]`` int32, places of the target's tokens.
        inside: ``[R, M]`` bool, which of them there are; none in the sentence of the subject's own.
        share: ``[R]`` float32, what the row counts in its fact's key: one half without an opening in front, the others
            together the other half.
        bare: ``[R]`` bool, rows without an opening.
    """

    tokens: Any
    lengths: Any
    fact: Any
    at: Any
    tail: Any
    behind: Any
    inside: Any
    share: Any
    bare: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Sought:
    """Vectors of n facts at one layer.

    Attributes:
        delta: ``[n, D]`` float32.
        before: ``[n]`` loss of the target without the vector, mean over contexts, nats per token.
        after: ``[n]`` the same with it.
        length: ``[n]`` length of the vector in that of the state.
    """

    delta: np.ndarray
    before: np.ndarray
    after: np.ndarray
    length: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LayerEdit:
    """The change of one layer's ``down``: ``residual.T @ readout``, of rank n.

    Attributes:
        keys: ``[n, F]`` float32.
        residual: ``[n, D]`` float32.
        readout: ``[n, F]`` float32.
        share: ``[n]`` how much of each fact's residual its key then gives.
        relative: length of the change in that of the weight.
        condition: condition number of the second moment.
    """

    keys: np.ndarray
    residual: np.ndarray
    readout: np.ndarray
    share: np.ndarray
    relative: float
    condition: float


@dataclasses.dataclass(frozen=True, eq=False)
class Edited:
    """What was done.

    Attributes:
        layers: by layer, its change.
        sought: by layer, the vectors sought there.
        weights: all weights, changed.
    """

    layers: dict[int, LayerEdit]
    sought: dict[int, Sought]
    weights: dict[str, jax.Array]

    def of_search(self, layer: int) -> dict[str, np.ndarray]:
        """What files say of the search at a layer, ``[n]`` by name; nothing where there was none."""
        one = self.sought.get(layer)
        return {} if one is None else {"loss_before": one.before, "loss_after": one.after, "length": one.length}


Keep = Callable[[str, Callable[[], Arrays], Mapping[str, Array]], Arrays]


def closed_form(moment: np.ndarray, keys: np.ndarray, weight: float, old: np.ndarray | None = None) -> np.ndarray:
    """The readout ``[n, F]``: ``residual.T @ readout`` is the change that minimises

    ``sum_i ||change k_i - r_i||^2 + sum_j ||change k'_j||^2 + weight tr(change C change^T)``

    over the keys k_i and the old keys k'_j. By Woodbury, what is inverted besides C is of the size of the facts.

    Args:
        moment: C ``[F, F]``, positive definite.
        keys: ``[n, F]``.
        weight: weight of C.
        old: ``[o, F]`` keys of earlier edits, which are to stay; None for none.

    Raises:
        numpy.linalg.LinAlgError: C is not positive definite.
    """
    every = keys if old is None else np.concatenate([keys, old])
    solved = scipy.linalg.cho_solve(scipy.linalg.cho_factor(moment, lower=True), every.T)
    gram = every @ solved + weight * np.eye(len(every), dtype=every.dtype)
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram, lower=True), solved.T)[: len(keys)]


def edited(
    model: Model,
    facts: Sequence[Fact],
    layers: Sequence[int],
    moments: Mapping[int, np.ndarray],
    method: Method,
    *,
    old: Mapping[int, np.ndarray],
    keep: Keep,
    bars: Bars | None,
) -> Edited:
    """Changes facts.

    Args:
        model: model, earlier edits included.
        facts: n facts.
        layers: layers to change, ascending.
        moments: by layer, the second moment of ordinary keys ``[F, F]``.
        method: how.
        old: by layer, keys of earlier edits ``[o, F]``.
        keep: function of a name, of what makes arrays, and of what they are; gives what was kept under the name, or
            makes and keeps it.
        bars: maker of progress bars.

    Raises:
        UserError: a model whose ``down`` is not what the stream is given; a subject at the first position, or other
            facts that `placed` refuses; numbers that are not finite.
        Preempted: told to leave; what is done is kept.
    """
    config, weights = model.config, model.weights(bars)
    check(config)
    chunks, count = rows_of(model, facts, method)
    place = batch_sharding(model.mesh)
    laid = [jax.device_put(chunk, place) for chunk in chunks]
    found, sought, last = dict[int, LayerEdit](), dict[int, Sought](), layers[-1]
    start, steps = None, itertools.count()
    shows = bar(bars, total=len(layers), desc="edits", unit=" layers")
    with jax.default_matmul_precision("highest"), shows as shown, notice() as leave:
        for number, layer in enumerate(layers):
            decoder = Decoder(config, weights)
            top = last if method.residual == "spread" else layer
            if top not in sought:
                # Vectors of the model as given depend on no layer edited: other ways to edit find them again.
                of = None if number else model.determines
                sought[top] = _seek(decoder, laid, top, count, facts, method, keep, lambda: leave(next(steps)), of)
            parts = [_states(decoder, rows, np.int32(layer), np.int32(top), count=count) for rows in laid]
            keys, states = (np.concatenate(part)[: len(facts)] for part in zip(*processes.whole(parts), strict=True))
            start = states if start is None or method.residual == "full" else start
            # What is left: nothing has moved before the first edit, and bits of the state must not come into it.
            parts_left = 1 if method.residual == "full" else len(layers) - number
            residual = (sought[top].delta + (start - states)) / np.float32(parts_left)
            one = _solved(config, weights, layer, keys, residual, moments[layer], method, old.get(layer))
            found[layer] = one
            weights = {**weights, DOWN: _added(weights[DOWN], np.int32(layer), one.residual, one.readout)}
            shown.update(1)
    return Edited(found, sought, weights)


def check(config: ModelConfig) -> None:
    """Refuses models in which a norm, or a choice of experts, stands between ``down`` and the stream.

    Raises:
        UserError: it is such a model.
    """
    from jaxcrit.models.weights import table

    if config.experts:
        raise UserError(
            f"--model: {config.family} models have {config.experts} experts in each layer, so that what down reads"
            " depends on where each token goes; such models cannot be edited here"
        )
    if any(row.path == "blocks.mlp_post_norm" for row in table(config)):
        raise UserError(
            f"--model: in {config.family} models a norm stands behind the MLP, so that no change of it gives the stream"
            " a chosen vector; such models cannot be edited here"
        )


def rows_of(model: Model, facts: Sequence[Fact], method: Method) -> tuple[list[Rows], int]:
    """All rows, so many facts C at a time; and C.

    Raises:
        UserError: see `placed`; or a subject at the first position.
    """
    essence = [dataclasses.replace(fact, prompt=ESSENCE) for fact in facts]
    contexts = [placed(facts, model.tokenizer, before=before) for before in ("", *method.openings)]
    contexts.append(placed(essence, model.tokenizer))
    first = [fact.text for fact, one in zip(facts, contexts[0], strict=True) if one.subject[-1] == 0]
    if first:
        raise UserError(
            f"--facts: the subject of {listed([repr(text) for text in first], 2)} is the first token of its row, on"
            " which many models keep a state of huge length that no edit can be keyed on; put a word in front"
        )
    each, most = len(contexts), max(len(one.example.token_ids) - one.example.prompt_length for one in contexts[0])
    most += most % 2  # as of the other sizes: few of them, so that other facts find the program compiled
    count = min(len(facts), max(1, method.batch_size // each))
    length = -(-max(len(one.example.token_ids) for part in contexts for one in part) // 8) * 8
    if length > model.config.max_length:
        length = max(len(one.example.token_ids) for part in contexts for one in part)
    span = -(-max(len(one.example.token_ids) - 1 - one.subject[-1] for part in contexts for one in part) // 4) * 4
    size = batch_rows(count * each, model.mesh)

    def row(number: int, context: int, one: Placed) -> Rows:
        own = context == each - 1  # the subject in a sentence of its own, without a target
        ids, last = (prompt_of(one.example) if own else one.example).token_ids, one.subject[-1]
        behind = one.example.prompt_length + np.arange(most)
        alone = 1.0 if not method.openings else 0.5
        return Rows(
            np.pad(ids, (0, length - len(ids))),
            len(ids),
            number,
            last,
            last + np.arange(span),
            np.full(most, last + 1) if own else np.minimum(behind, length - 1),
            behind < len(ids),
            np.float32(0 if own else alone if context == 0 else 0.5 / len(method.openings)),
            context == 0,
        )

    ones, no = np.ones(most, int), np.zeros(most, bool)
    filling = Rows(np.zeros(length, int), 1, count, 0, np.zeros(span, int), ones, no, np.float32(0), False)
    chunks = []
    for start in range(0, len(facts), count):
        rows = [
            row(number, context, part[start + number])
            for number in range(min(count, len(facts) - start))
            for context, part in enumerate(contexts)
        ]
        rows += [filling] * (size - len(rows))
        chunks.append(jax.tree.map(lambda *parts: np.stack(parts), *rows))
    return chunks, count


def prompt_of(example: Example) -> Example:
    """The prompt alone."""
    return dataclasses.replace(example, token_ids=example.token_ids[: example.prompt_length])


def _seek(
    decoder: Decoder,
    chunks: Sequence[Rows],
    layer: int,
    count: int,
    facts: Sequence[Fact],
    method: Method,
    keep: Keep,
    leave: Callable[[], bool],
    of: Mapping[str, Any] | None,
) -> Sought:
    """The vectors of all facts at a layer, chunk by chunk; kept for other edits under ``of``, unless that is None."""
    numbers = np.array([method.step_size, method.clamp], np.float32)
    holds = {"delta": Array("f", (count, decoder.config.width))}
    holds |= dict.fromkeys(("before", "after", "length"), Array("f", (count,)))

    def descend(rows: Rows) -> Arrays:
        found = _descend(decoder, rows, numbers, np.int32(method.steps), layer=layer, count=count)
        return dict(zip(holds, processes.whole(found), strict=True))

    def make(rows: Rows) -> Arrays:
        if of is None:
            return descend(rows)
        given = {name: value.tolist() for name, value in processes.whole(vars(rows)).items()}
        how = {"layer": layer, "count": count, "numbers": numbers.tolist(), "steps": method.steps, "rows": given}
        return remembered("vectors", {**of, **how}, holds, lambda: descend(rows))

    parts = []
    for number, rows in enumerate(chunks, 1):
        parts.append(keep(f"{layer}/{number}", functools.partial(make, rows), holds))
        if leave() and number < len(chunks):
            raise Preempted(
                f"told to leave at part {number} of {len(chunks)} of layer {layer}; the same command goes on from there"
            )
    whole = {name: np.concatenate([part[name] for part in parts])[: len(facts)] for name in parts[0]}
    broken = [fact.text for fact, row in zip(facts, whole["delta"], strict=True) if not np.isfinite(row).all()]
    if broken:
        named = listed([repr(text) for text in broken], 2)
        raise UserError(f"--facts: the search for {named} came to NaN in layer {layer}; take a smaller --step_size")
    return Sought(**whole)


@functools.partial(jax.jit, static_argnames=("layer", "count"))
def _descend(
    decoder: Decoder, rows: Rows, numbers: jax.Array, steps: jax.Array, *, layer: int, count: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The fields of `Sought`, of C facts; ``numbers`` are step size and clamp."""
    config = decoder.config
    context, tail = _context(decoder, rows, jnp.arange(rows.tokens.shape[1])), _context(decoder, rows, rows.tail)
    below = _through(decoder, embed(decoder, rows.tokens), context, 0, layer + 1).hidden
    # What stands in front of the subject's last token does not see the vector: its keys and values are of one pass.
    kept = (config.num_layers - 1 - layer, *rows.tokens.shape, config.num_kv_heads, config.head_dim)
    room = Cache(jnp.zeros(kept, below.dtype), jnp.zeros(kept, below.dtype), fresh=True)
    made = _through(decoder, below, context, layer + 1, config.num_layers, cache=room).cache
    past = LayerCache(made.keys.swapaxes(2, 3), made.values.swapaxes(2, 3))
    behind = jnp.take_along_axis(below, rows.tail[..., None], axis=1, mode="clip")
    state = _of_facts(jnp.where(rows.bare[:, None], behind[:, 0].astype(jnp.float32), 0), rows, count)
    norm = jnp.maximum(jnp.linalg.norm(state, axis=1), 1e-20)  # of a row that fills up, 0
    counts = rows.inside.sum(axis=1)
    targets = jnp.take_along_axis(rows.tokens, rows.behind, axis=1)
    real = rows.fact < count
    contexts = jnp.maximum(_of_facts((counts > 0).astype(jnp.float32), rows, count), 1)

    def said(delta: jax.Array) -> jax.Array:
        """Log-probabilities ``[R, M, V]`` at the places of the targets."""
        moved = jnp.concatenate([delta, jnp.zeros_like(delta[:1])])[rows.fact]
        x = behind.at[:, 0].add(moved.astype(behind.dtype))
        x = _through(decoder, x, tail, layer + 1, config.num_layers, past=past).hidden
        asked = (rows.behind - 1 - rows.at[:, None])[..., None]
        scores = logits(decoder, jnp.take_along_axis(x, asked, axis=1, mode="clip"))
        return jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)

    own = real & (counts == 0)
    meant = jax.lax.stop_gradient(said(jnp.zeros_like(state))[:, 0])

    def loss(delta: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        log_p = said(delta)
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        nats = -jnp.where(rows.inside, picked, 0).sum(axis=1) / jnp.maximum(counts, 1)
        target = _of_facts(nats, rows, count) / contexts
        drift = (jnp.exp(meant) * (meant - log_p[:, 0])).sum(axis=-1)
        length = jnp.sqrt(jnp.square(delta).sum(axis=1) + 1e-20)
        whole = target + DRIFT * _of_facts(jnp.where(own, drift, 0), rows, count) + DECAY * length / jnp.square(norm)
        return whole.sum(), (whole, target)

    rate = (numbers[0] * norm / np.sqrt(decoder.config.width))[:, None]

    def step(carry: Any) -> Any:
        number, delta, mean, square, done, first = carry
        (_, (whole, target)), slope = jax.value_and_grad(loss, has_aux=True)(delta)
        done |= whole < SURE
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * jnp.square(slope)
        turn = (mean / (1 - 0.9 ** (number + 1))) / (jnp.sqrt(square / (1 - 0.999 ** (number + 1))) + 1e-8)
        moved = delta - rate * turn
        shrink = jnp.minimum(1, numbers[1] * norm / jnp.maximum(jnp.linalg.norm(moved, axis=1), 1e-20))
        delta = jnp.where(done[:, None], delta, moved * shrink[:, None])
        return number + 1, delta, mean, square, done, jnp.where(number == 0, target, first)

    zero, none = jnp.zeros_like(state), jnp.zeros(count)
    filling = _of_facts(real.astype(jnp.float32), rows, count) == 0
    _, delta, _, _, _, first = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~carry[4].all(), step, (jnp.int32(0), zero, zero, zero, filling, none)
    )
    return delta, first, loss(delta)[1][1], jnp.linalg.norm(delta, axis=1) / norm


@functools.partial(jax.jit, static_argnames="count")
def _states(decoder: Decoder, rows: Rows, layer: Any, top: Any, *, count: int) -> tuple[jax.Array, jax.Array]:
    """Keys ``[C, F]`` at a layer, mean over contexts, and states ``[C, D]`` behind another, in the bare prompt.

    The layers are data, so that all of them share a program.
    """

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.take_along_axis(after, rows.at[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    config, context = decoder.config, _context(decoder, rows, jnp.arange(rows.tokens.shape[1]))
    layers, x, tap = jnp.arange(config.num_layers), embed(decoder, rows.tokens), Tap(read, ("ff",))
    out = run_span(decoder.blocks, layers, x, context, 0, top + 1, windows=layer_windows(config), tap=tap)
    state = jnp.take_along_axis(out.hidden, rows.at[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    keys = _of_facts(out.taps["ff"][layer] * rows.share[:, None], rows, count)
    return keys, _of_facts(jnp.where(rows.bare[:, None], state, 0), rows, count)


def _context(decoder: Decoder, rows: Rows, places: jax.Array) -> Context:
    positions = jnp.broadcast_to(places.astype(jnp.int32), (len(rows.tokens), places.shape[-1]))
    return Context(positions, *decoder.config.rope.cos_sin(positions, rows.lengths))


def _through(decoder: Decoder, x: jax.Array, context: Context, start: int, stop: int, **given: Any) -> Output:
    """Runs layers ``start`` to ``stop``, half-open."""
    layers = np.arange(start, stop, dtype=np.int32)
    windows = layer_windows(decoder.config, layers.tolist())
    return run(decoder.blocks, jnp.asarray(layers), x, context, windows=windows, **given)


def _of_facts(values: jax.Array, rows: Rows, count: int) -> jax.Array:
    """Sums over the rows of each fact, ``[R, ...]`` to ``[C, ...]``."""
    return jax.ops.segment_sum(values, rows.fact, count + 1)[:count]


def _solved(
    config: ModelConfig,
    weights: Mapping[str, jax.Array],
    layer: int,
    keys: np.ndarray,
    residual: np.ndarray,
    moment: np.ndarray,
    method: Method,
    old: np.ndarray | None,
) -> LayerEdit:
    exact = moment.astype(np.float64)
    earlier = None if old is None or not len(old) else old.astype(np.float64)
    try:
        readout = closed_form(exact, keys.astype(np.float64), method.weight * config.ff_width, earlier)
    except np.linalg.LinAlgError:
        raise UserError(
            f"--covariance_data: the second moment of layer {layer} is not positive definite; give more text"
        ) from None
    residual = residual / np.float32(config.residual_scale)
    size = float(np.linalg.norm(processes.whole(weights[DOWN][layer]).astype(np.float64)))
    left, right = np.linalg.qr(residual.T.astype(np.float64))[1], np.linalg.qr(readout.T)[1]
    values = np.linalg.eigvalsh(exact)
    return LayerEdit(
        keys,
        residual.astype(np.float32),
        readout.astype(np.float32),
        np.einsum("nf,nf->n", readout, keys),
        float(np.linalg.norm(left @ right.T)) / size,
        float(values[-1] / max(values[0], 1e-300)),
    )


@jax.jit
def _added(down: jax.Array, layer: Any, residual: Any, readout: Any) -> jax.Array:
    """``[L, D, F]`` with the change in its layer; as merging an adapter has it."""
    change = jnp.einsum("nd,nf->df", residual, readout, precision=jax.lax.Precision.HIGHEST)
    whole = down[layer].astype(jnp.float32) + change
    return down.at[layer].set(whole.astype(down.dtype))
