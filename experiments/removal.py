"""What components say, over a whole dataset: every prompt answered without each set of components, at each layer.

Beside the sets stand their controls: other components, random directions of the same length (``random:SET``), and the
same sets at layers that are not critical. One prefill of a batch serves all of them, and all are data of one program.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells
from rationale import BEFORE, rationale

from jaxcrit.commands.intervene import (
    critical_layers,
    described,
    lens,
    parse_components,
    removal,
    states,
)
from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import BY_HASH, SHAPE, WHERE, BatchOptions, MeshOptions, ModelOptions, RowOptions
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.options import determining, option
from jaxcrit.core.run import versions
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.data.batches import Batch, make_batches
from jaxcrit.data.dataset import Dataset
from jaxcrit.evaluation.losses import divergence
from jaxcrit.evaluation.scorers import exact_match
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.generation import compiled_programs, decode, prefill
from jaxcrit.models.interventions import Intervention, edit, intervention
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.models.stops import stop_tokens
from jaxcrit.similarity import Components, principal_components

RANDOM = "random:"
_DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemovalOptions(ModelOptions, RowOptions, BatchOptions, MeshOptions, title="removal"):
    """What ``experiments/pc_removal.py`` is asked."""

    data: str = option("demo:arithmetic,demo:choice", "prompts: JSONL, dolly:JSONL, ...", word="FILE", free=BY_HASH)
    limit: int = option(300, "first N rows of each dataset only; 0 for all", lowest=0, free=BY_HASH)
    layers: str = option("all", "layers that are edited, one at a time", word="SPEC")
    critical: str = option("critical", "layers that count as critical", word="SPEC")
    sets: str = option("0;0,1,2;3,4,5;random:0,1,2", "components removed together, apart by ;", word="SETS")
    mode: str = option("paper", "the prompt's part, or the state's own", ("paper", "project"))
    prompt_index: int = option(101, "row of the prompt whose answers are kept as an example", lowest=0)
    seed: int = option(0, "seed of random directions and of the bootstrap", lowest=0)
    max_new_tokens: int = option(32, "tokens of each answer, at most", lowest=1, group="generation")
    stop: str = option("", "more tokens that end an answer", word="TOKENS", group="generation")
    batch_size: int = option(64, "prompts at a time", lowest=1, free=SHAPE)
    out: str = option("", "directory for removal.json and figures (default: none)", word="DIR", free=WHERE)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One set removed at one layer, or nothing (layer None). Means over the prompts come as (mean, low, high).

    Attributes:
        layer: that was edited.
        name: name of the set.
        n: prompts.
        changed: answers that differ from those without removal.
        exact: answers that equal the reference; None where there is none.
        rationale: answers with reasons before the conclusion (`rationale`).
        ended: answers that came to an end by themselves.
        exact_change: mean of exact match after less before; None without references.
        length_change: mean of tokens after less before.
        kl: mean KL of the next token, before to after, in nats.
        removed: mean length of what was subtracted from the last prompt token, relative to its distance from the mean.
    """

    layer: int | None
    name: str
    n: int
    changed: int
    exact: int | None
    rationale: int
    ended: int
    exact_change: tuple[float, float, float] | None
    length_change: tuple[float, float, float]
    kl: tuple[float, float, float]
    removed: float


@dataclasses.dataclass(frozen=True, eq=False)
class Removal:
    """What one dataset says.

    Attributes:
        dataset: its source.
        critical: the layers that count as critical.
        plain: nothing removed.
        cells: every layer and set.
        contrasts: differences between cells, paired by prompt: per set, ``critical - others`` over the layers, and
            ``set - random`` for sets with a random control, each by measure (mean, low, high).
        example: prompt, and by layer and set its answer.
        lens: by layer and component, the tokens it is read as.
        variance: by layer, shares of the components.
        warnings: what would mislead a reader.
        buckets: batch shapes.
        compiled: prefills and loops compiled for them.
        seconds: wall time of the call that ended it; what batches took is in times.json.
        cpu_seconds: CPU seconds of that call, of all cores together, which other work on the machine does not lengthen.
    """

    dataset: str
    critical: LayerSet
    plain: Cell
    cells: list[Cell]
    contrasts: dict[str, dict[str, dict[str, tuple[float, float, float]]]]
    example: dict[str, Any]
    lens: dict[str, Any]
    variance: dict[str, Any]
    warnings: list[str]
    buckets: int
    compiled: tuple[int, int]
    seconds: float
    cpu_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "critical": list(self.critical.layers)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Outcomes:
    """Answers of one cell, in the order of the rows."""

    token_ids: list[list[int]]
    stopped: np.ndarray
    kl: np.ndarray

    @classmethod
    def empty(cls, count: int) -> _Outcomes:
        return cls([[]] * count, np.zeros(count, bool), np.zeros(count))

    def put(self, rows: np.ndarray, made: Mapping[str, Any]) -> None:
        """Puts what a batch gave of these rows where it belongs."""
        for row, ids in zip(rows, made["token_ids"], strict=True):
            self.token_ids[row] = ids
        self.stopped[rows], self.kl[rows] = made["stopped"], made["kl"]


Place = tuple[int | None, str]
Keep = Callable[[str, Callable[[], Mapping[str, Any]]], Mapping[str, Any]]  # what a batch gave, once made
_PLAIN: Place = (None, "nothing")


def run_removal(config: RemovalOptions, *, progress: Bars | None = None) -> tuple[list[Removal], dict[str, Any]]:
    """Measures every dataset. What batches gave is kept in OUT, and not made again.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Returns:
        A result per dataset, and what they were computed with and took.

    Raises:
        UserError: any mistake in flags, checkpoint or data; OUT was begun with other settings.
    """
    sets = parse_sets(config.sets)
    model = open_model(config.model, mesh=config.mesh, dtype=config.dtype)
    layers = resolve(LayerSpec.parse(config.layers), model.config.num_layers).layers
    stop = stop_tokens(config.stop, model, config.template)
    datasets = model.read(config, reserve=config.max_new_tokens)
    decoder = model.decoder(progress)
    computed: dict[str, Any] = {"model_hash": model.model_hash, "versions": versions()}
    cells: Cells | None = None
    if config.out:
        hashes = [sha256_json(one.sample_ids) for one in datasets]
        settings = determining(config) | {"model_hash": model.model_hash, "data_hashes": hashes}
        cells = Cells.open(Path(config.out), settings)
    keep: Keep = cells or _unkept
    found = [_dataset(config, model, decoder, one, sets, layers, stop, keep, progress) for one in datasets]
    if cells is not None:
        computed["time"] = cells.spent()
    return found, computed


def _unkept(name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    return make()


def parse_sets(text: str) -> dict[str, tuple[int, ...]]:
    """Reads ``0;0,1,2;random:0,1,2``: components by name of the set.

    Raises:
        UserError: not of that form, or no set.
    """
    names = [name.strip() for name in text.split(";") if name.strip()]
    sets = {name: parse_components(name.removeprefix(RANDOM), "sets") for name in names}
    if not sets or not all(sets.values()):
        raise UserError(f"--sets={text}: expected sets of components such as 0;0,1,2;random:0,1,2")
    return sets


def _dataset(
    config: RemovalOptions,
    model: Model,
    decoder: Decoder,
    dataset: Dataset,
    sets: Mapping[str, tuple[int, ...]],
    layers: Sequence[int],
    stop: list[int],
    keep: Keep,
    progress: Bars | None,
) -> Removal:
    began, cpu, compiled = time.perf_counter(), time.process_time(), compiled_programs()
    hidden = states(decoder, dataset, model, progress)
    critical = critical_layers(LayerSpec.parse(config.critical), hidden, model)
    fit = principal_components(hidden, 1 + max(max(components) for components in sets.values()))
    named = [components for name, components in sets.items() if not name.startswith(RANDOM)]
    warnings = list(dict.fromkeys(text for components in named for text in fit.unidentified(components, layers)))
    shifts: dict[Place, np.ndarray] = {
        (layer, name): _random_part(fit.part(components)[layer], [config.seed, layer])
        for layer in layers
        for name, components in sets.items()
        if name.startswith(RANDOM)
    }
    places: list[Place] = [(layer, name) for layer in layers for name in sets]
    count = len(dataset.examples)
    outcomes = {place: _Outcomes.empty(count) for place in (_PLAIN, *places)}
    budget = model.budget(config.batch_size, passes=len(outcomes), new_tokens=config.max_new_tokens)
    batches = make_batches(dataset.examples, budget)
    bar = None if progress is None else progress(total=count * len(outcomes), desc=f"{dataset.name} removal")
    done = 0  # answers that the bar has seen, a kept batch in one

    def advance(to: int) -> None:
        nonlocal done
        if bar is not None:
            bar.update(to - done)
        done = to

    def answered(batch: Batch, real: np.ndarray) -> dict[str, Any]:
        rows, samples = np.where(real, batch.rows, 0), np.where(real, batch.rows, -1)
        shape = (model.config.num_layers, len(real), model.config.width)
        prompts = prefill(decoder, batch.tokens, batch.lengths, config.max_new_tokens, mesh=model.mesh)
        before, made = None, []
        for edits in _edits(fit, sets, shifts, places, config.mode, shape, rows):
            found = decode(decoder, prompts, stop=stop, samples=samples, edit=edit, edits=edits)
            before = before or found
            kl = processes.whole(divergence(before.scores, found.scores))[real]
            ids = [found.token_ids[at] for at in np.flatnonzero(real)]
            made.append({"token_ids": ids, "stopped": found.stopped[real].tolist(), "kl": kl.tolist()})
            advance(done + len(ids))
        return {"places": made}

    for batch in batches:  # a cell each; batches of another size are other cells
        real, before = batch.rows < count, done
        ours = batch.rows[real]
        name = f"{dataset.name}-{sha256_json([dataset.sample_ids, ours.tolist()])[:12]}"
        made = keep(name, functools.partial(answered, batch, real))["places"]
        for into, one in zip(outcomes.values(), made, strict=True):
            into.put(ours, one)
        advance(before + len(ours) * len(outcomes))
    if bar is not None:
        bar.close()
    measures = _Measures(config, model, dataset, outcomes)
    cells = [measures.cell(place, _removed(fit, sets, place)) for place in places]
    index = config.prompt_index % count
    everything = sorted({component for components in sets.values() for component in components})
    return Removal(
        dataset.source,
        critical,
        measures.cell(_PLAIN, 0.0),
        cells,
        measures.contrasts(sets, layers, critical),
        measures.example(index),
        {str(layer): lens(decoder, fit.directions[layer][everything], model.tokenizer) for layer in layers},
        described(fit, layers, everything),
        warnings,
        len({batch.tokens.shape for batch in batches}),
        tuple(after - before for before, after in zip(compiled, compiled_programs(), strict=True)),  # type: ignore[arg-type]
        round(time.perf_counter() - began, 1),
        round(time.process_time() - cpu, 1),
    )


def _edits(
    fit: Components,
    sets: Mapping[str, tuple[int, ...]],
    shifts: Mapping[Place, np.ndarray],
    places: Sequence[Place],
    mode: str,
    shape: tuple[int, int, int],
    rows: np.ndarray,
) -> Iterator[Intervention]:
    rank = fit.directions.shape[1]
    yield intervention(shape, rank=rank)
    for place in places:
        layer, name = place
        assert layer is not None
        if place in shifts:
            yield intervention(shape, shifts={layer: -shifts[place][rows]}, rank=rank)
        else:
            yield removal(fit, [layer], sets[name], mode, rows)


def _random_part(part: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """For every sample a random direction, as long as what the components have of it: ``[N, D]``."""
    drawn = np.random.default_rng(seed).standard_normal(part.shape)
    lengths = np.linalg.norm(part, axis=1, keepdims=True)
    return (drawn * lengths / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def _removed(fit: Components, sets: Mapping[str, tuple[int, ...]], place: Place) -> float:
    layer, name = place
    chosen = list(sets[name])
    part = np.linalg.norm(fit.coordinates[layer][:, chosen], axis=1)
    whole = np.sqrt((fit.spectrum.singular_values[layer] ** 2).sum() / len(part))
    return float(np.sqrt((part**2).mean()) / whole)


class _Measures:
    """Numbers of the cells, and their intervals: one bootstrap over the prompts for all, so that all are paired."""

    def __init__(self, config: RemovalOptions, model: Model, dataset: Dataset, outcomes: dict[Place, _Outcomes]):
        self.dataset, self.outcomes, count = dataset, outcomes, len(dataset.examples)
        rng = np.random.default_rng(config.seed)
        self.weights = rng.multinomial(count, np.full(count, 1 / count), _DRAWS) / count
        decode_ids = model.tokenizer.batch_decode
        self.texts = {place: decode_ids(one.token_ids, skip_special_tokens=True) for place, one in outcomes.items()}
        gold = [one.response for one in dataset.examples]
        known = None not in gold
        before = outcomes[_PLAIN].token_ids
        self.values: dict[str, dict[Place, np.ndarray]] = {
            "changed": {
                place: np.array([a != b for a, b in zip(one.token_ids, before, strict=True)], float)
                for place, one in outcomes.items()
            },
            "rationale": {
                place: np.array([rationale(text) == BEFORE for text in texts], float)
                for place, texts in self.texts.items()
            },
            "length": {place: np.array([len(ids) for ids in one.token_ids], float) for place, one in outcomes.items()},
            "kl": {place: one.kl for place, one in outcomes.items()},
        }
        if known:
            wanted = [str(text) for text in gold]
            self.values["exact"] = {
                place: exact_match(texts, wanted).astype(float) for place, texts in self.texts.items()
            }

    def interval(self, values: np.ndarray) -> tuple[float, float, float]:
        """Mean over the prompts, and its 95 % percentile interval."""
        low, high = np.quantile(self.weights @ values, [0.025, 0.975])
        return round(float(values.mean()), 6), round(float(low), 6), round(float(high), 6)

    def cell(self, place: Place, removed: float) -> Cell:
        """The numbers of one cell."""
        values, exact = self.values, self.values.get("exact")
        return Cell(
            *place,
            len(self.dataset.examples),
            int(values["changed"][place].sum()),
            None if exact is None else int(exact[place].sum()),
            int(values["rationale"][place].sum()),
            int(self.outcomes[place].stopped.sum()),
            None if exact is None else self.interval(exact[place] - exact[_PLAIN]),
            self.interval(values["length"][place] - values["length"][_PLAIN]),
            self.interval(values["kl"][place]),
            round(removed, 4),
        )

    def contrasts(
        self, sets: Mapping[str, tuple[int, ...]], layers: Sequence[int], critical: LayerSet
    ) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
        """Differences of means over layers, paired by prompt."""
        chosen = [layer for layer in layers if layer in critical.layers]
        others = [layer for layer in layers if layer not in critical.layers]

        def mean(measure: str, name: str, over: Sequence[int]) -> np.ndarray:
            return np.mean([self.values[measure][layer, name] for layer in over], axis=0)

        found: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
        for name in sets:
            found[name] = {}
            if chosen and others:
                found[name]["critical - others"] = {
                    measure: self.interval(mean(measure, name, chosen) - mean(measure, name, others))
                    for measure in self.values
                }
            if (control := RANDOM + name) in sets:
                found[name]["set - random"] = {
                    measure: self.interval(mean(measure, name, layers) - mean(measure, control, layers))
                    for measure in self.values
                }
        return found

    def example(self, index: int) -> dict[str, Any]:
        """One prompt and all its answers."""
        answers: dict[str, dict[str, str]] = {}
        for (layer, name), texts in self.texts.items():
            answers.setdefault("none" if layer is None else str(layer), {})[name] = texts[index]
        return {"prompt_index": index, "prompt": self.dataset.examples[index].prompt, "answers": answers}
