"""trace: where a fact is on its way from its subject to the answer (causal tracing, Meng et al., arXiv 2202.05262).

The embeddings of a subject's tokens are drowned in noise, and the probability of the target falls from p to p*. Then
one thing at one layer is put back as it was without the noise, and what comes back of the probability is that layer's
effect. What is put back: the stream behind the block, at the subject's last token (``trace``) or at the prompt's last
(``trace_last``); what the MLPs of a window of layers add at the subject's last token (``trace_mlp``), or the attentions
(``trace_attn``). ``trace_recall``: as ``trace``, but with the MLPs above held at what they add under the noise; what is
lost by that is what MLPs above the layer still have to add, and its fall from one layer to the next is what this
layer's MLP adds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.core import processes
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.facts import Placed
from jaxcrit.data.templates import Example
from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.rows import sample_losses
from jaxcrit.evidence.variants import Variant, loss_step, own_slots, planned_evaluations, sweep
from jaxcrit.models.decoder import Decoder, forward, look_up
from jaxcrit.models.interventions import Patch, patch
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding
from jaxcrit.training.objectives import TokenBatch

SITES: tuple[Site, ...] = ("attn", "mlp", "block")
KINDS = ("stream", "last", "mlp", "attn", "severed")
Step = Callable[[int], None] | None  # told how many block evaluations are done
_SUBJECT, _LAST = 0, 1  # of the positions that a patch knows
_MOST, _WITHIN = 5, 0.05  # layers of a band, and how far below the highest they may be


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """What tracing F facts found.

    Attributes:
        p: ``[F]`` probability of the target's first token.
        corrupted: ``[F]`` the same under the noise, mean over the draws.
        effects: by kind of `KINDS`, ``[F, L]``: probability with one thing put back, less ``corrupted``.
        sigma: standard deviation of the entries of the subjects' embeddings, in which the noise is measured.
        evaluations: block evaluations of one batch.
        batches: how many batches.
    """

    p: np.ndarray
    corrupted: np.ndarray
    effects: Mapping[str, np.ndarray]
    sigma: float
    evaluations: int
    batches: int

    @property
    def total(self) -> np.ndarray:
        """``[F]`` total effect of the noise."""
        return self.p - self.corrupted

    @property
    def gap(self) -> np.ndarray:
        """``[F, L]`` what MLPs above each layer add of its effect."""
        return self.effects["stream"] - self.effects["severed"]


def traced(
    model: Model,
    facts: Sequence[Placed],
    *,
    noise: float,
    samples: int,
    window: int,
    seed: int,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> Traced:
    """Traces facts that the model knows.

    Args:
        model: model.
        facts: F facts with the target that is true.
        noise: standard deviation of the noise, in those of the entries of the subjects' embeddings.
        samples: draws of the noise for each fact.
        window: layers whose halves are put back together.
        seed: seed of the noise; a fact's draws do not depend on the other facts.
        batch_size: rows per pass, a row for each fact and draw.
        directory: directory of the run, where what is done survives an interruption; None keeps nothing.
        bars: maker of progress bars.
    """
    depth, width, decoder = model.config.num_layers, model.config.width, model.decoder(bars)
    weights, slots = decoder.weights(), own_slots(depth)
    tokens = np.concatenate([fact.example.token_ids[list(fact.subject)] for fact in facts])
    entries = processes.whole(look_up(decoder.embed[...], jnp.asarray(tokens), model.config))
    sigma = float(np.std(entries.astype(np.float64)))
    rows = [_first_token(fact.example) for fact in facts for _ in range(samples)]
    changes = [*_changes(depth, window), _Change(depth, _SUBJECT, _nowhere(depth))]  # the last one changes nothing

    def take(
        batch: TokenBatch, places: np.ndarray, step: Callable[[int], None] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = batch.tokens, batch.lengths
        at, offset = np.zeros((len(places), 2), np.int32), np.zeros((*ids.shape, width), np.float32)
        for row, place in enumerate(places.tolist()):
            if place < len(rows):
                fact = facts[place // samples]
                at[row] = fact.subject[-1], fact.example.prompt_length - 1
                draw = np.random.default_rng([seed, int(fact.example.sample_id[:12], 16), place % samples])
                offset[row, list(fact.subject)] = noise * sigma * draw.standard_normal((len(fact.subject), width))
        at, offset = jax.device_put((at, offset), batch_sharding(model.mesh))
        with jax.default_matmul_precision("highest"):
            hidden, clean = _parts(decoder, ids, lengths, at, None, mesh=model.mesh)
            _, under = _parts(decoder, ids, lengths, at, offset, mesh=model.mesh)
            known, *_ = loss_step(weights, hidden, batch, model.config, NamedSharding(model.mesh, PartitionSpec()))
        if step is not None:
            step(2 * depth)
        held = {**clean, "mlp": under["mlp"]}
        wheres = [_where(at, place, depth) for place in (_SUBJECT, _LAST)]
        made = [
            Variant(slots, Patch(wheres[one.place], one.active, held if one.severed else clean), one.start)
            for one in changes
        ]
        found = sweep(decoder.blocks, weights, made[-1], made, batch, edit=patch, offset=offset, progress=step)
        return np.concatenate([found.losses, np.asarray(known)[None]]), found.tokens

    planned = planned_evaluations([Variant(slots, None, one.start) for one in changes], depth) + 2 * depth
    losses, _, batches = sample_losses(rows, batch_size, model, directory, take, len(changes) + 1, planned, bars)
    p = np.exp(-losses).reshape(len(losses), len(facts), samples).mean(axis=2)
    effects = (p[:-2] - p[-2]).reshape(len(KINDS), depth, len(facts)).swapaxes(1, 2)
    return Traced(p[-1], p[-2], dict(zip(KINDS, effects, strict=True)), sigma, planned, batches)


def window_of(num_layers: int) -> int:
    """Layers of a window where none is asked for: a fifth of L, even."""
    return max(2, 2 * round(num_layers / 10))


def band(score: LayerScores) -> tuple[int, ...]:
    """Layers to edit by ``trace``: those up to its highest, without a gap, that are within 5 % of it; at most five.

    Never layers 0 and 1: there the MLPs of a one-token subject still make its embedding. Empty where the highest is one
    of these.
    """
    highest = int(np.argmax(score.values))
    found: list[int] = []
    for layer in range(highest, max(1, highest - _MOST), -1):
        if score.values[layer] < (1 - _WITHIN) * score.values[highest]:
            break
        found.append(layer)
    return tuple(found[::-1])


def plateau(effects: np.ndarray) -> list[int]:
    """Layers whose mean over the facts is not below the highest one's by two paired standard errors.

    Args:
        effects: ``[F, L]``.
    """
    highest = int(np.argmax(effects.mean(axis=0)))
    below = effects[:, [highest]] - effects
    error = below.std(axis=0, ddof=1) / np.sqrt(len(effects))
    return np.flatnonzero(below.mean(axis=0) <= 2 * error).tolist()


def rises(last: np.ndarray) -> np.ndarray:
    """How far ``trace_last`` rises from the layer below to each, ``[..., L]``; in layer 0, all that there is."""
    return np.diff(last, axis=-1, prepend=0)


def coincidence(rise: np.ndarray, other: LayerScores) -> tuple[float, int]:
    """Whether a curve is low where ``trace_last`` rises: share of the circular shifts of it that are as low there.

    The statistic is the curve's mean, weighted by the rises (those below 0 count nothing).

    Args:
        rise: ``[L]`` of `rises`.
        other: curve, such as ``step`` or ``delta_debiased``; its invalid layers are left out.

    Returns:
        p, and of how many layers; it cannot be below one over that number.
    """
    weight, curve = np.maximum(rise[other.valid], 0), other.values[other.valid]
    found = np.array([weight @ np.roll(curve, shift) for shift in range(len(curve))])
    return float(np.mean(found <= found[0] + 1e-12 * abs(found[0]))), len(curve)


@dataclasses.dataclass(frozen=True, eq=False)
class _Change:
    """What is put back at one layer.

    Attributes:
        start: first layer that is changed.
        place: position that is changed: the subject's last token or the prompt's.
        active: by site, ``[L]`` bool.
        severed: whether the MLPs that are held are held at what they add under the noise.
    """

    start: int
    place: int
    active: dict[str, np.ndarray]
    severed: bool = False


def _changes(depth: int, window: int) -> list[_Change]:
    """Of every kind, a change for each layer."""
    layers, nowhere = np.arange(depth), _nowhere(depth)

    def kind(name: str, layer: int) -> _Change:
        if name in ("mlp", "attn"):
            start = max(0, layer - window // 2)
            inside = (layers >= start) & (layers < layer - window // 2 + window)
            return _Change(start, _SUBJECT, {**nowhere, name: inside})
        if name == "severed":
            return _Change(layer, _SUBJECT, {**nowhere, "block": layers == layer, "mlp": layers > layer}, True)
        return _Change(layer, _LAST if name == "last" else _SUBJECT, {**nowhere, "block": layers == layer})

    return [kind(name, layer) for name in KINDS for layer in range(depth)]


def _nowhere(depth: int) -> dict[str, np.ndarray]:
    return {site: np.zeros(depth, bool) for site in SITES}


def _first_token(example: Example) -> Example:
    """The prompt with the first token of its target."""
    return dataclasses.replace(example, token_ids=example.token_ids[: example.prompt_length + 1])


@functools.partial(jax.jit, static_argnames=("place", "depth"))
def _where(at: jax.Array, place: int, depth: int) -> jax.Array:
    """``[L, B, 2]`` positions of a patch, of which one kind counts."""
    return jnp.broadcast_to(jnp.where(jnp.arange(2) == place, at, -1), (depth, *at.shape))


@functools.partial(jax.jit, static_argnames="mesh")
def _parts(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, at: jax.Array, offset: jax.Array | None, *, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The last state ``[B, T, D]``; and by site, at the positions ``[B, K]``, what halves add and the stream behind.

    The latter are ``[L, B, K, D]``, as `Patch` takes them.
    """

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.take_along_axis(after if site == "block" else after - before, at[..., None], axis=1)

    out = forward(decoder, tokens, lengths=lengths, offset=offset, tap=Tap(read, SITES), mesh=mesh)
    return out.hidden, out.taps


def _mean(kind: str) -> Callable[[Traced], Measured]:
    return lambda found: mean_over(found.effects[kind])


def _recall(found: Traced) -> Measured:
    fall = np.diff(-found.gap, axis=1, prepend=np.nan)  # below layer 0 there is no layer to fall from
    return mean_over(fall)


def _row(score: Callable[[Traced], Any], formula: str, responds: str, blind: str) -> Criterion:
    return Criterion(
        needs="variants",
        direction="high",
        score=score,
        command="trace",
        formula=formula,
        source="arXiv 2202.05262",
        responds=responds,
        blind=blind,
    )


CRITERIA = {
    "trace": _row(
        _mean("stream"),
        "p(target) with the stream at the subject's last token put back, less p under noise on the subject",
        "up to which layer a fact is carried by its subject",
        "where it is made: all layers below its last carry it",
    ),
    "trace_last": _row(
        _mean("last"),
        "the same at the prompt's last token",
        "from which layer on the answer is there: a jump where it arrives",
        "what happens to it afterwards",
    ),
    "trace_mlp": _row(
        _mean("mlp"),
        "the same with what the MLPs of a window of layers add at the subject's last token",
        "MLPs that make a fact of its subject",
        "of one-token subjects, all but the lowest layers: there MLPs make the embedding",
    ),
    "trace_attn": _row(
        _mean("attn"),
        "the same with the attentions of a window",
        "attention that gathers a subject of several tokens",
        "subjects of one token",
    ),
    "trace_recall": _row(
        _recall,
        "how far, from the layer below to this one, that part of trace falls which MLPs above still have to add",
        "MLPs that read a fact out of the stream",
        "attention; layer 0, which has none below",
    ),
}
