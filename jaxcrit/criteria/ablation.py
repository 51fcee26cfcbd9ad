"""ablation: test loss of a model with a block, or its attention or MLP, put out of action. High where it is needed.

``skip``: nothing is added to the residual stream there: what leaves the site is what entered it. Zeroing the site's
weights and biases (arXiv 2506.22638) is the same function, bit for bit.
``mean``: what is added is the same for every token: the mean, over all real tokens of the same rows, prompts included,
of what the site adds in the intact model. So a site counts only for what it tells tokens apart by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcrit.core import processes
from jaxcrit.core.groups import Sites
from jaxcrit.core.progress import bar
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.scorers import exact_match
from jaxcrit.evidence.answers import answers
from jaxcrit.evidence.criterion import Criterion
from jaxcrit.evidence.rows import batches_of, sample_losses
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
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Edit, Site, Tap
from jaxcrit.models.stops import stop_tokens
from jaxcrit.training.step import TokenBatch

_SITE: dict[Sites, Site] = {"blocks": "block", "attn": "attn", "mlp": "mlp"}
# Biases are there in some models only; without them and these, a half adds nothing.
_LAST = {"blocks": ("o", "o_bias", "down", "down_bias"), "attn": ("o", "o_bias"), "mlp": ("down", "down_bias")}


@functools.cache
def ablate(sites: Sites) -> Edit:
    """The edit of a sweep; its data are ``[L]`` bool, which layers are out of action, and ``[L, D]``, what they add."""

    def change(
        site: Site, before: jax.Array, after: jax.Array, data: tuple[jax.Array, jax.Array], positions: jax.Array
    ) -> jax.Array:
        out, shift = data
        return jnp.where(out, before + shift.astype(before.dtype), after)

    return Edit(change, (_SITE[sites],))


def intact(num_layers: int, width: int) -> Variant:
    """The model as it is."""
    edits = (np.zeros(num_layers, bool), jnp.zeros((num_layers, width)))
    return Variant(own_slots(num_layers), edits, start=num_layers)


def variants(num_layers: int, shift: jax.Array) -> list[Variant]:
    """The model with each layer in turn out of action; ``shift`` ``[L, D]`` is what it adds, zeros to skip it."""
    layers, slots = np.arange(num_layers), own_slots(num_layers)
    return [Variant(slots, (layers == layer, shift), start=layer) for layer in range(num_layers)]


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


def ablation_losses(
    model: Model,
    examples: Sequence[Example],
    sites: Sites,
    methods: Sequence[str],
    *,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> tuple[dict[str, SampleLosses], dict[str, Any]]:
    """Losses of each row without each layer.

    Args:
        model: model whose layers are put out of action.
        examples: N rendered rows with responses.
        sites: whole blocks, or their attention or MLP alone.
        methods: ``skip`` and ``mean``.
        batch_size: rows per forward pass.
        directory: directory of the run, where what is done survives an interruption; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        Losses by method, and counts of block evaluations.
    """
    depth, width, decoder = model.config.num_layers, model.config.width, model.decoder(bars)
    made = []
    for method in methods:
        shift = jnp.zeros((depth, width))
        if method == "mean":
            total, count = np.zeros((depth, width)), 0
            for _, placed in batches_of(examples, batch_size, model):
                sums, tokens = update_sums(decoder, placed, sites)
                total, count = total + sums, count + tokens
            shift = jnp.asarray(total / count, jnp.float32)
        made += variants(depth, shift)
    whole, weights = intact(depth, width), decoder.weights()
    made.append(whole)

    def take(batch: TokenBatch, _: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        found = sweep(decoder.blocks, weights, whole, made, batch, edit=ablate(sites), progress=step)
        return found.losses, found.tokens

    planned = planned_evaluations(made, depth)
    losses, counted, batches = sample_losses(examples, batch_size, model, directory, take, len(made), planned, bars)
    counts = evaluation_counts(made, depth, batches, {"means": depth if "mean" in methods else 0})
    each = zip(methods, np.split(losses[:-1], len(methods)), strict=True)
    ids = [example.sample_id for example in examples]
    return {method: SampleLosses(np.arange(depth), mine, losses[-1], counted, ids) for method, mine in each}, counts


def accuracies(
    model: Model, examples: Sequence[Example], sites: Sites, max_new_tokens: int, *, batch_size: int, bars: Bars | None
) -> SampleLosses:
    """Whether each answer is the row's response word for word, with each layer skipped and with none."""
    depth, weights, stop = model.config.num_layers, model.decoder(bars).weights(), stop_tokens("", model)
    batches = make_batches(examples, model.budget(batch_size, passes=depth + 1, new_tokens=max_new_tokens))
    right = np.zeros((depth + 1, len(examples)))
    with bar(bars, total=right.size, desc="answers", unit=" answers") as shown:
        for layer in range(depth + 1):
            decoder = Decoder(model.config, weights if layer == depth else silenced(weights, layer, sites))
            for batch in batches:
                for one in answers(model, decoder, batch, len(examples), max_new_tokens, stop=stop):
                    right[layer, one.row] = exact_match([one.text], [examples[one.row].response or ""])[0]
                    shown.update(1)
    ids = [example.sample_id for example in examples]
    return SampleLosses(np.arange(depth), right[:-1], right[-1], np.ones(len(examples), np.int64), ids)


CRITERIA = {
    f"ablation_{what}": Criterion(
        needs="variants",
        direction="low" if what == "skip_accuracy" else "high",
        score=SampleLosses.score if what == "skip_accuracy" else SampleLosses.scores,
        command="ablate",
        formula=formula,
        source="skipping a layer",
        responds=responds,
        blind="what other layers make up for",
    )
    for what, formula, responds in (
        ("skip", "loss with a layer that adds nothing", "loss without the layer"),
        ("mean", "loss with a layer that adds its mean", "loss without what the layer tells tokens apart by"),
        ("skip_accuracy", "share of right answers with a layer that adds nothing", "answers lost without the layer"),
    )
}
