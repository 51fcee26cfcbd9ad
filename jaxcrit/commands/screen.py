"""``jaxcrit screen``: which prompts lie unlike the benign prompts that the model answers alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import (
    BY_HASH,
    BatchOptions,
    MeshOptions,
    ModelOptions,
    OutOptions,
    PrecisionOptions,
    RowOptions,
)
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.options import option
from jaxcrit.core.schema import Count
from jaxcrit.core.selections import LayerSpec, resolve, span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.data.batches import Budget, Shape
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.evidence.states import HiddenStates
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report
    from jaxcrit.studies.screening import Screen

FLAGS = "flags.jsonl"
KEY = "cohesion_rise"
_AT_ONCE = 512  # prompts whose states are held, and that a killed run does again
_OF_STATES = ("layers", "tau", "fpr")  # options that mean something without a model
_SHOWN = 20  # classes in the table
_COLUMNS = ("dataset", "row", "sample_id", "class", "score", "threshold", "z", "flagged", "layers")
CAVEATS = (
    "A class is what the model answers next (or a column, or the dataset); its centroid is the mean last-token state of"
    " its benign prompts. A prompt is flagged where its cosines with the centroid, summed over the class's layers, lie"
    " below the threshold.",
    "The layer of interest is where cohesion, the mean cosine of each benign prompt with the mean of the others, rises"
    " most in the second half of the model.",
    "Flagged says unlike the benign prompts given, not harmful: new topics and rare phrasings are unlike them too. A"
    " trigger whose prompts look like benign ones of the same answer is not seen. This is no defence.",
    "AUROC is the chance that a row of truth 1 is less like its class than one of truth 0, both of known classes.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreenOptions(
    ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="screening"
):
    """What ``jaxcrit screen`` is asked; all datasets of a side are one here."""

    benign: str = option("", "prompts known to be benign, as --data", word="FILE", free=BY_HASH, group="model and data")
    truth: str = option("", "column of --data that is 1 where a row should be flagged, else 0", word="KEY")
    classes: str = option("next", "the model's next token, the family (dataset), or a column", word="next|family|KEY")
    layers: str = option("loi", "each class's layer of interest and two before, or layers", word="loi|SPEC")
    tau: float = option(2.5, "standard deviations below the benign mean that are flagged", lowest=0)
    fpr: float = option(0.0, "share of benign prompts to flag instead; 0 goes by --tau", lowest=0, highest=0.5)

    def check(self) -> None:
        """Checks the layers' grammar, and that there is one threshold."""
        super().check()
        if self.fpr and self.tau != type(self).tau:
            raise UserError(f"--tau={self.tau} --fpr={self.fpr}: give one of them")
        if self.layers != "loi":
            LayerSpec.parse(self.layers).check_key([KEY])


OPTIONS = ScreenOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Screened:
    """What screening found.

    Attributes:
        flags: a row of each prompt: ``class``, ``score``, ``threshold``, ``z``, ``flagged`` (None where the class is
            unknown), ``layers``.
        found: content of ``flags.json``: classes, held-out false positives, counts, and under a truth AUROC.
        scores: ``cohesion_rise``.
        warnings: what would mislead a reader.
        run: what ``run.json`` holds; empty for states.
        out: run directory; None where nothing is written.
    """

    flags: list[dict[str, Any]]
    found: dict[str, Any]
    scores: dict[str, LayerScores]
    warnings: list[str]
    run: Mapping[str, Any]
    out: Path | None


def run(options: ScreenOptions) -> int:
    """Screens, writes the run directory, prints the report."""
    return shared.show(run_screen, report, options)


@shared.public
def screen(
    what: Any = "",
    rows: Any = None,
    *,
    benign: Any,
    classes: Any = "next",
    truth: Any = "",
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Screened:
    """Finds prompts that lie unlike the benign prompts of their class.

    Args:
        what: a `Model` or the name of one, as `load` takes it; or `HiddenStates` of the prompts in question.
        rows: prompts in question, as `Model.read` takes them; of states None.
        benign: prompts known to be benign; of states `HiddenStates`.
        classes: ``next``, ``family`` or a column of the rows; of states two lists, of the benign samples' classes and
            of those in question.
        truth: column of ``rows`` with 0 and 1; of states a list. Empty where it is not known.
        out: run directory, for a model; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `ScreenOptions`.

    Raises:
        UserError: a mistake in options, checkpoint, rows or states; no class of 8 benign prompts or more.
    """
    from jaxcrit.evidence.states import HiddenStates

    if not isinstance(what, HiddenStates):
        asked = shared.options_for(ScreenOptions, out, {**options, "classes": classes, "truth": truth})
        return run_screen(asked, model=what, rows=rows, benign=benign, progress=progress, keep=bool(out))
    asked = {"rows": rows is not None, "out": bool(out), **{name: name not in _OF_STATES for name in options}}
    if given := [name for name, wanted in asked.items() if wanted]:
        raise UserError(f"--{' --'.join(given)}: needs a model; states are judged in memory, as they are")
    if not isinstance(benign, HiddenStates):
        raise UserError(f"--benign: expected hidden states beside hidden states, got {type(benign).__name__}")
    return _screen_states(shared.options_for(ScreenOptions, "", options), what, benign, classes, truth)


def run_screen(
    options: ScreenOptions,
    *,
    model: Any = None,
    rows: Any = None,
    benign: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Screened:
    """`screen` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.files import json_lines, plain, write_json, write_text
    from jaxcrit.core.run import running
    from jaxcrit.data.batches import common_shapes
    from jaxcrit.evidence.rows import write_scored
    from jaxcrit.selection.cautions import training_caution

    if benign is None and not options.benign:
        raise UserError("screen: expected --benign=FILE, prompts that are known to be benign, beside --data")
    opened = shared.opened(options, model)
    known = _Rows.of(options, opened, options.benign if benign is None else benign, "benign")
    given = _Rows.of(options, opened, rows, "data")
    names = {"parts": [part.name for side in (known, given) for part in side.parts]}  # may be classes
    sides = [known.rows, given.rows]
    with running("screen", options, models={"model": opened}, datasets=sides, also=names, keep=keep) as run:
        budget, parts = opened.budget(options.batch_size), [side.examples for side in sides]
        shapes = common_shapes(parts, budget, max_length=opened.config.max_length)

        def look(side: _Rows, places: Sequence[int]) -> tuple[np.ndarray, list[str]]:
            return _look(options, opened, side, places, budget, shapes, progress)

        order, ids = _in_order(known.rows.sample_ids)
        judge, score, warnings = _learn(options, *look(known, order), ids, opened.facts)
        lines = _judged(judge, given, look, run.out)
        told = _found(judge, lines, given.truth)
        warnings += [*_warnings(options, told, known.repeated(given)), *training_caution(opened.facts)]
        run.record |= {"result": told["data"], "warnings": warnings}
        flags = [
            {**where, **{name: line[name] for name in _COLUMNS if name in line}}
            for where, line in zip(given.places(), lines, strict=True)
        ]
        found = Screened(flags, told, {KEY: score}, warnings, run.record, run.out)
        if found.out is not None:
            write_text(found.out / FLAGS, json_lines(flags))
            write_json(found.out / "flags.json", "jaxcrit.flags", plain(told))
            write_scored(found.out, found.scores)
            report(found).write(found.out, found.run)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """The prompts of one side.

    Attributes:
        rows: all datasets of the side as one.
        parts: the datasets.
        labels: class of each prompt; None where the model says it.
        truth: 0 or 1 of each; None where it is not known.
    """

    rows: Dataset
    parts: Sequence[Dataset]
    labels: list[str] | None
    truth: list[int] | None

    @classmethod
    def of(cls, options: ScreenOptions, model: Model, rows: Any, name: str) -> _Rows:
        """Reads a side.

        Raises:
            UserError: see `Model.read`; or a row without a column that is asked for, or with another truth than 0, 1.
        """
        from jaxcrit.data.dataset import joined, named_rows

        raw = named_rows(rows, options)
        parts = model.read(options, raw)
        whole = joined(name, ",".join(part.source for part in parts), parts)
        labels = truth = None
        if options.classes != "next":
            family = options.classes == "family"
            labels = [str(value) for value in _column(raw, parts, options.classes, "classes", by_dataset=family)]
        if options.truth and name == "data":
            truth = []
            for place, value in enumerate(_column(raw, parts, options.truth, "truth"), 1):
                if value not in (0, 1, "0", "1"):
                    raise UserError(f"--truth={options.truth}: expected 0 or 1, row {place} has {value!r}")
                truth.append(int(value))
        return cls(whole, parts, labels, truth)

    def places(self) -> list[dict[str, Any]]:
        """Dataset, number and identity of each row."""
        return [
            {"dataset": part.name, "row": row, "sample_id": example.sample_id}
            for part in self.parts
            for row, example in enumerate(part.examples)
        ]

    def repeated(self, others: _Rows) -> int:
        """How many prompts of the others are among these."""

        def prompts(side: _Rows) -> list[bytes]:
            return [example.token_ids[: example.prompt_length].tobytes() for example in side.rows.examples]

        mine = set(prompts(self))
        return sum(one in mine for one in prompts(others))


def _column(
    raw: Sequence[Any], parts: Sequence[Dataset], key: str, flag: str, *, by_dataset: bool = False
) -> list[Any]:
    """Value of a column in every row; the name of the dataset where a row has none, if that is to do."""
    from jaxcrit.core.hashing import sample_id

    values = []
    for named, part in zip(raw, parts, strict=True):
        rows = {sample_id(row): row for row in getattr(named, "rows", ())}  # prompts as token ids have no columns
        for number, example in enumerate(part.examples, 1):
            row = rows.get(example.sample_id, {})
            if row.get(key) is None and not by_dataset:
                names = listed(sorted(row)) or "none"
                raise UserError(f"--{flag}={key}: row {number} of {part.source} has no such column; it has {names}")
            values.append(part.name if row.get(key) is None else row[key])
    return values


def _look(
    options: ScreenOptions,
    model: Model,
    side: _Rows,
    places: Sequence[int],
    budget: Budget,
    shapes: Sequence[Shape],
    bars: Bars | None,
) -> tuple[np.ndarray, list[str]]:
    """Last-token states ``[N, L, D]`` of some prompts, and their classes."""
    from jaxcrit.core.progress import bar, moved
    from jaxcrit.criteria.registry import criterion
    from jaxcrit.evidence.forward import forward_pass

    examples, wanted = [side.rows.examples[place] for place in places], {KEY: criterion(KEY)}
    with bar(bars, total=len(examples), desc=side.rows.name) as shown:
        how: dict[str, Any] = {"precision": options.precision, "progress": moved(shown), "shapes": shapes}
        found = forward_pass(model, model.decoder(bars), examples, budget, wanted, **how)[KEY]
    if side.labels is not None:
        return found["states"], [side.labels[place] for place in places]
    tokens = found["next"][:, 0].tolist()
    names = {token: _spelt(model.tokenizer, token) for token in set(tokens)}
    return found["states"], [names[token] for token in tokens]


def _spelt(tokenizer: Any, token: int) -> str:
    """A token's text in quotes; what it is called in the vocabulary where that text is not this token alone."""
    text = tokenizer.decode([token])
    if tokenizer.encode(text, add_special_tokens=False) == [token]:
        return repr(text)
    return tokenizer.convert_ids_to_tokens(token) or f"token {token}"


def _in_order(ids: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places in the order of the identities, in which the order of the file changes nothing; and these."""
    places = sorted(range(len(ids)), key=ids.__getitem__)
    return places, [ids[place] for place in places]


def _learn(
    options: ScreenOptions,
    states: np.ndarray,
    labels: Sequence[str],
    ids: Sequence[str],
    facts: Mapping[str, Any],
    normed: bool = False,
) -> tuple[Screen, LayerScores, list[str]]:
    """The classes of benign states ``[N, L, D]``, the score of the layers, and warnings."""
    from jaxcrit.criteria.cohesion_rise import measured
    from jaxcrit.criteria.registry import criterion
    from jaxcrit.studies.screening import Rule, Screen

    rises = measured(states, labels)
    score = criterion(KEY).scores(KEY, rises, {**facts, "by": options.classes, "num_samples": len(states)}, ids)
    layers = None
    if options.layers != "loi":
        spec = LayerSpec.parse(options.layers)
        layers = resolve(spec, states.shape[1], scores={KEY: score}, criterion=KEY, trim=0).layers
    rule = Rule(layers, options.tau, options.fpr, normed)
    judge, warnings = Screen.of(states, labels, rule), []
    if len(judge.classes) == 1:
        warnings.append("one class only: prompts of every other one are unknown")
    if few := [label for label, one in judge.classes.items() if rule.fpr and one.size * rule.fpr < 1]:
        warnings.append(
            f"--fpr={rule.fpr:g}: takes {int(np.ceil(1 / rule.fpr))} benign prompts to a class; {len(few)} of"
            f" {len(judge.classes)} have fewer, and their threshold is near their least score: {listed(few)}"
        )
    return judge, score, warnings


Verdict = TypedDict(
    "Verdict",
    {
        "place": Count,
        "class": str | int | float | bool | None,
        "score": float | None,
        "threshold": float | None,
        "z": float | None,
        "flagged": bool | None,
        "layers": list[Count] | None,
        "by_layer": list[float] | None,
        "distance": float | None,
    },
)


def _judged(
    judge: Screen,
    given: _Rows,
    look: Callable[[_Rows, Sequence[int]], tuple[np.ndarray, list[str]]],
    out: Path | None,
) -> list[dict[str, Any]]:
    """Verdicts in the order of the rows; those of an interrupted run are in a part that grows."""
    from jaxcrit.evidence.rows import GrowingRows
    from jaxcrit.parallel.preemption import one_by_one

    count = len(given.rows.examples)
    kept = GrowingRows(None if out is None else out / "partial_flags.jsonl", lambda row: row["place"], Verdict)
    rounds = [range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]

    def do(places: Sequence[int]) -> None:
        states, labels = look(given, places)
        each = zip(places, labels, judge.rows(states, labels), strict=True)
        kept.add([{"place": place, "class": label, **row} for place, label, row in each])

    left = [places for places in rounds if kept.lacks(places)]
    one_by_one(left, do, lambda _: f"with {len(kept.rows)} of {count} prompts judged", kept.flush)
    return [kept.rows[place] for place in range(count)]


def _screen_states(
    options: ScreenOptions, given: HiddenStates, benign: HiddenStates, classes: Any, truth: Any
) -> Screened:
    """Screens states of any engine."""
    if isinstance(classes, str) or len(classes) != 2:
        raise UserError(
            "--classes: of states expected two lists, classes of the benign samples and of those in question"
        )
    if np.shape(given.hidden)[::2] != np.shape(benign.hidden)[::2]:
        raise UserError(
            f"--benign: states of {benign.num_layers} layers and width {np.shape(benign.hidden)[2]}, those in question"
            f" have {given.num_layers} and {np.shape(given.hidden)[2]}"
        )
    named = (("classes", classes[0], benign), ("classes", classes[1], given), ("truth", truth, given))
    for flag, values, one in named[: 3 if len(truth) else 2]:
        if one.units is not None:
            raise UserError(f"{one.source}: several states come from one prompt; give one of each")
        if len(values) != one.num_samples:
            raise UserError(f"--{flag}: expected one for each of {one.num_samples} samples, got {len(values)}")
    if wrong := [value for value in truth if value not in (0, 1)]:
        raise UserError(f"--truth: expected 0 or 1, got {listed(wrong)}")
    order, ids = _in_order(benign.sample_ids)
    known, asked = (np.asarray(one.hidden).swapaxes(0, 1) for one in (benign, given))
    labels = [str(classes[0][place]) for place in order]
    normed = benign.normed or given.normed
    judge, score, warnings = _learn(options, known[order], labels, ids, benign.meta, normed)
    mine = [str(label) for label in classes[1]]
    lines = [{"class": label, **row} for label, row in zip(mine, judge.rows(asked, mine), strict=True)]
    told = _found(judge, lines, [int(one) for one in truth] if len(truth) else None)
    same = {one.tobytes() for one in known}
    warnings += [*given.notes, *_warnings(options, told, sum(one.tobytes() in same for one in asked))]
    flags = [
        {"row": row, "sample_id": name, **{key: line[key] for key in _COLUMNS if key in line}}
        for row, (name, line) in enumerate(zip(given.sample_ids, lines, strict=True))
    ]
    return Screened(flags, told, benign.trusted({KEY: score}), warnings, {}, None)


def _found(judge: Screen, lines: Sequence[Mapping[str, Any]], truth: Sequence[int] | None) -> dict[str, Any]:
    """Content of ``flags.json``."""
    from jaxcrit.evaluation.intervals import wilson
    from jaxcrit.studies.screening import separation

    classes = [
        {
            "class": label,
            "prompts": one.size,
            "layer_of_interest": one.interest,
            "layers": list(one.layers),
            "weights": one.weights.tolist(),
            "cohesion": one.cohesion.tolist(),
            "score_mean": float(one.mean[-1]),
            "score_stddev": float(one.spread[-1]),
            "threshold": one.threshold,
        }
        for label, one in judge.classes.items()
    ]
    flagged, held = Counter(line["flagged"] for line in lines), judge.held_out
    return {
        "classes": classes,
        "too_small": judge.small,
        "held_out": {"flagged": held[0], "of": held[1], "interval": wilson(*held)},
        "shrinkage": judge.distance.shrinkage,
        "data": {"prompts": len(lines), "flagged": flagged[True], "passed": flagged[False], "unknown": flagged[None]},
        "truth": None if truth is None else separation(lines, truth),
    }


def _warnings(options: ScreenOptions, found: Mapping[str, Any], repeated: int) -> list[str]:
    told: list[str] = []
    count, unknown = found["data"]["prompts"], found["data"]["unknown"]
    if repeated:
        told.append(f"{repeated} of {count} prompts are among the benign ones, and are part of what they are held to")
    if 2 * unknown > count:
        by = "; free text has hundreds of next tokens" if options.classes == "next" else ""
        many = len(found["classes"]) + len(found["too_small"])
        told.append(
            f"{count - unknown} of {count} prompts ({1 - unknown / count:.0%}) are scored: {len(found['classes'])} of"
            f" {many} benign classes have 8 prompts or more{by}"
        )
    if found["truth"] is not None:
        kinds = [found["truth"][name]["of"] for name in ("false_positives", "true_positives")]
        if not all(kinds):
            told.append(f"no AUROC: {kinds[1]} rows of truth 1 and {kinds[0]} of truth 0 have a class that is known")
    return told


def report(found: Screened) -> Report:
    """What is flagged, how often benign prompts are, which layers, and under a truth how well it tells."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes

    told = found.found
    cohesion = {one["class"]: (one["cohesion"], one["layer_of_interest"]) for one in told["classes"]}
    figures = [Figure("cohesion.png", on_axes(plots.cohesion_curves, cohesion), "Cohesion of every class.")]
    if told["truth"] is not None and told["truth"]["auroc"]["layers"]:
        draw = on_axes(plots.auroc_curve, told["truth"]["auroc"])
        figures.append(Figure("auroc.png", draw, "AUROC of every layer alone, beside that of the score."))
    sections = [
        Section("By layer", "cohesion: mean over the classes, by their size", _layer_table(found), figures),
        Section("By class", "", _class_table(told["classes"])),
    ]
    rises = any(one["layer_of_interest"] is not None for one in told["classes"])
    return Report(_sentences(told), found.warnings, sections, CAVEATS, follows=rises)


def _layer_table(found: Screened) -> str:
    classes, truth = found.found["classes"], found.found["truth"]
    cohesion = np.average([one["cohesion"] for one in classes], axis=0, weights=[one["prompts"] for one in classes])
    columns = {"cohesion": list(map(tables.number, cohesion)), **tables.estimates(found.scores)}
    if truth is not None and truth["auroc"]["layers"]:
        columns["AUROC [95 %]"] = list(map(_with_interval, truth["auroc"]["layers"]))
    interest = Counter(one["layer_of_interest"] for one in classes if one["layer_of_interest"] is not None)
    return tables.by_layer(columns, [(layer, f"◀ layer of interest of {_counted(n)}") for layer, n in interest.items()])


def _class_table(classes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in classes[:_SHOWN]:
        interest = "none" if one["layer_of_interest"] is None else str(one["layer_of_interest"])
        cells = [tables.shortened(one["class"], 24), str(one["prompts"]), interest, span(one["layers"])]
        cells += [tables.number(one["cohesion"][0]), tables.number(one["cohesion"][-1])]
        rows.append([*cells, f"{one['score_mean']:.4f} ± {one['score_stddev']:.4f}", tables.number(one["threshold"])])
    header = ["class", "prompts", "layer of interest", "layers", "first", "last", "score ± s.d.", "threshold"]
    more = len(classes) - len(rows)
    return tables.table(header, rows) + (f"\n({more} more classes are in flags.json)" if more else "")


def _with_interval(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{tables.number(one['value'], 3)} [{tables.number(low, 2)}, {tables.number(high, 2)}]"


def _counted(classes: int) -> str:
    return f"{classes} class{'es' if classes != 1 else ''}"


def _share(one: Mapping[str, Any]) -> str:
    if not one["of"]:
        return "0 of 0"
    low, high = one["interval"]
    return f"{one['flagged']} of {one['of']} ({one['flagged'] / one['of']:.1%}, 95 % {low:.1%} to {high:.1%})"


def _sentences(told: Mapping[str, Any]) -> list[str]:
    data, classes = told["data"], told["classes"]
    interest = Counter(one["layer_of_interest"] for one in classes)
    named = [
        f"{layer} ({number} of {len(classes)} classes)" for layer, number in interest.most_common() if layer is not None
    ]
    sentences = [
        f"Flagged: {data['flagged']} of {data['prompts']} prompts are less like the benign prompts of their class than"
        f" the threshold allows; {data['unknown']} are unknown, for their class has fewer than 8 benign prompts.",
        f"False alarms: {_share(told['held_out'])} benign prompts are flagged by the other half of their class.",
        f"Layer of interest, of {_counted(len(classes))}: {', '.join(named[:4]) or 'none'}"
        + (f"; in {_counted(interest[None])} cohesion rises nowhere in the second half." if interest[None] else "."),
    ]
    truth = told["truth"]
    if truth is None:
        return sentences
    sentences.append(
        f"By the truth: flagged are {_share(truth['true_positives'])} rows of truth 1 and"
        f" {_share(truth['false_positives'])} of truth 0."
    )
    if not truth["auroc"]["layers"]:
        return sentences
    auroc = truth["auroc"]
    sentences.append(
        f"AUROC: the score {_with_interval(auroc['score'])}, the last layer {_with_interval(auroc['last_layer'])}, the"
        f" Mahalanobis distance over all layers {_with_interval(auroc['mahalanobis'])}."
    )
    for name, what in (("last_layer", "the last layer alone"), ("mahalanobis", "the Mahalanobis distance")):
        difference = truth[f"score_less_{name}"]
        low, high = difference["interval"]
        better = (
            "tells better than"
            if low > 0
            else "tells worse than"
            if high < 0
            else "is not shown to tell otherwise than"
        )
        sentences.append(f"The score {better} {what} ({difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]).")
    return sentences
