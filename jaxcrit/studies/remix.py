"""Other shares for the experts of a mixture, row by row, from rows that the model answers exactly (after C3PO).

The arithmetic is pure functions of arrays: N rows to be tested, M reference rows with exact answers, L layers, E
experts. `tried` runs the trials of one batch through `jaxcrit.evidence.remix`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.core import processes
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.intervals import mcnemar
from jaxcrit.evidence.remix import (
    PRECISION,
    Read,
    descend_step,
    done,
    limited,
    places_of,
    read_step,
    rows_of,
    variant_step,
)
from jaxcrit.evidence.rows import sample_losses
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Bars, Model
from jaxcrit.parallel.mesh import RULES, batch_rows
from jaxcrit.studies.reuse import bounds

METHODS = ("mean", "kernel", "mode", "descent")
BASE, ORACLE, OWN, EVERY = "model as it is", "oracle", "own shares", "mean of all references"
RANDOM_ROWS, RANDOM_LAYERS = ", random references", ", random layers"
BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a row's own shares in ``kernel``; of equal losses the one that changes least
HALF = 0.5  # the same in ``mode``
MEASURES = ("loss", "exact", "blend")
_TINY = 1e-20
_MULTIPLE = 8  # of the width of reference rows
Source = Literal["near", "random", "all", "self"]


@dataclasses.dataclass(frozen=True, eq=False)
class Near:
    """Reference rows of each row, and what they count.

    Attributes:
        places: ``[N, k]`` int, among the M references, nearest first.
        weights: ``[N, k]`` float32, sum 1.
    """

    places: np.ndarray
    weights: np.ndarray

    def of(self, rows: Sequence[int] | np.ndarray) -> Near:
        """Those of some rows; a row beyond the last, which fills up, counts nothing."""
        real = np.asarray(rows) < len(self.places)
        rows = np.where(real, rows, 0)
        return Near(self.places[rows], np.where(real[:, None], self.weights[rows], 0))


def unit(states: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """States ``[N, D]`` less the centre ``[D]``, of length 1; one that is the centre stays 0."""
    apart = np.asarray(states, np.float64) - centre
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), _TINY)


def squared_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[N, M]`` of rows ``[N, ...]`` and ``[M, ...]``."""
    one, other = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (one, other))
    return np.stack([np.square(other - row).sum(axis=1) for row in one])


def nearest(squared: np.ndarray, count: int) -> Near:
    """The nearest references, by a Gaussian kernel whose variance is the median of the squared distances of a row.

    Args:
        squared: ``[N, M]`` squared distances; of equal ones the first come first.
        count: k.
    """
    places = np.argsort(squared, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(squared, places, axis=1)
    kernel = np.exp(-found / np.maximum(2 * np.median(found, axis=1, keepdims=True), _TINY))
    return Near(places, (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32))


def drawn(rows: int, references: int, count: int, seed: int) -> Near:
    """Random references in place of the nearest, all different for a row, that count alike."""
    rng = np.random.default_rng(seed)
    places = np.stack([rng.permutation(references)[:count] for _ in range(rows)])
    return Near(places, np.full(places.shape, 1 / count, np.float32))


def averaged(shares: np.ndarray, near: Near) -> np.ndarray:
    """Weighted mean of the references' shares ``[M, L, E]``: ``[N, L, E]`` float32."""
    return np.einsum("nk,nkle->nle", near.weights, shares[near.places], dtype=np.float64).astype(np.float32)


def mode(own: np.ndarray, shares: np.ndarray, count: int, steps: int, near: Near | None = None) -> np.ndarray:
    """Goes half way to the mean of the nearest references by shares, so many times: ``[N, L, E]`` float32.

    Args:
        own: ``[N, L, E]`` shares, in the layers that move.
        shares: ``[M, L, E]`` the references', in the same layers.
        count: k.
        steps: times.
        near: references in place of the nearest, which are else sought anew at each step.
    """
    for _ in range(steps):
        mean = averaged(shares, near or nearest(squared_distances(own, shares), count))
        own = np.float32(HALF) * own + np.float32(1 - HALF) * mean
    return own


def blend(own: np.ndarray, mean: np.ndarray, part: np.ndarray | float) -> np.ndarray:
    """``part`` of a row's own shares and the rest of the mean; ``[N, L, E]``, ``part`` a number or ``[N]``."""
    part = np.asarray(part, np.float32).reshape(-1, 1, 1)
    return part * own + (1 - part) * mean


def largest(own: np.ndarray, count: int) -> np.ndarray:
    """The largest shares of each layer, ``[..., E]`` bool; all where ``count`` is 0; of equal ones the first."""
    if not count:
        return np.ones(own.shape, bool)
    order = np.argsort(-own, axis=-1, kind="stable")[..., :count]
    found = np.zeros(own.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to choose shares.

    Attributes:
        name: name in results.
        method: one of `METHODS`, or ``own``: the row's own shares put back.
        source: rows it learns from.
        layers: layers whose shares it gives, ascending.
    """

    name: str
    method: str
    source: Source
    layers: tuple[int, ...]

    def evaluations(self, steps: int, depth: int) -> int:
        """How often it runs a block, forward or backward, beside the passes that it shares with others."""
        span = depth - self.layers[0]
        return span * (1 + {"kernel": len(BLENDS), "descent": 2 * steps}.get(self.method, 0))

    @property
    def reads(self) -> bool:
        """Whether it runs the rows that it learns from."""
        return self.method in ("kernel", "descent")


def trials(methods: Sequence[str], layers: tuple[int, ...], others: tuple[int, ...], few: bool = False) -> list[Trial]:
    """The methods, the oracle and all controls.

    Args:
        methods: some of `METHODS`.
        layers: layers that move.
        others: random layers of the same count; empty for none.
        few: whether of methods that run other rows, and of the oracle, there are no random references and layers.
    """
    cheap = [method for method in methods if not few or method in ("mean", "mode")]
    found = [Trial(method, method, "near", layers) for method in methods]
    found += [Trial(ORACLE, "descent", "self", layers), Trial(OWN, "own", "self", layers)]
    found += [Trial(EVERY, "mean", "all", layers)]
    found += [Trial(method + RANDOM_ROWS, method, "random", layers) for method in cheap]
    if others:
        found += [Trial(method + RANDOM_LAYERS, method, "near", others) for method in cheap]
        found += [] if few else [Trial(ORACLE + RANDOM_LAYERS, "descent", "self", others)]
        found += [Trial(OWN + RANDOM_LAYERS, "own", "self", others)]
        found += [Trial(EVERY + RANDOM_LAYERS, "mean", "all", others)]
    return found


def random_layers(depth: int, layers: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """As many layers, drawn, other than these; none where all are taken."""
    if len(layers) == depth:
        return ()
    rng = np.random.default_rng(seed)
    while (found := tuple(sorted(rng.permutation(depth)[: len(layers)].tolist()))) == layers:
        pass
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """Rows under the model as it is.

    Attributes:
        loss: ``[N]`` mean loss of each answer, nats.
        exact: ``[N]`` bool.
        shares: ``[N, L, E]`` float32, at the last prompt token.
        states: ``[N, D]`` float32, mean over the prompt of the stream behind layer ``L // 2``.
    """

    loss: np.ndarray
    exact: np.ndarray
    shares: np.ndarray
    states: np.ndarray

    def of(self, rows: np.ndarray) -> Survey:
        """Some of the rows."""
        return Survey(self.loss[rows], self.exact[rows], self.shares[rows], self.states[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """Rows that the model answers exactly.

    Attributes:
        examples: M rows.
        shares: ``[M, L, E]`` float32.
        near: the nearest of each row that is tested, by states.
        random: random ones.
    """

    examples: Sequence[Example]
    shares: np.ndarray
    near: Near
    random: Near

    @property
    def width(self) -> int:
        """Tokens of the longest, rounded up: one shape for all of them."""
        return -(-max(len(one.token_ids) for one in self.examples) // _MULTIPLE) * _MULTIPLE


@dataclasses.dataclass(frozen=True)
class Asked:
    """How shares are chosen.

    Attributes:
        every: whether they are given at every place of the answer.
        experts: how many of a row's largest experts move; 0 for all.
        neighbours: k.
        steps: steps of ``mode`` and ``descent``.
    """

    every: bool
    experts: int
    neighbours: int
    steps: int


def surveyed(
    model: Model, examples: Sequence[Example], batch_size: int, directory: RunDirectory | None, partial: str, bars: Any
) -> Survey:
    """Runs rows as they are; arguments as of `sample_losses`."""
    mesh, depth, experts = model.mesh, model.config.num_layers, model.config.experts
    decoder, places, size = model.decoder(bars), places_of(examples), depth * experts

    def take(width: int, rows: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        given = [examples[row] if row < len(examples) else None for row in rows]
        with jax.default_matmul_precision(PRECISION):
            read, states = done(read_step(decoder, rows_of(given, width, mesh), first=0, places=places, mesh=mesh))
            found = done(variant_step(decoder, read, *_nothing(depth, len(rows), experts, mesh), mesh=mesh))
        loss, exact, shares, states = processes.whole((*found, states))
        if step is not None:
            step(2 * depth)
        flat = shares.swapaxes(1, 2).reshape(size, -1)
        return np.concatenate([loss[None], exact[None], flat, states.T]), (rows < len(examples)).astype(np.int64)

    batches = _batches(examples, batch_size, mesh)
    known: Any = (examples, batch_size, model, directory, take, 2 + size + model.config.width, 2 * depth, bars)
    found, _, _ = sample_losses(*known, batches=batches, partial=partial)
    shares = found[2 : 2 + size].T.reshape(-1, depth, experts).astype(np.float32)
    return Survey(found[0], found[1] > 0, shares, found[2 + size :].T.astype(np.float32))


def remixed(
    model: Model,
    examples: Sequence[Example],
    references: References,
    wanted: Sequence[Trial],
    asked: Asked,
    *,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> np.ndarray:
    """All trials on all rows; what is done outlives an interruption.

    Args:
        model: a mixture.
        examples: N rows to be tested.
        references: rows with exact answers.
        wanted: V trials, those of the same layers side by side.
        asked: how shares are chosen.
        batch_size: rows at a time; of references k times as many.
        directory: directory of the run; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        `MEASURES` ``[3, 1 + V, N]``: the model as it is, then the trials.

    Raises:
        Preempted: told to leave; what is done is kept.
    """
    decoder, mesh, depth = model.decoder(bars), model.mesh, model.config.num_layers
    places = places_of(examples)

    def take(width: int, rows: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        given = [examples[row] if row < len(examples) else None for row in rows]
        some = dataclasses.replace(references, near=references.near.of(rows), random=references.random.of(rows))
        with jax.default_matmul_precision(PRECISION):
            found = tried(decoder, given, width, places, some, wanted, asked, mesh, step)
        return found.reshape(-1, len(rows)), (rows < len(examples)).astype(np.int64)

    count = len(MEASURES) * (1 + len(wanted))
    cost = planned(wanted, asked.steps, depth)
    known: Any = (examples, batch_size, model, directory, take, count, cost, bars)
    found, _, _ = sample_losses(*known, batches=_batches(examples, batch_size, mesh), partial="partial.npz")
    return found.reshape(len(MEASURES), 1 + len(wanted), -1)


def planned(wanted: Sequence[Trial], steps: int, depth: int) -> int:
    """How often `tried` runs a block, forward or backward: passes over rows to read, the model as it is, and trials."""
    sets = dict.fromkeys(trial.layers for trial in wanted)
    learnt = {(trial.layers, trial.source) for trial in wanted if trial.reads and trial.source != "self"}
    own = sum(depth - layers[0] for layers in sets)
    return depth * (len(sets) + len(learnt)) + own + sum(trial.evaluations(steps, depth) for trial in wanted)


def tried(
    decoder: Decoder,
    tests: Sequence[Example | None],
    width: int,
    places: int,
    references: References,
    wanted: Sequence[Trial],
    asked: Asked,
    mesh: Mesh,
    step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """All trials on one batch.

    Args:
        decoder: a mixture.
        tests: B rows; None fills up.
        width: tokens that they are padded to.
        places: places of their answers, see `places_of`.
        references: rows with exact answers; ``near`` and ``random`` are of these B rows.
        wanted: trials, those of the same layers side by side.
        asked: how shares are chosen.
        mesh: devices.
        step: called with the number of block evaluations just done.

    Returns:
        `MEASURES` ``[3, 1 + V, B]``.
    """
    depth, experts = decoder.config.num_layers, decoder.config.experts
    answers = places_of(references.examples)
    tell = step or (lambda _: None)
    found: list[Any] = []
    reads: dict[Any, Read] = {}
    layers: tuple[int, ...] = ()
    own: np.ndarray = np.zeros(0)
    moved: np.ndarray = np.zeros(0, bool)
    on: np.ndarray = np.zeros(0, bool)
    every = np.bool_(asked.every)

    def run(rows: Sequence[Example | None], wide: int, long: int) -> Read:
        read, _ = done(read_step(decoder, rows_of(rows, wide, mesh), first=layers[0], places=long, mesh=mesh))
        tell(depth)
        return read

    def under(read: Read, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and exactness of rows under shares ``[B, n, E]``."""
        loss, exact, _ = done(variant_step(decoder, read, _placed(shares, mesh), on, every, mesh=mesh))
        tell(len(on))
        return processes.whole((loss, exact))

    def chosen(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
        """Shares ``[B, n, E]`` of a trial, and how much of the own is in them ``[B]``."""
        near = {"near": references.near, "random": references.random}.get(trial.source)
        mine = references.shares[:, layers[0] :]
        nothing = np.zeros(len(tests), np.float32)
        if trial.method == "own":
            return own, np.ones(len(tests), np.float32)
        if trial.source == "all":
            return np.broadcast_to(mine.mean(axis=0, dtype=np.float64).astype(np.float32), own.shape), nothing
        if trial.method == "mode":
            fixed = None if trial.source == "near" else near
            proposed = np.array(own)
            proposed[:, on] = mode(own[:, on], mine[:, on], asked.neighbours, asked.steps, fixed)
            return proposed, nothing
        if trial.method == "mean":
            assert near is not None
            return averaged(mine, near), nothing
        if trial.source not in reads:
            assert near is not None
            some = [references.examples[place] for place in near.places.ravel()]
            reads[trial.source] = run(some, references.width, answers)
        read = reads[trial.source]
        weights = np.ones((len(tests), 1), np.float32) if near is None else near.weights
        if trial.method == "descent":
            begin = (_placed(own, mesh), _placed(moved, mesh), weights, on, every, np.int32(asked.steps))
            shares = done(descend_step(decoder, read, *begin, mesh=mesh))
            tell(2 * asked.steps * len(on))
            return np.asarray(shares).swapaxes(0, 1), nothing
        assert near is not None
        mean, losses = averaged(mine, near), []
        for part in BLENDS:
            mixed = np.asarray(limited(own, blend(own, mean, part), moved))
            loss, _ = under(read, np.repeat(mixed, weights.shape[1], axis=0))
            losses.append((loss.reshape(weights.shape) * weights).sum(axis=1))
        best = np.array(BLENDS, np.float32)[np.argmin(losses, axis=0)]
        return blend(own, mean, best), best

    for trial in wanted:
        if trial.layers != layers:
            layers, reads = trial.layers, {}
            span = depth - layers[0]
            on = np.isin(np.arange(layers[0], depth), layers)
            reads["self"] = run(tests, width, places)
            off = _nothing(span, len(tests), experts, mesh)
            base = processes.whole(done(variant_step(decoder, reads["self"], *off, mesh=mesh)))
            own, moved = base[2].swapaxes(0, 1), largest(base[2].swapaxes(0, 1), asked.experts)
            tell(span)
            if not found:
                found.append((*base[:2], np.ones(len(tests))))
        proposed, part = chosen(trial)
        found.append((*under(reads["self"], np.asarray(limited(own, proposed, moved))), part))
    return np.stack([np.stack([np.asarray(one, np.float64) for one in several]) for several in found], axis=1)


def told(measures: np.ndarray, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Each variant beside the model as it is, over the same rows.

    Args:
        measures: `MEASURES` ``[3, V, N]``, the model as it is first.
        names: V names.
        seed: seed of the bootstrap.

    Returns:
        JSON values of each: ``exact`` (share of rows) and ``loss``; ``won`` and ``lost`` answers with McNemar's ``p``;
        ``exact_change`` and ``loss_change``, each with the ends of its 95 % interval over rows.
    """
    loss, exact = measures[0], measures[1]
    rows = np.arange(loss.shape[1])
    changes = {"exact_change": exact - exact[:1], "loss_change": loss - loss[:1]}
    ends = {key: [bounds(change, rows, seed, level) for level in (0.025, 0.975)] for key, change in changes.items()}
    found = []
    for place, name in enumerate(names):
        won, lost = (int(((exact[place] - exact[0]) == sign).sum()) for sign in (1, -1))
        found.append(
            {
                "name": name,
                "exact": float(exact[place].mean()),
                "loss": float(loss[place].mean()),
                "won": won,
                "lost": lost,
                "p": mcnemar(won, lost),
                **{
                    key: [float(change[place].mean()), *(float(end[place]) for end in ends[key])]
                    for key, change in changes.items()
                },
            }
        )
    return found


def room(oracle: Mapping[str, Any]) -> bool:
    """Whether descent on the rows' own answers wins more of them than chance would."""
    return bool(oracle["won"] > oracle["lost"] and oracle["p"] < 0.05)


def _batches(examples: Sequence[Example], batch_size: int, mesh: Mesh) -> list[tuple[np.ndarray, int]]:
    """Places of the rows of each batch, and the width that they are padded to."""
    batches = make_batches(examples, batch_rows(batch_size, mesh), prompt_only=False)
    return [(batch.rows, batch.tokens.shape[1]) for batch in batches]


def _placed(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Shares ``[B, n, E]`` on the devices, as ``[n, B, E]``."""
    place = NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))
    return jax.device_put(np.ascontiguousarray(array.swapaxes(0, 1)), place)


def _nothing(span: int, rows: int, experts: int, mesh: Mesh) -> tuple[jax.Array, np.ndarray, np.bool_]:
    """Arguments of `variant_step` that give no shares."""
    return _placed(np.zeros((rows, span, experts), np.float32), mesh), np.zeros(span, bool), np.bool_(False)
