"""``jaxcrit trace``: where a model keeps facts, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BatchOptions, FactOptions, MeshOptions, ModelOptions, OutOptions
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.options import option
from jaxcrit.core.schema import Array, AtLeastZero, Count, conform
from jaxcrit.core.selections import span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.core.run import Run
    from jaxcrit.criteria.trace import Traced
    from jaxcrit.data.facts import Fact, Placed
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

FEWEST = 5
TRACE = "trace.npz"
BESIDE_IT = "it stands beside what is found"
BESIDE = ("delta_debiased", "step")  # scores of analyze that the jump of trace_last is set beside
CAVEATS = (
    "An effect is what comes back of the probability of the target's first token when one thing is put back.",
    "Standard errors are the jackknife over facts; the draws of the noise are averaged within each fact.",
    "A high effect says that a layer carries a fact, not that it is made or can be changed there alone.",
    "Facts that the model does not say by itself are left out, so nothing is learnt about them.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceOptions(ModelOptions, FactOptions, OutOptions, BatchOptions, MeshOptions, title="trace"):
    """What ``jaxcrit trace`` is asked."""

    limit: int = option(0, "so many of the known facts, evenly over the file; 0: all", lowest=0)
    noise: float = option(3.0, "noise on the subject, in deviations of its embeddings", above=0)
    samples: int = option(8, "draws of the noise for each fact", lowest=1)
    window: int = option(0, "layers whose MLPs or attentions are put back; 0 for a fifth", lowest=0)
    seed: int = option(0, "seed of the noise", lowest=0)
    scores: str = option("", "scores.json of jaxcrit analyze, to set beside the jump", word="FILE", free=BESIDE_IT)


OPTIONS = TraceOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What a trace found.

    Attributes:
        scores: scores by key: ``trace``, ``trace_last``, ``trace_mlp``, ``trace_attn``, ``trace_recall``.
        layers: layers to edit (rule ``trace:band``); None where there are none.
        run: content of ``run.json``.
        warnings: what the user should know.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    layers: LayerSet | None
    run: Mapping[str, Any]
    warnings: Sequence[str]
    out: Path | None


def run(options: TraceOptions) -> int:
    """Traces, writes the run directory, prints the report."""
    return shared.show(run_trace, report, options)


@shared.public
def trace(
    model: Any = "", facts: Any = "", *, out: str | Path = "", progress: Bars | None = None, **options: Any
) -> Trace:
    """Traces where a model keeps facts.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        facts: a file of facts, or a list of dicts as in one; empty for the bundled ones.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `TraceOptions`.

    Raises:
        UserError: a mistake in options, checkpoint or facts, or fewer than five facts that the model knows.
    """
    asked = shared.options_for(TraceOptions, out, options)
    return run_trace(asked, model=model, facts=facts, progress=progress, keep=bool(out))


def run_trace(
    options: TraceOptions, *, model: Any = None, facts: Any = None, progress: Bars | None = None, keep: bool = True
) -> Trace:
    """`trace` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, what a complete one has found is taken.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.run import running
    from jaxcrit.criteria.trace import band, traced, window_of
    from jaxcrit.data.dataset import MEMORY, Dataset
    from jaxcrit.data.facts import placed
    from jaxcrit.evidence.rows import write_scored

    opened = shared.opened(options, model)
    given = shared.facts_of(options, facts)
    depth, every = opened.config.num_layers, placed(given, opened.tokenizer, truth=True)
    source = options.facts or ("bundled" if facts is None or facts == "" else MEMORY)
    dataset = Dataset("facts", source, [one.example for one in every])
    beside = _beside(options.scores, opened)
    with running(
        "trace",
        options,
        models={"model": opened},
        datasets=[dataset],
        resolved={"window": options.window or window_of(depth)},
        keep=keep,
    ) as run:
        if run.complete:
            facts, known, found = _kept(run, given, every, depth)
        else:
            facts, known = _known(opened, given, every, options, progress)
            found = traced(
                opened,
                known,
                noise=options.noise,
                samples=options.samples,
                window=options.window or window_of(depth),
                seed=options.seed,
                batch_size=options.batch_size,
                directory=run.directory,
                bars=progress,
            )
        scores = _scores(opened, options, facts, found)
        to_edit = band(scores["trace"])
        chosen = LayerSet(to_edit, "trace", "trace:band", depth, opened.model_hash) if to_edit else None
        run.record["result"] = _result(opened, options, found, facts, len(given), beside)
        run.record["warnings"] = _warnings(facts, known, found, chosen)
        made = Trace(scores, chosen, run.record, run.record["warnings"], run.out)
        if made.out is not None:
            write_scored(made.out, scores)
            _write(made.out, found, facts, known)
            if chosen is not None:
                chosen.save(made.out / "layers.json")
            report(made, beside).write(made.out, made.run)
    return made


class Cost(TypedDict):
    """``block_evaluations`` of ``result``."""

    batch: Count


class Result(TypedDict):
    """``result`` of ``run.json``, as far as it is not found anew."""

    sigma: AtLeastZero
    batches: Count
    block_evaluations: Cost


class TracedRun(TypedDict):
    """``run.json`` of a complete run."""

    result: Result


def _known(
    model: Model, facts: Sequence[Fact], every: Sequence[Placed], options: TraceOptions, bars: Bars | None
) -> tuple[list[Fact], list[Placed]]:
    """The facts whose first token the model says by itself.

    Raises:
        UserError: there are too few.
    """
    from jaxcrit.evidence.completions import completions

    examples = [one.example for one in every]
    said = completions(model, model.decoder(bars), examples, max(32, options.batch_size), bars).said
    first = np.array([example.token_ids[example.prompt_length] for example in examples])
    places = np.flatnonzero(said == first).tolist()
    if len(places) < FEWEST:
        missed = [
            f"{facts[place].text!r} (it says {model.tokenizer.decode([int(said[place])])!r})"
            for place in np.flatnonzero(said != first).tolist()
        ]
        raise UserError(
            f"--facts={options.facts or 'bundled'}: the model knows {len(places)} of {len(facts)} facts, and {FEWEST}"
            f" are needed; it does not know {listed(missed, 3)}; give facts that it completes by itself"
        )
    if options.limit and options.limit < len(places):
        evenly = np.linspace(0, len(places) - 1, options.limit).round().astype(int)
        places = [places[number] for number in evenly]
    return [facts[place] for place in places], [every[place] for place in places]


def _kept(
    run: Run, facts: Sequence[Fact], every: Sequence[Placed], depth: int
) -> tuple[list[Fact], list[Placed], Traced]:
    """What a complete run has found, and of which facts."""
    from jaxcrit.core import processes
    from jaxcrit.core.files import DAMAGED
    from jaxcrit.criteria.trace import KINDS, Traced

    path, place = run.path / TRACE, {fact.sample_id: number for number, fact in enumerate(facts)}
    ids = processes.share(lambda: read_trace(path, depth)["sample_ids"].tolist())
    arrays = read_trace(path, depth) if processes.first() else {}
    if len(set(ids)) < max(FEWEST, len(ids)) or not set(ids) <= place.keys():
        raise UserError(f"{path}: expected {FEWEST} of the facts or more, each once, got others; {DAMAGED}")
    p, corrupted, *effects = (processes.share_array(arrays.get(name)) for name in ("p", "corrupted", *KINDS))
    result = conform(run.earlier, TracedRun, str(run.path / "run.json"), DAMAGED)["result"]
    cost = result["block_evaluations"]["batch"], result["batches"]
    found = Traced(p, corrupted, dict(zip(KINDS, effects, strict=True)), result["sigma"], *cost)
    return [facts[place[one]] for one in ids], [every[place[one]] for one in ids], found


def read_trace(path: Path, num_layers: int) -> dict[str, np.ndarray]:
    """Reads ``trace.npz``: effects ``[F, L]`` by kind, ``p`` and ``corrupted`` ``[F]``, and which facts these are.

    Raises:
        UserError: absent, damaged, or of another model; numbers that are not finite.
    """
    from jaxcrit.core.files import DAMAGED, Npz, read_npz
    from jaxcrit.criteria.trace import KINDS

    holds = {"sample_ids": Array("U", ("F",)), **dict.fromkeys(("p", "corrupted"), Array("f", ("F",)))}
    holds |= dict.fromkeys(KINDS, Array("f", ("F", "L")))
    found, _ = read_npz(path, Npz("jaxcrit.trace", holds), L=num_layers)
    if not all(np.isfinite(one).all() for one in found.values() if one.dtype.kind == "f"):
        raise UserError(f"{path}: expected finite numbers, got NaN or infinity; {DAMAGED}")
    return found


def _scores(model: Model, options: TraceOptions, facts: Sequence[Fact], found: Traced) -> dict[str, LayerScores]:
    from jaxcrit.criteria.trace import CRITERIA

    ids = [fact.sample_id for fact in facts]
    meta = {**model.facts, "num_samples": len(facts), "noise": options.noise, "draws": options.samples}
    scores = {}
    for key, criterion in CRITERIA.items():
        scores[key] = criterion.scores(key, criterion.measured(found, {}), meta, ids)
    return scores


def _result(
    model: Model,
    options: TraceOptions,
    found: Traced,
    facts: Sequence[Fact],
    asked: int,
    beside: Mapping[str, LayerScores],
) -> dict[str, Any]:
    from jaxcrit.criteria.trace import coincidence, plateau, rises

    rise, depth = rises(found.effects["last"].mean(axis=0)), model.config.num_layers
    halves = {kind: _halves(found.effects[kind]) for kind in ("stream", "last", "mlp", "attn")}
    near = {}
    for key, score in beside.items():
        p, count = coincidence(rise, score)
        jump = int(np.argmax(rise))
        rank = int((score.values[score.valid] < score.values[jump]).sum()) if score.valid[jump] else None
        near[key] = {"value": score.to_json()["values"][jump], "rank": rank, "p": p, "layers": count}
    return {
        "facts": asked,
        "traced": len(facts),
        "p": float(found.p.mean()),
        "corrupted": float(found.corrupted.mean()),
        "total_effect": float(found.total.mean()),
        "weakly_corrupted": int((found.corrupted > found.p / 2).sum()),
        "sigma": found.sigma,
        "plateau": plateau(found.effects["stream"]),
        "jump": int(np.argmax(rise)),
        "jump_size": float(rise.max()),
        "halves": halves,
        "beside": near,
        "block_evaluations": {"batch": found.evaluations, "forward_passes": found.evaluations / depth},
        "batches": found.batches,
    }


def _halves(effects: np.ndarray) -> dict[str, Any]:
    """Whether two halves of the facts, every other one, show the same curve."""
    halves = effects[::2].mean(axis=0), effects[1::2].mean(axis=0)
    same = all(np.ptp(half) > 0 for half in halves)
    return {
        "r": float(np.corrcoef(*halves)[0, 1]) if same else None,
        "peaks": [int(np.argmax(half)) for half in halves],
    }


def _warnings(facts: Sequence[Fact], known: Sequence[Placed], found: Traced, chosen: LayerSet | None) -> list[str]:
    told = []
    weak = [fact.text for fact, p, under in zip(facts, found.p, found.corrupted, strict=True) if under > p / 2]
    if weak:
        told.append(
            f"the noise leaves {len(weak)} of {len(facts)} facts more than half of their probability"
            f" ({listed(weak, 2)}); raise --noise"
        )
    ending = sum(one.subject[-1] == one.example.prompt_length - 1 for one in known)
    if ending:
        told.append(
            f"of {ending} of {len(facts)} facts the subject ends the prompt, so that trace and trace_last are the same"
        )
    first = sum(one.subject[-1] == 0 for one in known)
    if first:
        told.append(
            f"the subject of {first} of {len(facts)} facts is the first token of its row, where many models keep states"
            " of huge length; put a word in front"
        )
    if chosen is None:
        told.append("trace is highest in layer 0 or 1, so that no layers are named to edit")
    return told


def _write(out: Path, found: Traced, facts: Sequence[Fact], known: Sequence[Placed]) -> None:
    from jaxcrit.core.files import write_npz

    arrays = {
        **{kind: effects for kind, effects in found.effects.items()},
        "p": found.p,
        "corrupted": found.corrupted,
        "subjects": np.array([[one.subject.start, one.subject.stop] for one in known]),
        "sample_ids": np.array([fact.sample_id for fact in facts]),
        "texts": np.array([fact.text for fact in facts]),
        "relations": np.array([fact.relation for fact in facts]),
    }
    write_npz(out / TRACE, arrays, {"format": "jaxcrit.trace", "format_version": 1, "axes": "facts, layers"})


def _beside(path: str, model: Model) -> dict[str, LayerScores]:
    """Scores of ``jaxcrit analyze`` of the same model.

    Raises:
        UserError: they are of another model, or none of those that are set beside the trace.
    """
    from jaxcrit.core.layers import read_scores

    if not path:
        return {}
    scores = {key: score for key, score in read_scores(path).items() if key in BESIDE}
    if not scores:
        raise UserError(f"--scores={path}: expected some of {', '.join(BESIDE)}, as jaxcrit analyze writes them")
    for key, score in scores.items():
        theirs = score.meta.get("model_hash", model.model_hash)
        if score.num_layers != model.config.num_layers or theirs != model.model_hash:
            raise UserError(
                f"--scores={path}: {key} is of another model ({score.num_layers} layers, {str(theirs)[:12]}); this one"
                f" has {model.config.num_layers} layers and is {model.model_hash[:12]}"
            )
    return scores


def report(found: Trace, beside: Mapping[str, LayerScores] | None = None) -> Report:
    """Effects of every layer, three panels, where the answer arrives."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section

    result, layers = found.run["result"], found.layers.layers if found.layers else ()
    figure = Figure(
        "trace.png",
        lambda canvas: plots.trace_panels(found.scores, layers, result["jump"], beside or {}, canvas),
        "What comes back of the target's probability: at the subject, with windows of MLPs and attentions, and at the"
        " prompt's last token.",
        (6.2, 11.2 if beside else 8.6),
    )
    section = Section("Effects by layer", "", lambda style: _table(found, style), [figure])
    return Report(_sentences(found), found.warnings, [section], CAVEATS, follows=found.layers is not None)


def _table(found: Trace, style: bool) -> str:
    named = [(layer, "◀ trace:band") for layer in (found.layers.layers if found.layers else ())]
    named.append((found.run["result"]["jump"], "◀ the answer arrives"))
    return tables.by_layer(tables.estimates(found.scores), named, style)


def _sentences(found: Trace) -> list[str]:
    result, scores = found.run["result"], found.scores
    depth, jump = scores["trace"].num_layers, result["jump"]
    highest = int(scores["trace"].ranking()[0])
    told = [
        f"The answer arrives at the last token in layer {jump} of {depth}, where trace_last rises by"
        f" {result['jump_size']:.3f}",
        f"{result['traced']} facts, of {result['facts']}: probability {result['p']:.3f}, under the noise"
        f" {result['corrupted']:.3f}",
        f"At the subject, trace is highest in layer {highest}: {tables.estimate(scores['trace'], highest)}",
    ]
    if len(result["plateau"]) > 1:
        told.append(f"It is as high, within two standard errors of the difference, in layers {span(result['plateau'])}")
    if found.layers:
        told.append(f"Layers to edit: {', '.join(map(str, found.layers.layers))} (trace:band, layers.json)")
    halves = result["halves"]
    told.append(
        "Halves of the facts agree: "
        + "; ".join(
            f"{kind} r {'-' if one['r'] is None else format(one['r'], '.2f')}, highest in"
            f" {one['peaks'][0]} and {one['peaks'][1]}"
            for kind, one in halves.items()
        )
    )
    for key, one in result["beside"].items():
        if one["value"] is not None:
            told.append(
                f"{key} is {one['value']:.4f} in layer {jump}, with {one['rank']} of {one['layers']} layers lower; p"
                f" {one['p']:.3f} of the circular shifts, which cannot be below {1 / one['layers']:.3f}"
            )
    cost = result["block_evaluations"]
    told.append(
        f"cost: {result['batches']} batches, each of as many block evaluations as {cost['forward_passes']:.0f} passes"
    )
    return told
