"""``jaxcrit finetune``: trains exactly the layers that are chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.layers import ChosenLayers, LayerSet
from jaxcrit.core.rundir import CountedRows
from jaxcrit.core.schema import AtLeastZero, Count
from jaxcrit.core.selections import LayerSpec, resolve

if TYPE_CHECKING:
    from jaxcrit.commands.score import Scored
    from jaxcrit.core.progress import Say
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.data.steps import Steps
    from jaxcrit.data.templates import Example
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.training.drift import Drift
    from jaxcrit.training.loop import Standing
    from jaxcrit.training.step import State
    from jaxcrit.training.trackers import Listener
    from jaxcrit.training.trainer import Trainer

OPTIONS = FinetuneOptions
NO_BALANCE = "; without a balance loss, so that few experts may come to do most of the work (--router_aux adds one)"
_TESTS = 20  # over a run, where ``--eval_every`` does not say
_KNEE = r"(?:^|(?<=,))\s*lens:(first|second)(?=[:,]|$)"  # a layer of --supervise
_SCORED = 64  # training rows that layers are chosen by, where that is no score of an analysis
Row = Mapping[str, Any]


class Result(TypedDict):
    """``result`` of ``run.json``."""

    steps: Count
    best_step: Count
    best_loss: float
    trained_bytes: Count
    optimizer_bytes: Count


class _Launches(TypedDict, total=False):
    """What is there of a run that went on."""

    resumed: Count


class Times(_Launches):
    """What the report takes from ``time`` of ``run.json``."""

    training_seconds: AtLeastZero


class Mode(TypedDict):
    """What the report takes from ``config`` of ``run.json``."""

    mode: str


class Trained(TypedDict):
    """The same of ``trained``."""

    layers: list[Count]


class Objective(TypedDict):
    """The same of one of ``auxiliaries``."""

    name: str


class _Supervised(TypedDict, total=False):
    """What is there of a run with objectives beside the loss."""

    auxiliaries: list[Objective]


class FinetunedRun(_Supervised):
    """``run.json`` of a complete run."""

    config: Mode
    data: dict[str, CountedRows]
    layers: ChosenLayers
    trained: Trained
    result: Result
    time: Times


@dataclasses.dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished training.

    Attributes:
        model: tuned model, the base with an overlay on top; None where a complete run was read back.
        run: content of ``run.json``.
        metrics: rows of ``metrics.jsonl``.
        chosen: layers named by ``--layers``.
        warnings: what the user should know.
        out: run directory; None where nothing is written.
    """

    model: Model | None
    run: Mapping[str, Any]
    metrics: Sequence[Row]
    chosen: LayerSet
    warnings: Sequence[str]
    out: Path | None


def run(options: FinetuneOptions) -> int:
    """Trains, prints what came of it and where its page is."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.finetuned import finetune_report

    found = run_finetune(options, progress=bars, say=shared.say)
    return shared.tell(finetune_report(found.run, found.metrics, found.chosen, found.warnings), found.out)


@shared.public
def finetune(
    model: Any,
    rows: Any = "",
    layers: Any = "critical",
    *,
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Model:
    """Trains chosen layers of a model. The model given stays as it is.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        rows: rows with responses, as `read_datasets` takes them; a tenth of them is held out for testing.
        layers: a `LayerSet`, layers by number, or a selection such as ``critical:3`` or ``all``.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `FinetuneOptions`.

    Returns:
        The tuned model.

    Raises:
        UserError: a mistake in options, checkpoint or rows; or training that went wrong.
    """
    named = ",".join(map(str, layers.layers)) if isinstance(layers, LayerSet) else layers
    asked = shared.options_for(FinetuneOptions, out, {**options, "layers": named})
    chosen = layers if isinstance(layers, LayerSet) else None
    found = run_finetune(asked, model=model, rows=rows, chosen=chosen, progress=progress, keep=bool(out))
    return found.model or shared.opened(asked, str(out))


def run_finetune(
    options: FinetuneOptions,
    *,
    model: Any = None,
    rows: Any = None,
    chosen: LayerSet | None = None,
    progress: Bars | None = None,
    say: Say | None = None,
    keep: bool = True,
) -> Finetuned:
    """Trains; goes on where an interrupted run of the same options stopped, reads a complete one back.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        chosen: layers in place of those that the options name.
        progress: maker of progress bars; None for silence.
        say: told what trains, before training begins.
        keep: whether a run directory is written.

    Raises:
        UserError: see `finetune`; or another run in ``out``.
    """
    from jaxcrit.core.auxiliaries import names_of, objectives_of
    from jaxcrit.core.run import running
    from jaxcrit.models.gains import edit, gain_data, parse_gains
    from jaxcrit.models.model import open_model
    from jaxcrit.models.overlays import Overlay
    from jaxcrit.models.partition import Partition, Selection, size
    from jaxcrit.parallel.mesh import parse_mesh
    from jaxcrit.reporting.finetuned import evaluations, finetune_report
    from jaxcrit.studies.analysis import score_keys
    from jaxcrit.training.data import training_steps
    from jaxcrit.training.loop import read_metrics
    from jaxcrit.training.objectives import check_auxiliaries
    from jaxcrit.training.optimizer import make_schedule
    from jaxcrit.training.segments import Changed, Reselection
    from jaxcrit.training.trainer import Trainer, check_mesh, compute_dtype, partition_of

    make_schedule(options.schedule, options.learning_rate, options.warmup + 1, options.warmup)
    parse_mesh(options.mesh)
    spec = LayerSpec.parse(options.layers)
    spec.check_key([*score_keys(), *scorable_alone()])
    if options.reselect and not spec.needs_scores:
        raise UserError(
            f"--reselect={options.reselect}: chooses anew by a score, and --layers={spec} needs none; give KEY:K"
        )
    named, keeps = options.model if model is None else model, model is not None
    opened = open_model(named, mesh=options.mesh, keep=keeps, trains=not options.lora_rank)
    depth = opened.config.num_layers
    check_mesh(options.batch_size, opened.mesh)
    gains = parse_gains(options.gain, opened.config)
    auxiliaries = objectives_of(with_knees(options, opened, rows, progress), depth, options.seed)
    if keep and any(overlay.run is None for overlay in opened.overlays):
        raise UserError(
            f"--out={options.out}: the model was tuned in memory, so a run on it could not be opened again; give --out"
            " to that training too, or export the model and load that"
        )
    if chosen is None and not spec.needs_scores:
        chosen = resolve(spec, depth, model_hash=opened.model_hash)
    if chosen is not None:
        check_auxiliaries(auxiliaries, partition_of(options, opened.config, chosen))
    datasets = read_examples(options, opened, rows, names_of(auxiliaries))
    dtype = compute_dtype(options.dtype)
    with running(
        "finetune",
        options,
        models={"model": opened},
        datasets=datasets,
        resolved={"dtype": dtype} | ({} if chosen is None else {"layers": list(chosen.layers)}),
        keep=keep,
        read_back=FinetunedRun,
    ) as run:
        if run.complete:
            note = f"{run.path}: complete already; choose another --out to train again"
            trained, rows = LayerSet.from_json(run.earlier["layers"], f"{run.path}/run.json"), read_metrics(run.path)
            if not evaluations(rows):
                raise UserError(f"{run.path}: expected tests in its metrics, found none; choose another --out")
            return Finetuned(None, dict(run.earlier), rows, trained, [note], run.path)
        out = run.out
        run.record["attention"] = opened.attention(dtype)
        choose = functools.partial(chosen_by_scores, options, spec, rows=rows, progress=progress)
        if chosen is None:
            chosen = choose(opened.apart(), out)
        parts = partition_of(options, opened.config, chosen)
        check_auxiliaries(auxiliaries, parts)
        train, held = (dataset.examples for dataset in datasets)
        beside = names_of([one for one in auxiliaries if one.weight])
        data = training_steps(train, options.batch_size * options.accumulate, options.seed, beside=beside)
        steps = options.steps or (options.epochs or 1) * data.per_epoch
        under = (edit, gain_data(gains, depth)) if gains else None
        again = None
        if options.reselect:

            def chosen_anew(changed: Changed, step: int) -> Partition:
                model = opened.with_overlay(Overlay(changed.parts, changed.params, None, step))
                return partition_of(options, opened.config, choose(model, None))

            def tell(selections: list[Selection]) -> None:
                trained = {layer for one in selections for layer in one["layers"]}
                run.record["trained"] |= {"layers": sorted(trained), "selections": selections}
                run.save()

            again = Reselection(options.reselect, chosen_anew, tell)
        trainer = Trainer(options, opened, parts, steps, under, auxiliaries, again)
        run.precious = True
        if out is not None:
            chosen.save(out / "layers.json")
        run.record["layers"] = dataclasses.asdict(chosen) | {"layers": list(chosen.layers)}
        run.record["trained"] = parts.to_json() | ({"gain": options.gain} if gains else {})
        if trainer.auxiliaries:
            told = [{"name": str(one), **dataclasses.asdict(one)} for one in trainer.auxiliaries]
            run.record["auxiliaries"] = told
        run.save()
        if say is not None:
            say(summary(options, trainer, chosen, data.batch_size))
        began = time.perf_counter()
        state, best, warnings, rows = _train(options, trainer, data, held, out, progress)
        step = int(state.step)
        run.record["result"] = {
            "steps": step,
            "best_step": best.best_step,
            "best_loss": best.best_loss,
            "model_step": step,
            "trained_bytes": size(state.params),
            "optimizer_bytes": size(state.optimizer),
        }
        run.times["training_seconds"] = round(time.perf_counter() - began, 3)
        run.times |= {"resumed": trainer.resumed} if trainer.resumed else {}
        place = None if out is None else out.resolve()
        tuned = opened.with_overlay(Overlay(trainer.parts, state.params, place, step, chosen, gains))
        found = Finetuned(tuned, run.record, rows if out is None else read_metrics(out), chosen, warnings, out)
        if out is not None:
            timed = {**run.record, "time": run.times}
            finetune_report(timed, found.metrics, chosen, warnings).write(out, run.record)
    return found


def scorable_alone() -> list[str]:
    """Keys of the scores, beside those of an analysis, that a model and its training rows give."""
    from jaxcrit.criteria.registry import scorable

    return [key for key, one in scorable().items() if one.needs != "two models"]


def chosen_by_scores(
    options: FinetuneOptions, spec: LayerSpec, model: Model, out: Path | None, *, rows: Any, progress: Bars | None
) -> LayerSet:
    """The layers that a selection names in a model, by scores of its training rows.

    Args:
        options: what is asked.
        spec: selection by a score.
        model: model that is scored.
        out: run directory, which the scores lie in; None writes nothing.
        rows: rows in place of those that the options name.
        progress: maker of progress bars.
    """
    from jaxcrit.studies.analysis import score_keys, training_scores

    depth, key = model.config.num_layers, spec.score_key
    if not key or key in score_keys():
        asked = options if out is not None else dataclasses.replace(options, analysis="")
        ranked, key, trim = training_scores(asked, out, model=model, rows=rows, progress=progress)
        return resolve(spec, depth, scores=ranked, criterion=key, trim=trim, model_hash=model.model_hash)
    found = scored(options, key, model, out, rows, progress)
    return resolve(spec, depth, scores=found.scores, trim=AnalyzeOptions().trim, model_hash=model.model_hash)


def scored(
    options: FinetuneOptions, key: str, model: Model, out: Path | None, rows: Any, progress: Bars | None
) -> Scored:
    """A score of a model by its training rows; arguments as of `chosen_by_scores`."""
    from jaxcrit.commands.score import ScoreOptions, run_score

    where, seed = "" if out is None else str(out / "scores"), max(options.shuffle_seed, 0)
    fields = dataclasses.fields(ScoreOptions)
    given: dict[str, Any] = {field.name: getattr(options, field.name, field.default) for field in fields}
    own = {"criteria": key, "dtype": "", "limit": _SCORED, "out": where, "shuffle_seed": seed}
    return run_score(ScoreOptions(**given | own), model=model, rows=rows, progress=progress, keep=bool(where))


def with_knees(options: FinetuneOptions, model: Model, rows: Any, progress: Bars | None) -> FinetuneOptions:
    """Options whose ``--supervise`` has layers for ``lens:first`` and ``lens:second``, the knees of `lens_entropy`.

    Raises:
        UserError: the knee is not named, for prompts do not agree on it; or the rows are several datasets.
    """
    if not (asked := set(re.findall(_KNEE, options.supervise))):
        return options
    datasets = scored(options, "lens_entropy", model.apart(), None, rows, progress).datasets
    if len(datasets) > 1:
        raise UserError(f"--supervise={options.supervise}: knees are of one dataset, got {', '.join(datasets)}")
    (scores,) = datasets.values()
    knees = scores["lens_entropy"].meta["knees"]
    for name in sorted(asked):
        if knees[name] is None:
            raise UserError(
                f"--supervise={options.supervise}: the {name} knee of lens_entropy is not named, for the prompts do not"
                " agree on it; give layers by number"
            )
    return dataclasses.replace(options, supervise=re.sub(_KNEE, lambda found: str(knees[found[1]]), options.supervise))


def summary(options: FinetuneOptions, trainer: Trainer, chosen: LayerSet, rows: int) -> str:
    """What trains and what does not, in words."""
    parts, config = trainer.parts, trainer.model.config
    names = {"embed": "embeddings", "norm": "final norm", "head": "head"}
    if config.tied:
        names = {"embed": "embeddings and tied head", "norm": "final norm"}
    told = [f"{name} {'trained' if path in parts.outside else 'frozen'}" for path, name in names.items()]
    lora, adapters = parts.lora, ""
    if lora is not None:
        adapters = f"; adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
    frozen, *trained = (sum(math.prod(shape) for _, shape in one.values()) for one in parts.shapes().values())
    return (
        f"{'freezing' if options.mode == 'freeze' else 'training'} {chosen}{adapters}; {', '.join(told)}:"
        f" {sum(trained):,} of {frozen + sum(trained):,} parameters"
        f" ({100 * sum(trained) / (frozen + sum(trained)):.1f} %) train, for {trainer.steps} steps of {rows} rows"
        f"{f', under a gain of {options.gain}, which is folded in after' if options.gain else ''}"
        f"{f'; beside it, supervised: {options.supervise}' if options.supervise else ''}"
        f"{f'; layers chosen anew every {options.reselect} steps' if options.reselect else ''}"
        f"{drift_said(options.drift_every, rows)}"
        f"{NO_BALANCE if config.experts and not options.router_aux else ''}"
    )


def drift_said(every: int, rows: int) -> str:
    """How often drift is measured and what that may cost; nothing where it is not."""
    from jaxcrit.training.drift import share

    return f"; drift every {every} steps, at most {100 * share(every, rows):.0f} % more work" if every else ""


def _train(
    options: FinetuneOptions,
    trainer: Trainer,
    data: Steps,
    held: Sequence[Example],
    out: Path | None,
    bars: Bars | None,
) -> tuple[State, Standing, list[str], list[dict[str, Any]]]:
    """Trains; gives the last state and standing, warnings, and the rows of ``metrics.jsonl`` in process 0."""
    from jaxcrit.core import processes
    from jaxcrit.core.auxiliaries import names_of
    from jaxcrit.evidence.rows import batches_of
    from jaxcrit.training.loop import METRICS, MetricsLog
    from jaxcrit.training.step import make_evaluation
    from jaxcrit.training.trackers import tracked

    model, parts = trainer.model, trainer.parts
    how: dict[str, Any] = {"mesh": model.mesh, "edit": trainer.edit, "auxiliaries": trainer.auxiliaries}
    losses = functools.cache(functools.partial(make_evaluation, dtype=trainer.dtype, **how))
    with_rows: dict[str, Any] = {"beside": names_of(trainer.auxiliaries), "numbered": bool(options.adversarial)}
    tests = [batch for _, batch in batches_of(held, options.batch_size, model, passes=_TESTS, **with_rows)]

    def evaluate(params: Any, frozen: Any, _: int) -> Any:
        each = zip(*(losses(trainer.parts)(params, frozen, batch) for batch in tests), strict=True)
        return tuple(sum(sums[1:], sums[0]) for sums in each)

    def listen(state: State) -> contextlib.AbstractContextManager[Listener | None]:
        if out is None or options.track == "none" or not processes.first():
            return contextlib.nullcontext()
        return tracked(options.track, out, int(state.step), dataclasses.asdict(options))

    log = MetricsLog(None if out is None else out / METRICS)
    meta = {
        "config": dataclasses.asdict(options),
        "groups": list(parts.groups),
        "seed": options.seed,
        "rows_per_step": data.batch_size,
    }
    found = trainer.run(
        model.trainable(bars),
        data,
        evaluate,
        tests=_TESTS,
        saves=10,
        patience=options.patience,
        log=log,
        out=out,
        keep=options.keep,
        meta=meta,
        bars=bars,
        name="training",
        listen=listen,
        drift=probe(options, trainer, held),
    )
    return *found, log.rows


def probe(options: FinetuneOptions, trainer: Trainer, held: Sequence[Example]) -> Drift | None:
    """What measures drift, by the first held-out rows; None where nobody asked."""
    from jaxcrit.evidence.rows import batches_of
    from jaxcrit.training.drift import ROWS, Drift

    if not options.drift_every:
        return None
    model, rows = trainer.model, held[:ROWS]
    batches = list(batches_of(rows, ROWS, model))
    how: dict[str, Any] = {"dtype": trainer.dtype, "mesh": model.mesh, "edit": trainer.edit}
    return Drift(options.drift_every, batches, len(rows), trainer.parts, **how)


def read_examples(
    options: FinetuneOptions, model: Model, rows: Any = None, beside: Sequence[str] = ()
) -> list[Dataset]:
    """Rows to train and to test on, as datasets ``train`` and ``eval``; rows dropped before a split are of ``train``.

    Beside each row are those of the names ``beside``.

    Raises:
        UserError: see `Model.read` and `hold_out`.
    """
    from jaxcrit.data.dataset import MEMORY, Dataset, joined, text_of
    from jaxcrit.training.data import hold_out

    text = text_of(rows, options)
    source = MEMORY if text is None else text or "demo"
    how: dict[str, Any] = {"responses": True, "beside": beside}
    train = joined("train", source, model.read(options, rows, split="train", **how))
    if options.eval_data:
        asked = dataclasses.replace(options, data=options.eval_data, split=options.eval_split, limit=0)
        return [train, joined("eval", options.eval_data, model.read(asked, None, split="test", **how))]
    kept, held = hold_out(train.examples, source)
    return [dataclasses.replace(train, examples=kept), Dataset("eval", source, held)]
