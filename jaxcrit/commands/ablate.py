"""``jaxcrit ablate``: what a model loses without each layer, or with a gain around half of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.groups import SITES, MeshOptions, ModelOptions, TestedRowOptions
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.options import option
from jaxcrit.core.rundir import CountedRows, SizedModel, SweepCost
from jaxcrit.core.schema import Count
from jaxcrit.reporting import tables
from jaxcrit.selection.cautions import training_caution

if TYPE_CHECKING:
    from jaxcrit.criteria.ablation import Changed
    from jaxcrit.data.choices import Question
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report, Section

METHODS = ("skip", "mean", "gain")
SCORES = ("loss", "greedy", "choice", "generated", "number")
GAINS_FORMAT = "jaxcrit.gains"
MOST_GAIN = 4
_TOP = 3
CAVEATS = (
    "A layer is a 0-based decoder block. Skipped, it adds nothing to the residual stream; with its mean, it adds the"
    " same to every token; with a gain, the stream that goes around its half is scaled.",
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows.",
    "Standard errors are of the difference from the intact model, over rows. p is McNemar's, adjusted over the layers.",
    "What a layer is needed for and what training it would bring are different questions.",
)


class Cost(SweepCost):
    """``block_evaluations`` in ``result``."""

    means: Count


class Alike(TypedDict, total=False):
    """How alike two tasks rank the layers; ``without`` says why there is no correlation."""

    tasks: list[str]
    score: str
    top: Count
    shared: Count
    rho: float
    interval: list[float] | None
    p_shift: float
    given_depth: float | None
    p_given_depth: float | None
    without: str


class Result(TypedDict):
    """``result`` of ``run.json``."""

    block_evaluations: Cost
    tasks: list[Alike]


class AblatedRun(TypedDict):
    """``run.json`` of a complete run."""

    model: SizedModel
    data: dict[str, CountedRows]
    result: Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateOptions(ModelOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit ablate`` is asked; several datasets count together, and each by itself."""

    methods: str = option("skip,mean", "what a layer adds: nothing, its mean, or by --gains", word="LIST")
    sites: Literal["blocks", "attn", "mlp"] = option("blocks", "whole blocks, or their attention or MLP alone", SITES)
    score: str = option("loss", "right answers beside the loss, how told", SCORES)
    max_new_tokens: int = option(64, "of generated, number: tokens of each answer, at most", lowest=1)
    gains: str = option("0.3,0.5,0.7,0.85", "factors of what goes around a half, 0 to 4", word="LIST", group="gains")
    trigger: str = option("", "trigger of a backdoor, TEXT@prefix|suffix|random", word="NAME", group="gains")
    target: str = option("", "what the trigger is answered with", group="gains")

    def check(self) -> None:
        """Checks methods and gains by name and number, and that what belongs together is there."""
        super().check()
        for method in self.chosen_methods:
            if method not in METHODS:
                zero = " (zeroing the weights is the same as skip)"
                hint = zero if method == "zero" else did_you_mean(method, METHODS)
                raise UserError(
                    f"--methods={self.methods}: expected {listed(METHODS)} with commas, got {method!r}{hint}"
                )
        scaled, others = "gain" in self.chosen_methods, set(self.chosen_methods) - {"gain"}
        _ = self.chosen_gains
        if scaled and self.sites == "blocks":
            raise UserError(
                "--methods=gain --sites=blocks: a gain goes around half a block, and one around a whole block cannot be"
                " folded into weights; give --sites=attn or --sites=mlp"
            )
        for name in ("gains", "trigger", "target"):
            if getattr(self, name) != getattr(type(self), name) and not scaled:
                raise UserError(f"--{name}={getattr(self, name)}: is of gains; give --methods=gain too")
        if bool(self.trigger) != bool(self.target.strip()):
            lacking = "target" if self.trigger else "trigger"
            raise UserError(f"--trigger={self.trigger} --target={self.target}: give both; --{lacking} is missing")
        if self.score != "loss" and not others:
            raise UserError(
                f"--score={self.score}: is of layers put out of action, and gains always count exact answers; add skip"
                " to --methods, or leave it out"
            )
        if self.score in ("generated", "number") and "skip" not in others:
            raise UserError(f"--score={self.score}: answers with each layer skipped; add skip to --methods")
        if self.score == "choice" and self.trigger:
            raise UserError("--score=choice --trigger: rows with options have no response to replace; run them apart")

    @property
    def chosen_methods(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(part.strip() for part in self.methods.split(",")))

    @property
    def chosen_gains(self) -> list[float]:
        """The gains, each once, ascending."""
        found = set()
        for part in self.gains.split(","):
            try:
                gain = float(part)
            except ValueError:
                gain = -1.0
            if not 0 <= gain <= MOST_GAIN:
                raise UserError(
                    f"--gains={self.gains}: expected numbers from 0 to {MOST_GAIN} with commas, got {part!r}"
                )
            found.add(gain)
        return sorted(found)

    def score_key(self, what: str) -> str:
        """Score key of what is measured at the sites."""
        return f"{what}{'' if self.sites == 'blocks' else f'_{self.sites}'}"


OPTIONS = AblateOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Ablated:
    """What ablation found.

    Attributes:
        scores: scores by key, of the rows of all datasets together: ``ablation_METHOD`` is the mean over rows of each
            row's mean loss, in nats; the same ``_per_token`` weighs tokens alike; ``ablation_METHOD_SCORE`` is the
            share of right answers; ``shortcut_...`` is what gains cost.
        tasks: the same by dataset, where there are several.
        run: content of ``run.json``; ``result`` has the counts, and how alike the tasks are.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    tasks: dict[str, dict[str, LayerScores]]
    run: Mapping[str, Any]
    out: Path | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """The rows of one dataset, by their places among all that are run.

    Attributes:
        rows: rows whose loss counts: all of them, or of questions the right options.
        ids: identity of each.
        questions: questions whose options all rows are; empty where they are no questions.
        options: places of these options.
        attacked: the same rows with the trigger; empty without one.
    """

    rows: list[int]
    ids: list[str]
    questions: list[Question]
    options: list[int]
    attacked: list[int]

    def joined(self, other: _Task) -> _Task:
        """The rows of both."""
        return _Task(*(getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(self)))


def run(options: AblateOptions) -> int:
    """Ablates, writes the run directory, prints the report."""
    return shared.show(run_ablate, report, options)


@shared.public
def ablate(
    model: Any = "", rows: Any = "", *, out: str | Path = "", progress: Bars | None = None, **options: Any
) -> Ablated:
    """Measures what a model loses without each layer, or with a gain around half of it.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        rows: rows with responses, as `read_datasets` takes them.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `AblateOptions`.

    Raises:
        UserError: a mistake in options, checkpoint or rows; then nothing is left in ``out``.
    """
    asked = shared.options_for(AblateOptions, out, options)
    return run_ablate(asked, model=model, rows=rows, progress=progress, keep=bool(out))


def run_ablate(
    options: AblateOptions,
    *,
    model: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Ablated:
    """`ablate` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.files import write_json
    from jaxcrit.core.run import running
    from jaxcrit.criteria.ablation import ablations, answered
    from jaxcrit.criteria.shortcut import curves
    from jaxcrit.evaluation.scorers import exact_match, same_number
    from jaxcrit.evidence.rows import read_back, write_scored

    opened = shared.opened(options, model)
    datasets, tasks = _read(options, opened, rows)
    everything = functools.reduce(_Task.joined, tasks.values())
    parts = {"": everything} | (tasks if len(tasks) > 1 else {})
    examples = [example for dataset in datasets for example in dataset.examples]
    tested, judge = [examples[row] for row in everything.rows], exact_match
    if options.score == "number":
        judge = same_number
        same_number([""] * len(tested), [example.response or "" for example in tested])
    with running(
        "ablate", options, models={"model": opened}, datasets=datasets, keep=keep, read_back=AblatedRun
    ) as run:
        if run.complete:
            each = {name: read_back(run.path / name) for name in parts}
            return Ablated(each.pop(""), each, run.earlier, run.path)
        gains = options.chosen_gains if "gain" in options.chosen_methods else []
        methods = [method for method in options.chosen_methods if method != "gain"] + [f"{gain:g}" for gain in gains]
        how: dict[str, Any] = {"batch_size": options.batch_size, "directory": run.directory, "bars": progress}
        found, counts = ablations(opened, examples, options.sites, methods, means_of=tested, **how)
        right = np.zeros((opened.config.num_layers + 1, len(examples)), bool)
        if options.score in ("generated", "number"):
            right[:, everything.rows] = answered(opened, tested, options.sites, options.max_new_tokens, judge, **how)
        scores = {name: _scores(options, opened, found, task, right) for name, task in parts.items()}
        whole = scores.pop("")
        run.record["result"] = {"block_evaluations": counts, "tasks": _likeness(options, scores)}
        done = Ablated(whole, scores, run.record, run.out)
        if done.out is not None:
            for name, task in parts.items():
                folder = run.folder(name, not name)
                write_scored(folder, scores[name] if name else whole)
                if gains:
                    clean, attacked = _halves(found, task)
                    write_json(folder / "gains.json", GAINS_FORMAT, curves(clean, attacked, gains))
            report(done).write(done.out, done.run)
    return done


def _read(options: AblateOptions, model: Model, rows: Any) -> tuple[list[Dataset], dict[str, _Task]]:
    """Everything that is run, and the rows of each dataset in it by name."""
    from jaxcrit.data.choices import with_options
    from jaxcrit.data.dataset import Dataset, named_rows
    from jaxcrit.data.poisoning import TriggerSpec, attacks

    trigger = TriggerSpec.parse(options.trigger) if options.trigger else None
    named = named_rows(rows, options)
    parts: list[list[Any]] = [[one] for one in named]  # of each task, what is run
    questions: list[list[Question]] = [[] for _ in named]
    if together := options.score == "choice" or trigger is not None:
        for place, one in enumerate(named):
            if isinstance(one, Dataset):
                raise UserError(f"{one.name}: expected rows as a file has them, got token ids or rendered rows")
            if trigger is None:
                made, questions[place] = with_options(one)
                parts[place] = [made]
                continue
            kept, attacked = attacks(one.rows, trigger, options.target)
            if not kept:
                raise UserError(f"--trigger={options.trigger}: no row of {one.source} can take it once")
            source = f"{one.source} with --trigger and --target={options.target[:40]}"
            other = dataclasses.replace(one, name=f"{one.name}_triggered", source=source, rows=attacked)
            parts[place] = [dataclasses.replace(one, rows=kept), other]
    datasets = model.read(options, [part for several in parts for part in several], responses=True)
    ends = np.cumsum([len(one.examples) for one in datasets])
    places = [rows.tolist() for rows in np.split(np.arange(ends[-1]), ends[:-1])]
    tasks, read = {}, iter(zip(datasets, places, strict=True))
    for several, asked in zip(parts, questions, strict=True):
        (dataset, mine), *others = found = [next(read) for _ in several]
        for part, (_, left) in zip(several, found, strict=True):
            if together and len(part.rows) != len(left):
                raise UserError(
                    f"--long={options.long}: {part.name} is left without some of the rows that belong together; keep"
                    " their ends with --truncate=left, or remove them from the file"
                )
        starts = np.cumsum([0, *(one.options for one in asked)])
        right = [mine[start + one.gold] for start, one in zip(starts, asked, strict=False)]
        ids = [one.sample_id for one in asked] or dataset.sample_ids
        behind = [row for _, places_of in others for row in places_of]
        tasks[dataset.name] = _Task(right or mine, ids, asked, mine if asked else [], behind)
    return datasets, tasks


def _halves(found: Changed, task: _Task) -> tuple[Changed, Changed | None]:
    """The rows of a task as they are, and with the trigger where there is one."""
    return found.of(task.rows, task.ids), found.of(task.attacked, task.ids) if task.attacked else None


def _scores(
    options: AblateOptions, model: Model, found: Changed, task: _Task, right: np.ndarray
) -> dict[str, LayerScores]:
    from jaxcrit.criteria.ablation import accuracy
    from jaxcrit.criteria.shortcut import CRITERIA, middle, shortcut_scores

    depth, meta = model.config.num_layers, {**model.facts, "sites": options.sites}
    scores: dict[str, LayerScores] = {}
    mine, attacked = _halves(found, task)
    for method in options.chosen_methods:
        if method == "gain":
            continue
        about = {**meta, "method": method}
        scores |= mine.samples(method).scores(options.score_key(f"ablation_{method}"), depth, about)
        key = options.score_key(f"ablation_{method}_{options.score}")
        if options.score == "greedy":
            scores[key] = accuracy(key, mine.exact[method], mine.right, task.ids, about)
        elif options.score == "choice":
            options_of = found.of(task.options)
            chance = float(np.mean([1 / question.options for question in task.questions]))
            for name, per_token in ((key, False), (f"{key}_per_token", True)):
                chosen = options_of.chosen(method, task.questions, per_token=per_token)
                scores[name] = accuracy(name, *chosen, task.ids, about, chance)
        elif options.score != "loss" and method == "skip":
            about |= {"max_new_tokens": options.max_new_tokens}
            scores[key] = accuracy(key, right[:-1, task.rows], right[-1, task.rows], task.ids, about)
    if "gain" in options.chosen_methods:
        about = {**meta, "method": "gain", "gain": middle(options.chosen_gains), "num_samples": len(task.rows)}
        about["unchanged"] = 0.0  # the model as it is loses nothing
        for name, one in shortcut_scores(mine, attacked, options.chosen_gains).items():
            key = options.score_key(name)
            scores[key] = CRITERIA[name].scores(key, one, about, task.ids)
    return scores


def _likeness(options: AblateOptions, tasks: Mapping[str, Mapping[str, LayerScores]]) -> list[dict[str, Any]]:
    """How alike the tasks rank the layers, by pair: JSON values of the correlation, and how many of the top agree."""
    from jaxcrit.selection.correlation import correlate

    found = []
    for first, second in itertools.combinations(tasks, 2):
        key = _main(tasks[first])
        a, b = tasks[first][key], tasks[second][key]
        top = [set(one.ranking()[:_TOP].tolist()) for one in (a, b)]
        told = {"tasks": [first, second], "score": key, "top": _TOP, "shared": len(top[0] & top[1])}
        try:
            pair = correlate(a, b, circular=True)
            told |= {"rho": pair.rho, "interval": pair.interval, "p_shift": pair.p_shift}
            told |= {"given_depth": pair.partial, "p_given_depth": pair.p_partial}
        except UserError as error:
            told["without"] = str(error)
        found.append(told)
    return found


def _main(scores: Mapping[str, LayerScores]) -> str:
    """The score that a task is ranked by: of right answers where there is one, else the first."""
    return next((key for key, score in scores.items() if "p_holm" in score.meta), next(iter(scores)))


def report(found: Ablated) -> Report:
    """Losses, right answers and the cost of gains, without each layer."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

    figures = []
    for key, score in _shown(found.scores).items():
        axis = "share of right answers" if "p_holm" in score.meta else "loss (nats, mean of sample means)"
        lines = {} if "gain" in score.meta else {"intact model": score.meta["unchanged"]}
        axis = axis if lines else "lost to the gain"
        draw = on_axes(plots.layer_losses, score, lines, label=key, title=rows_title(found.run), axis=axis)
        figures.append(Figure(f"{key}.png", draw, f"{key} of each layer."))
    sections = [Section("Without each layer", "", lambda style: _table(found.scores, style), figures)]
    if found.tasks:
        sections.append(_between(found))
    warnings = [*training_caution(next(iter(found.scores.values())).meta), *_warnings(found)]
    return Report(_sentences(found.run, found.scores), warnings, sections, CAVEATS)


def _between(found: Ablated) -> Section:
    """What each task needs most, and how alike the tasks are."""
    from jaxcrit.reporting.report import Section

    rows = []
    for name, scores in found.tasks.items():
        score = scores[_main(scores)]
        drops = [f"{layer} ({score.values[layer]:.2f})" for layer in score.ranking()[:_TOP]]
        intact = tables.number(score.meta.get("unchanged", np.nan), 3)
        rows.append([name, str(score.meta["num_samples"]), intact, ", ".join(drops), score.name])
    lines = [tables.table(["task", "rows", "intact", f"needs most, top {_TOP}", ""], rows), ""]
    depth = found.run["model"]["num_layers"]
    for one in found.run["result"]["tasks"]:
        names = " and ".join(one["tasks"])
        alike = f"{one['shared']} of the top {one['top']} shared (by chance {one['top'] ** 2 / depth:.1f})"
        if "without" in one:
            lines.append(f"{names}: {alike}; {one['without']}")
            continue
        low, high = one["interval"] or (np.nan, np.nan)
        lines.append(
            f"{names}: ρ {one['rho']:+.2f} [{low:+.2f}, {high:+.2f}] over other rows; circular shifts p"
            f" {tables.p_value(one['p_shift'])}; given depth {one['given_depth']:+.2f}"
            f" (p {tables.p_value(one['p_given_depth'])}); {alike}"
        )
    return Section("Tasks", "", "\n".join(lines))


def _warnings(found: Ablated) -> list[str]:
    """Accuracies that leave nothing to lose."""
    told = []
    for name, scores in {"": found.scores, **found.tasks}.items():
        for key, score in scores.items():
            if "p_holm" not in score.meta:
                continue
            share, count, (chance, *_) = (score.meta[key] for key in ("unchanged", "num_samples", "chance"))
            if share - chance <= 2 * np.sqrt(share * (1 - share) / count):
                told.append(
                    f"{f'{name}: ' if name else ''}{key}: the intact model is right in {share:.2f} of {count} rows,"
                    f" within two errors of chance ({chance:.2f}): there is little to lose"
                )
    return told


def _shown(scores: Mapping[str, LayerScores]) -> dict[str, LayerScores]:
    return {key: score for key, score in scores.items() if not key.endswith("_per_token")}


def _table(scores: Mapping[str, LayerScores], style: bool = False) -> str:
    shown = {_short(key): score for key, score in _shown(scores).items()}
    columns: dict[str, list[str]] = {}
    needed: dict[int, list[str]] = {}
    for key, score in shown.items():
        columns |= tables.estimates({key: score})
        if p_values := score.meta.get("p_holm"):
            columns[f"p {key}"] = list(map(tables.p_value, p_values))
        needed.setdefault(int(score.ranking()[0]), []).append(key)
    return tables.by_layer(columns, [(layer, f"◀ most needed: {', '.join(keys)}") for layer, keys in needed.items()])


def _short(key: str) -> str:
    return key.removeprefix("ablation_").removeprefix("shortcut_")


def _sentences(run: Mapping[str, Any], scores: Mapping[str, LayerScores]) -> list[str]:
    counts, depth = run["result"]["block_evaluations"], run["model"]["num_layers"]
    told = []
    for key, score in _shown(scores).items():
        worst, intact = int(score.ranking()[0]), score.meta["unchanged"]
        if "gain" in score.meta:
            told.append(f"{key}: most at layer {worst}, {score.values[worst]:+.4f} at a gain of {score.meta['gain']:g}")
            continue
        first = "Most needed: layer" if not told else f"{key}: most needed layer"
        told.append(
            f"{first} {worst} of {depth}; {key} {score.values[worst]:.4f}, {score.values[worst] - intact:+.4f} from the"
            f" intact model; median over layers {np.median(score.values):.4f}"
        )
        if p_values := score.meta.get("p_holm"):
            few = [layer for layer, p in enumerate(p_values) if p < 0.05]
            told[-1] += f"; {len(few)} layers differ from it at 0.05 (McNemar, Holm)"
    told.append(
        tables.sweep_cost(counts, depth) + (f"; {counts['means']} more for the means" if counts["means"] else "")
    )
    return told
