"""ablation: a model with a block, or its attention or MLP, put out of action or scaled, row by row.

``skip``: nothing is added to the residual stream there: what leaves the site is what entered it. Zeroing the site's
weights and biases (arXiv 2506.22638) is the same function, bit for bit.
``mean``: what is added is the same for every token: the mean, over all real tokens of the same rows, prompts included,
of what the site adds in the intact model. So a site counts only for what it tells tokens apart by.
A number is a gain: what goes around the half is scaled by it (`jaxcrit.models.gains`).

Each row gives its loss, and whether its response is what greedy decoding would give; scores are made of one or the
other. Values of losses are high where a layer is needed, those of right answers low.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcrit.core import processes
from jaxcrit.core.groups import Sites
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.progress import bar
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.core.schema import Count
from jaxcrit.data.batches import Batch, make_batches
from jaxcrit.data.choices import Question
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.intervals import holm, mcnemar
from jaxcrit.evidence.answers import answers
from jaxcrit.evidence.criterion import Criterion
from jaxcrit.evidence.rows import GrowingRows, batches_of, sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses
from jaxcrit.evidence.variants import (
    Variant,
    enter,
    evaluation_counts,
    own_slots,
    planned_evaluations,
    sweep,
)
from jaxcrit.models.decoder import Block, Decoder, layer_windows, run
from jaxcrit.models.gains import scaled
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Edit, Site, Tap
from jaxcrit.models.stops import stop_tokens
from jaxcrit.parallel.preemption import one_by_one
from jaxcrit.training.objectives import TokenBatch

METHODS = ("skip", "mean")
_SITE: dict[Sites, Site] = {"blocks": "block", "attn": "attn", "mlp": "mlp"}
# Biases are there in some models only; without them and these, a half adds nothing.
_LAST = {"blocks": ("o", "o_bias", "down", "down_bias"), "attn": ("o", "o_bias"), "mlp": ("down", "down_bias")}


@functools.cache
def ablate(sites: Sites) -> Edit:
    """The edit of a sweep, of data as `_data` gives them: one program for the model as it is and for every variant."""

    def change(site: Site, before: jax.Array, after: jax.Array, data: Any, positions: jax.Array) -> jax.Array:
        out, shift, gain, on = data
        return jnp.where(out, before + shift.astype(before.dtype), scaled(before, after, gain, on))

    return Edit(change, (_SITE[sites],))


def _data(shift: jax.Array, out: Any = False, gain: float = 1.0, on: Any = False) -> tuple[Any, ...]:
    """Which layers are out of action and what each adds then ``[L, D]``, the gain and the layers that it is at."""
    none = np.zeros(len(shift), bool)
    return none | out, shift, np.full(len(shift), gain, np.float32), none | on


def intact(num_layers: int, width: int) -> Variant:
    """The model as it is."""
    return Variant(own_slots(num_layers), _data(jnp.zeros((num_layers, width))), start=num_layers)


def variants(num_layers: int, shift: jax.Array) -> list[Variant]:
    """The model with each layer in turn out of action; ``shift`` ``[L, D]`` is what it adds, zeros to skip it."""
    layers, slots = np.arange(num_layers), own_slots(num_layers)
    return [Variant(slots, _data(shift, out=layers == layer), start=layer) for layer in range(num_layers)]


def gain_variants(num_layers: int, width: int, gain: float) -> list[Variant]:
    """The model with a gain at each layer in turn."""
    layers, slots, shift = np.arange(num_layers), own_slots(num_layers), jnp.zeros((num_layers, width))
    return [Variant(slots, _data(shift, gain=gain, on=layers == layer), start=layer) for layer in range(num_layers)]


def update_sums(decoder: Decoder, batch: TokenBatch, sites: Sites) -> tuple[np.ndarray, int]:
    """What each layer's site adds to the stream of the intact model, summed over the real tokens of a batch.

    Returns:
        ``[L, D]`` float64, and the number of tokens.
    """
    rows = batch.tokens.sharding if isinstance(batch.tokens.sharding, NamedSharding) else None
    sums, count = processes.whole(_update_sums(decoder.blocks, decoder.embed.get_value(), batch, sites, rows))
    return sums.astype(np.float64), int(count)


def silenced(weights: Mapping[str, jax.Array], layer: int, sites: Sites) -> dict[str, jax.Array]:
    """Weights by path with one layer's site skipped: its last projections zero, which leaves nothing to add."""
    paths = [path for path in (f"blocks.{name}" for name in _LAST[sites]) if path in weights]
    return {**weights, **{path: _zeroed(weights[path], np.int32(layer)) for path in paths}}


@jax.jit
def _zeroed(stack: jax.Array, layer: Any) -> jax.Array:
    return stack.at[layer].set(0)


@functools.partial(jax.jit, static_argnames=("sites", "rows"))
def _update_sums(
    blocks: Block, table: jax.Array, batch: TokenBatch, sites: Sites, rows: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    tokens, lengths = batch.tokens, batch.lengths
    x, context = enter(table, tokens, lengths, blocks.config, rows)
    filled = batch.learn.any(axis=1)  # a row that fills up the batch has nothing to learn
    real = ((jnp.arange(tokens.shape[1]) < lengths[:, None]) & filled[:, None]).astype(jnp.float32)

    def added(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.einsum("btd,bt->d", (after - before).astype(jnp.float32), real)

    site, windows = _SITE[sites], layer_windows(blocks.config)
    taps = run(blocks, None, x, context, windows=windows, tap=Tap(added, (site,))).taps
    return taps[site], real.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """What each row comes to, in the model as it is and with each layer changed.

    Attributes:
        losses: by method, or gain, ``[L, N]`` float64: mean over the row's response, nats.
        exact: by the same ``[L, N]`` bool: whether greedy decoding would give the response.
        loss: ``[N]``, the loss in the model as it is.
        right: ``[N]``, exactness in it.
        tokens: ``[N]`` response tokens.
        sample_ids: ``[N]`` identity of each row.
    """

    losses: Mapping[str, np.ndarray]
    exact: Mapping[str, np.ndarray]
    loss: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    sample_ids: Sequence[str]

    def of(self, rows: Sequence[int] | np.ndarray, sample_ids: Sequence[str] | None = None) -> Changed:
        """Some rows, under other identities where these are given."""
        losses, exact = ({key: one[:, rows] for key, one in found.items()} for found in (self.losses, self.exact))
        ids = [self.sample_ids[row] for row in rows] if sample_ids is None else sample_ids
        return Changed(losses, exact, self.loss[rows], self.right[rows], self.tokens[rows], ids)

    def samples(self, method: str) -> SampleLosses:
        """Losses under one method."""
        return SampleLosses(
            np.arange(len(self.losses[method])), self.losses[method], self.loss, self.tokens, self.sample_ids
        )

    def chosen(self, method: str, questions: Sequence[Question], *, per_token: bool) -> tuple[np.ndarray, np.ndarray]:
        """Whether the right option is the likeliest: ``[L, Q]`` bool, and ``[Q]`` of the model as it is.

        Args:
            method: method.
            questions: Q questions, whose options are the rows, one after the other.
            per_token: whether log-probabilities are divided by the number of tokens; else their sum counts.
        """
        ends = np.cumsum([question.options for question in questions])
        weights = np.ones_like(self.tokens) if per_token else self.tokens
        found = []
        for losses in (self.losses[method], self.loss):
            each = np.split(losses * weights, ends[:-1], axis=-1)
            pairs = zip(each, questions, strict=True)
            found.append(np.stack([one.argmin(axis=-1) == question.gold for one, question in pairs], axis=-1))
        return found[0], found[1]


def ablations(
    model: Model,
    examples: Sequence[Example],
    sites: Sites,
    methods: Sequence[str],
    *,
    means_of: Sequence[Example],
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> tuple[Changed, dict[str, Any]]:
    """What each row comes to with each layer changed.

    Args:
        model: model whose layers are changed.
        examples: N rendered rows with responses.
        sites: whole blocks, or their attention or MLP alone.
        methods: ``skip``, ``mean``, and gains as numbers.
        means_of: rows whose means ``mean`` takes.
        batch_size: rows per forward pass.
        directory: directory of the run, where what is done survives an interruption; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        Losses and exactness of all rows, and counts of block evaluations.
    """
    depth, width, decoder = model.config.num_layers, model.config.width, model.decoder(bars)
    made = []
    for method in methods:
        shift = jnp.zeros((depth, width))
        if method == "mean":
            total, count = np.zeros((depth, width)), 0
            for _, placed in batches_of(means_of, batch_size, model):
                sums, real = update_sums(decoder, placed, sites)
                total, count = total + sums, count + real
            shift = jnp.asarray(total / count, jnp.float32)
        made += variants(depth, shift) if method in METHODS else gain_variants(depth, width, float(method))
    whole, weights = intact(depth, width), decoder.weights()
    made.append(whole)

    def take(batch: TokenBatch, _: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        found = sweep(decoder.blocks, weights, whole, made, batch, edit=ablate(sites), progress=step)
        # Sums over tokens, which are divided by their number again: so exactness stays 0 or 1.
        return np.concatenate([found.losses, found.exact * found.tokens]), found.tokens

    planned, ids = planned_evaluations(made, depth), [example.sample_id for example in examples]
    values, tokens, batches = sample_losses(examples, batch_size, model, directory, take, 2 * len(made), planned, bars)
    losses, exact = values[: len(made)], values[len(made) :] == 1
    counts = evaluation_counts(made, depth, batches, {"means": depth if "mean" in methods else 0})
    by_loss, by_exact = (
        dict(zip(methods, found[:-1].reshape(len(methods), depth, len(examples)), strict=True))
        for found in (losses, exact)
    )
    return Changed(by_loss, by_exact, losses[-1], exact[-1], tokens, ids), counts


def without_sets(
    model: Model,
    examples: Sequence[Example],
    sets: Sequence[Sequence[int]],
    *,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """What each row comes to without the layers of each of S sets, and last with all layers.

    Args:
        model: model.
        examples: N rendered rows with responses.
        sets: layers to skip.
        batch_size: rows per forward pass.
        directory: directory of the run, where what is done survives an interruption; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        ``[S + 1, N]`` losses (mean over the row's response, nats), ``[S + 1, N]`` whether greedy decoding would give
        the response, and counts of block evaluations.
    """
    depth, width, decoder = model.config.num_layers, model.config.width, model.decoder(bars)
    layers, shift, whole = np.arange(depth), jnp.zeros((depth, width)), intact(depth, width)
    made = [Variant(own_slots(depth), _data(shift, out=np.isin(layers, one)), start=min(one)) for one in sets] + [whole]
    weights = decoder.weights()

    def take(batch: TokenBatch, _: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        found = sweep(decoder.blocks, weights, whole, made, batch, edit=ablate("blocks"), progress=step)
        return np.concatenate([found.losses, found.exact * found.tokens]), found.tokens

    planned = planned_evaluations(made, depth)
    values, _, batches = sample_losses(examples, batch_size, model, directory, take, 2 * len(made), planned, bars)
    counts = evaluation_counts(made, depth, batches, {})
    return values[: len(made)], values[len(made) :] == 1, counts


def answered(
    model: Model,
    examples: Sequence[Example],
    sites: Sites,
    max_new_tokens: int,
    judge: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    *,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> np.ndarray:
    """Whether each generated answer is right by a scorer, with each layer skipped and with none.

    Args:
        model: model whose layers are skipped.
        examples: N rendered rows with responses.
        sites: whole blocks, or their attention or MLP alone.
        max_new_tokens: tokens of each answer, at most.
        judge: scorer of texts beside references.
        batch_size: rows at a time.
        directory: directory of the run, where answers survive an interruption; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        ``[L+1, N]`` bool.

    Raises:
        Preempted: told to leave; what is done is kept.
    """
    depth, count, stop = model.config.num_layers, len(examples), stop_tokens("", model)
    batches = make_batches(examples, model.budget(batch_size, passes=depth + 1, new_tokens=max_new_tokens))
    part = None if directory is None else directory.path / "partial_answers.jsonl"
    kept, total = GrowingRows(part, lambda row: (row["layer"], row["row"]), _Answer), (depth + 1) * count
    left = [
        (layer, batch)
        for layer in range(depth + 1)
        for batch in batches
        if kept.lacks([(layer, row) for row in batch.rows.tolist() if row < count])
    ]
    weights = model.decoder(bars).weights()

    @functools.lru_cache(maxsize=1)
    def without(layer: int) -> Decoder:
        return Decoder(model.config, weights if layer == depth else silenced(weights, layer, sites))

    with bar(bars, total=total, initial=len(kept.rows), desc="answers", unit=" answers") as shown:

        def do(item: tuple[int, Batch]) -> None:
            found = answers(model, without(item[0]), item[1], count, max_new_tokens, stop=stop)
            made = [{"layer": item[0], "row": one.row, "text": one.text} for one in found]
            kept.add(made)
            shown.update(len(made))

        one_by_one(left, do, lambda _: f"with {len(kept.rows)} of {total} answers given", kept.flush)
    texts = [[kept.rows[layer, row]["text"] for row in range(count)] for layer in range(depth + 1)]
    return np.stack([judge(one, [example.response or "" for example in examples]) for one in texts])


class _Answer(TypedDict):
    """An answer that an interrupted run has kept."""

    layer: Count
    row: Count
    text: str


def accuracy(
    key: str,
    right: np.ndarray,
    whole: np.ndarray,
    sample_ids: Sequence[str],
    meta: Mapping[str, Any],
    chance: float = 0.0,
) -> LayerScores:
    """Share of right answers with each layer changed.

    ``meta`` gets ``unchanged``, the share in the model as it is; ``relative``, the share of it that is lost;
    ``chance``; ``p_holm``, McNemar's exact p of each layer against the model as it is, adjusted over the layers.

    Args:
        key: score key.
        right: ``[L, N]`` bool.
        whole: ``[N]`` bool, of the model as it is.
        sample_ids: ``[N]`` identity of each row.
        meta: JSON values to keep beside.
        chance: share that guessing gives.
    """
    depth, count = right.shape
    score = SampleLosses(
        np.arange(depth), right.astype(np.float64), whole.astype(np.float64), np.ones(count, np.int64), sample_ids
    ).score(key, depth, meta, "low")
    p_values = [mcnemar(int((whole & ~one).sum()), int((~whole & one).sum())) for one in right]
    lost = whole.mean() - right.mean(axis=1)
    more = {
        "relative": (lost / whole.mean()).tolist() if whole.any() else None,
        "chance": [chance] * depth,
        "p_holm": holm(p_values),
    }
    return dataclasses.replace(score, meta={**score.meta, **more})


def _criterion(formula: str, responds: str, direction: Literal["low", "high"] = "low") -> Criterion:
    return Criterion(
        needs="variants",
        direction=direction,
        score=accuracy if direction == "low" else SampleLosses.scores,
        command="ablate",
        formula=formula,
        source="skipping a layer",
        responds=responds,
        blind="what other layers make up for",
    )


_RIGHT = {
    "greedy": "greedy decoding gives the response",
    "choice": "the right option is the likeliest",
    "generated": "the answer is the response",
    "number": "the answer comes to the right number",
}
_ADDS = {"skip": "nothing", "mean": "its mean"}
CRITERIA = {
    "ablation_skip": _criterion("loss with a layer that adds nothing", "loss without the layer", "high"),
    "ablation_mean": _criterion(
        "loss with a layer that adds its mean", "loss without what the layer tells tokens apart by", "high"
    ),
    **{
        f"ablation_{method}_{what}": _criterion(
            f"share of rows in which {means}, with a layer that adds {_ADDS[method]}", "answers lost without the layer"
        )
        for what, means in _RIGHT.items()
        for method in METHODS
        if method == "skip" or what in ("greedy", "choice")
    },
}
