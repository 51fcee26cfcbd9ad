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
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.criteria.substitution import Sites
from jaxcrit.data import batches as data
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.scorers import exact_match
from jaxcrit.evidence.criterion import Criterion
from jaxcrit.evidence.rows import batches_of, sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses
from jaxcrit.evidence.variants import Batch, Variant, enter, planned_evaluations, sweep
from jaxcrit.models.decoder import Block, Decoder, layer_windows, run
from jaxcrit.models.generation import generate
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Edit, Site, Tap
from jaxcrit.models.stops import stop_tokens
from jaxcrit.parallel.mesh import batch_rows

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
    return Variant(_order(num_layers), edits, start=num_layers)


def variants(num_layers: int, shift: jax.Array) -> list[Variant]:
    """The model with each layer in turn out of action; ``shift`` ``[L, D]`` is what it adds, zeros to skip it."""
    return [
        Variant(_order(num_layers), (np.arange(num_layers) == layer, shift), start=layer) for layer in range(num_layers)
    ]


def update_sums(
    blocks: Block, outside: Mapping[str, jax.Array], batch: Batch, sites: Sites
) -> tuple[np.ndarray, int, int]:
    """What each layer's site adds to the stream of the intact model, summed over the real tokens of a batch.

    Returns:
        ``[L, D]`` float64, the number of tokens, and the number of block evaluations.
    """
    rows = batch[0].sharding if isinstance(batch[0].sharding, NamedSharding) else None
    sums, count = processes.whole(_update_sums(blocks, outside["embed"], *batch, sites, rows))
    return sums.astype(np.float64), int(count), blocks.config.num_layers


def silenced(weights: Mapping[str, jax.Array], layer: int, sites: Sites) -> dict[str, jax.Array]:
    """Weights by path with one layer's site skipped: its last projections zero, which leaves nothing to add."""
    paths = [path for path in (f"blocks.{name}" for name in _LAST[sites]) if path in weights]
    return {**weights, **{path: _zeroed(weights[path], np.int32(layer)) for path in paths}}


@jax.jit
def _zeroed(stack: jax.Array, layer: Any) -> jax.Array:
    return stack.at[layer].set(0)


@functools.partial(jax.jit, static_argnames=("sites", "rows"))
def _update_sums(
    blocks: Block,
    table: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    learn: jax.Array,
    sites: Sites,
    rows: NamedSharding | None,
) -> tuple[jax.Array, jax.Array]:
    x, context = enter(table, tokens, lengths, blocks.config, rows)
    filled = learn.any(axis=1)  # a row that fills up the batch has nothing to learn
    real = ((jnp.arange(tokens.shape[1]) < lengths[:, None]) & filled[:, None]).astype(jnp.float32)

    def added(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.einsum("btd,bt->d", (after - before).astype(jnp.float32), real)

    site, windows = _SITE[sites], layer_windows(blocks.config)
    taps = run(blocks, None, x, context, windows=windows, tap=Tap(added, (site,))).taps
    return taps[site], real.sum()


def _order(num_layers: int) -> np.ndarray:
    layers = np.arange(num_layers, dtype=np.int32)
    return np.stack([layers, layers], axis=1)


class Ablation:
    """Losses and right answers of a model without each of its layers, over rows with responses."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        sites: Sites,
        *,
        batch_size: int,
        directory: RunDirectory | None,
        bars: Bars | None,
    ):
        self.model, self.examples, self.sites, self.batch_size = model, examples, sites, batch_size
        self.directory, self.bars = directory, bars
        self.depth = model.config.num_layers
        self.weights = model.decoder(bars).weights()
        self.counts: dict[str, Any] = {}

    def losses(self, methods: Sequence[str]) -> dict[str, SampleLosses]:
        """By method, losses of each sample without each layer."""
        inside = {path: value for path, value in self.weights.items() if path.startswith("blocks.")}
        blocks = Block(self.model.config, {path.removeprefix("blocks."): value for path, value in inside.items()})
        width, extra = self.model.config.width, 0
        made = []
        for method in methods:
            shift = jnp.zeros((self.depth, width))
            if method == "mean":
                shift, extra = self._mean_updates(blocks), self.depth
            made += variants(self.depth, shift)
        whole = intact(self.depth, width)
        made.append(whole)

        def take(batch: Batch, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
            found = sweep(blocks, self.weights, whole, made, batch, edit=ablate(self.sites), progress=step)
            return found.losses, found.tokens

        planned = planned_evaluations(made, self.depth)
        losses, tokens, batches = sample_losses(
            self.examples, self.batch_size, self.model, self.directory, take, len(made), planned, self.bars
        )
        self.counts = {
            "sweep": planned,
            "forward_passes": planned / self.depth,
            "a_pass_each": len(made) * self.depth,
            "means": extra,
            "batches": batches,
        }
        layers = np.arange(self.depth)
        return {
            method: SampleLosses(layers, losses[place * self.depth :][: self.depth], losses[-1], tokens)
            for place, method in enumerate(methods)
        }

    def _mean_updates(self, blocks: Block) -> Any:
        """``[L, D]`` what each layer's site adds to the stream, mean over all real tokens of all rows."""
        total, count = np.zeros((self.depth, self.model.config.width)), 0
        for _, placed in batches_of(self.examples, self.batch_size, self.model):
            sums, tokens, _ = update_sums(blocks, self.weights, placed, self.sites)
            total, count = total + sums, count + tokens
        return jnp.asarray(total / count, jnp.float32)

    def accuracies(self, max_new_tokens: int) -> SampleLosses:
        """Whether each answer is the row's response word for word, with each layer skipped and with none."""
        batches = make_batches(self.examples, batch_rows(self.batch_size, self.model.mesh))
        right = np.zeros((self.depth + 1, len(self.examples)))
        bar = None if self.bars is None else self.bars(total=right.size, desc="answers", unit=" answers")
        for layer in range(self.depth + 1):
            weights = self.weights if layer == self.depth else silenced(self.weights, layer, self.sites)
            decoder = Decoder(self.model.config, weights)
            for batch in batches:
                rows = batch.rows[batch.rows < len(self.examples)]
                right[layer, rows] = self._right(decoder, batch, max_new_tokens)
                if bar is not None:
                    bar.update(len(rows))
        if bar is not None:
            bar.close()
        return SampleLosses(np.arange(self.depth), right[:-1], right[-1], np.ones(len(self.examples), np.int64))

    def _right(self, decoder: Decoder, batch: data.Batch, max_new_tokens: int) -> np.ndarray:
        fills = batch.rows == len(self.examples)
        found = generate(
            decoder,
            batch.tokens,
            batch.lengths,
            max_new_tokens,
            stop=stop_tokens("", self.model),
            samples=np.where(fills, -1, batch.rows),
            mesh=self.model.mesh,
        )
        texts = [self.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.token_ids]
        pairs = [
            (text, self.examples[row].response or "")
            for text, row in zip(texts, batch.rows, strict=True)
            if row < len(self.examples)
        ]
        return exact_match([text for text, _ in pairs], [gold for _, gold in pairs])


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
