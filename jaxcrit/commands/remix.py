"""``jaxcrit remix``: what a mixture answers with other shares of its experts, learnt row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.groups import BY_HASH, MeshOptions, ModelOptions, TestedRowOptions
from jaxcrit.core.options import option
from jaxcrit.core.rundir import CountedRows, SizedModel
from jaxcrit.core.schema import MOST_LAYERS, Count, Range
from jaxcrit.core.selections import LayerSpec, resolve, span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.data.templates import Example
    from jaxcrit.models.config import ModelConfig
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

REMIX_FORMAT = "jaxcrit.remix"
ROWS = "remix.jsonl"
METHODS = ("mean", "kernel", "mode", "descent")
CONTROLS = ("all", "few")
_LEAST = 10  # exact references for each neighbour
Found = Mapping[str, Any]
CAVEATS = (
    "An answer is exact where greedy decoding would give the row's response, token by token. Loss is in nats, the mean"
    " over an answer's tokens, then over rows. Intervals are bootstraps over rows, p is McNemar's.",
    "Shares are given before the model keeps its largest ones: what is given chooses experts too.",
    "The oracle descends on the row's own answer, which nobody has when it is asked for. It says what descent by"
    " other rows could win, and is no method.",
    "Neighbours are nearest by this model's own mean state behind its middle layer; no sentence encoder is asked.",
    "With --at=last nothing but the first new token, and keys and values at its place, can move; with --at=all one set"
    " of shares stands at every place of an answer, which alone changes answers: see the control 'own shares'.",
)


class Variant(TypedDict):
    """A way to choose shares beside the model as it is, see `jaxcrit.studies.remix.told`."""

    name: str
    exact: float
    loss: float
    won: Count
    lost: Count
    p: float
    exact_change: list[float]
    loss_change: list[float]


class Study(TypedDict):
    """``remix.json`` as a report takes it."""

    num_layers: Annotated[int, Range(1, MOST_LAYERS)]
    experts: Count
    experts_per_token: Count
    layers: list[Annotated[int, Range(0, MOST_LAYERS)]]
    random_layers: list[Annotated[int, Range(0, MOST_LAYERS)]]
    at: str
    rows: Count
    references: dict[str, Count]
    base: dict[str, float]
    room: bool
    variants: list[Variant]
    blends: dict[str, Count]
    evaluations: Count


class Said(TypedDict):
    """What a row comes to."""

    loss: float
    exact: bool


class RemixedRequired(TypedDict):
    """A row of ``remix.jsonl``."""

    row: Count
    sample_id: str
    neighbours: list[Count]
    weights: list[float]
    before: Said
    after: dict[str, Said]


class RemixedRow(RemixedRequired, total=False):
    """With the part of its own shares, where they are blended."""

    blend: float


class RemixRun(TypedDict):
    """``run.json`` of a complete run."""

    model: SizedModel
    data: dict[str, CountedRows]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemixOptions(ModelOptions, TestedRowOptions, MeshOptions, title="re-mixing"):
    """What ``jaxcrit remix`` is asked; all datasets of a side are one here."""

    reference: str = option(
        "", "rows to learn from, as --data; exact ones count", word="FILE", free=BY_HASH, group="model and data"
    )
    layers: str = option("last:5", "layers whose experts are mixed anew", word="SPEC")
    method: str = option("descent", "mean, kernel, mode, descent, with commas", word="LIST")
    at: Literal["last", "all"] = option("last", "at the last prompt token, or from it on", ("last", "all"))
    neighbours: int = option(3, "reference rows for each row", lowest=1)
    experts: int = option(0, "largest experts of a row that move; 0 for all", lowest=0)
    steps: int = option(10, "steps of mode and descent", lowest=1)
    controls: Literal["all", "few"] = option("all", "random references and layers: of all, or of mean, mode", CONTROLS)
    seed: int = option(0, "seed of random references and layers, and of the bootstrap", lowest=0)

    def check(self) -> None:
        """Checks the methods by name, and the layers' grammar."""
        super().check()
        for method in self.chosen_methods:
            if method not in METHODS:
                raise UserError(
                    f"--method={self.method}: expected {listed(METHODS)}, or several with commas, got"
                    f" {method!r}{did_you_mean(method, METHODS)}"
                )
        if LayerSpec.parse(self.layers).needs_scores:
            raise UserError(
                f"--layers={self.layers}: ranks layers by a score, and there is none here; give layers, last:K, or"
                " @layers.json of jaxcrit select"
            )

    @property
    def chosen_methods(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(part.strip() for part in self.method.split(",")))


OPTIONS = RemixOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Remixed:
    """What re-mixing did.

    Attributes:
        rows: a row of each test row: its ``neighbours``, loss and exactness ``before`` and ``after`` by variant.
        found: content of ``remix.json``: every variant beside the model as it is.
        run: content of ``run.json``.
        out: run directory; None where nothing is written.
    """

    rows: list[dict[str, Any]]
    found: Found
    run: Mapping[str, Any]
    out: Path | None


def run(options: RemixOptions) -> int:
    """Re-mixes, writes the run directory, prints the report."""
    return shared.show(run_remix, report, options)


@shared.public
def remix(
    model: Any,
    rows: Any,
    reference: Any,
    *,
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Remixed:
    """Gives the experts of a mixture other shares, row by row, and says what that wins and loses.

    Args:
        model: a `Model`, or the name of one, as `load` takes it: a mixture of experts.
        rows: rows with responses to be answered, as `read_datasets` takes them.
        reference: rows with responses to learn from; those that the model answers exactly count.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `RemixOptions`.

    Raises:
        UserError: a mistake in options, checkpoint or rows; too few references that are answered exactly.
    """
    asked = shared.options_for(RemixOptions, out, options)
    return run_remix(asked, model=model, rows=rows, reference=reference, progress=progress, keep=bool(out))


def run_remix(
    options: RemixOptions,
    *,
    model: Any = None,
    rows: Any = None,
    reference: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Remixed:
    """`remix` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.files import json_lines, write_json, write_text
    from jaxcrit.core.processes import share
    from jaxcrit.core.run import running
    from jaxcrit.data.dataset import joined

    if reference is None and not options.reference:
        raise UserError("remix: expected --reference=FILE, rows with responses to learn from, beside --data")
    opened = shared.opened(options, model)
    layers = _layers(options, opened.config)
    tests = joined("data", options.data, opened.read(options, rows, responses=True))
    known = opened.read(options, options.reference if reference is None else reference, responses=True)
    learnt = joined("reference", options.reference, known)
    _refuse_repeated(learnt.examples, tests.examples)
    resolved = {"layers": list(layers)}
    about: dict[str, Any] = {"models": {"model": opened}, "datasets": [tests, learnt], "resolved": resolved}
    with running("remix", options, **about, keep=keep, read_back=RemixRun) as run:
        if run.complete:
            path = run.path
            found, lines = share(lambda: (read_study(path / "remix.json"), read_remixed(path / ROWS)))
            return Remixed(lines, found, run.earlier, path)
        lines, found = _studied(options, opened, layers, tests.examples, learnt.examples, run.directory, progress)
        run.record |= {"result": {key: found[key] for key in ("base", "room", "variants")}}
        made = Remixed(lines, found, run.record, run.out)
        if made.out is not None:
            write_json(made.out / "remix.json", REMIX_FORMAT, dict(found))
            write_text(made.out / ROWS, json_lines(lines))
            report(made).write(made.out, made.run)
    return made


def read_study(path: Path) -> dict[str, Any]:
    """Reads ``remix.json``.

    Raises:
        UserError: absent or damaged.
    """
    from jaxcrit.core.files import read_json

    return read_json(path, REMIX_FORMAT, Study)


def read_remixed(path: Path) -> list[dict[str, Any]]:
    """Reads ``remix.jsonl``.

    Raises:
        UserError: absent or damaged.
    """
    from jaxcrit.core.files import read_lines

    return read_lines(path, RemixedRow)


def _layers(options: RemixOptions, config: ModelConfig) -> tuple[int, ...]:
    """The layers to mix anew.

    Raises:
        UserError: no mixture, more experts than it has, or layers that it has not.
    """
    if not config.experts:
        raise UserError(
            f"--model={options.model or 'embedded'}: expected a mixture of experts, got a {config.family} model,"
            " whose layers have one MLP each; there is nothing to mix"
        )
    if options.experts > config.experts:
        raise UserError(f"--experts={options.experts}: the model has {config.experts} experts a layer")
    return resolve(LayerSpec.parse(options.layers), config.num_layers).layers


def _refuse_repeated(references: Sequence[Example], tests: Sequence[Example]) -> None:
    """Refuses test rows that are references too.

    Raises:
        UserError: naming rows.
    """
    known = {one.token_ids[: one.prompt_length].tobytes(): row for row, one in enumerate(references, 1)}
    both = [
        f"{row} ({known[key]} of --reference)"
        for row, one in enumerate(tests, 1)
        if (key := one.token_ids[: one.prompt_length].tobytes()) in known
    ]
    if both:
        raise UserError(
            f"--reference: holds the prompt of {len(both)} rows of --data, which would be looking up the answer: row"
            f" {listed(both, 3)}; remove them"
        )


def _studied(
    options: RemixOptions,
    model: Model,
    layers: tuple[int, ...],
    tests: Sequence[Example],
    learnt: Sequence[Example],
    directory: Any,
    bars: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All passes: references and rows as they are, then every trial on every row."""
    from jaxcrit.studies import remix as study

    depth, config = model.config.num_layers, model.config
    how: dict[str, Any] = {"batch_size": options.batch_size, "directory": directory, "bars": bars}
    of_learnt = study.surveyed(model, learnt, partial="partial_reference.npz", **how)
    right = np.flatnonzero(of_learnt.exact)
    if len(right) < _LEAST * options.neighbours:
        raise UserError(
            f"--reference: expected {_LEAST * options.neighbours} rows or more that the model answers exactly,"
            f" {_LEAST} for each of --neighbours={options.neighbours}; it does {len(right)} of {len(learnt)}"
        )
    mine, known = study.surveyed(model, tests, partial="partial_data.npz", **how), of_learnt.of(right)
    centre = known.states.mean(axis=0, dtype=np.float64)
    squared = 2 - 2 * study.unit(mine.states, centre) @ study.unit(known.states, centre).T
    near = study.nearest(np.maximum(squared, 0), options.neighbours)
    references = study.References(
        [learnt[row] for row in right.tolist()],
        known.shares,
        near,
        study.drawn(len(tests), len(right), options.neighbours, options.seed),
    )
    others = study.random_layers(depth, layers, options.seed)
    wanted = study.trials(options.chosen_methods, layers, others, options.controls == "few")
    asked = study.Asked(options.at == "all", options.experts, options.neighbours, options.steps)
    measures = study.remixed(model, tests, references, wanted, asked, **how)
    names = [one.name for one in wanted]
    told = study.told(measures, [study.BASE, *names], options.seed)
    oracle = next(one for one in told if one["name"] == study.ORACLE)
    blends: dict[str, int] = {}
    if "kernel" in names:
        parts, counts = np.unique(measures[2, 1 + names.index("kernel")], return_counts=True)
        blends = {f"{part:g}": int(count) for part, count in zip(parts, counts, strict=True)}
    found = {
        "num_layers": depth,
        "experts": config.experts,
        "experts_per_token": config.experts_per_token,
        "layers": list(layers),
        "random_layers": list(others),
        "at": options.at,
        "rows": len(tests),
        "references": {"given": len(learnt), "exact": len(right)},
        "base": {"exact": told[0]["exact"], "loss": told[0]["loss"]},
        "room": study.room(oracle),
        "variants": told[1:],
        "blends": blends,
        "evaluations": study.planned(wanted, options.steps, depth),
    }

    def of(row: int, variant: int) -> dict[str, Any]:
        return {"loss": float(measures[0, variant, row]), "exact": bool(measures[1, variant, row])}

    lines = [
        {
            "row": row,
            "sample_id": one.sample_id,
            "neighbours": right[near.places[row]].tolist(),
            "weights": near.weights[row].tolist(),
            **({"blend": float(measures[2, 1 + names.index("kernel"), row])} if blends else {}),
            "before": of(row, 0),
            "after": {name: of(row, place) for place, name in enumerate(names, 1)},
        }
        for row, one in enumerate(tests)
    ]
    return lines, found


def report(made: Remixed) -> Report:
    """What could be won, what was, and what the controls say."""
    from jaxcrit.reporting import remix_plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes

    exact, loss = (
        Figure(f"{name}.png", on_axes(remix_plots.remix_effects, made.found, name), caption, (6.2, 5.4))
        for name, caption in (
            ("exact", "Exact answers of each variant less those of the model as it is, 95 % over rows."),
            ("loss", "Loss of each variant less that of the model as it is, 95 % over rows."),
        )
    )
    sections = [Section("Variants", "", _table(made.found), [exact, loss])]
    return Report(_sentences(made.found), _warnings(made), sections, CAVEATS, _notes(made))


def _table(found: Found) -> str:
    header = ["", "exact", "won", "lost", "p", "loss", "change [95 %]"]
    base = found["base"]
    rows = [["model as it is", f"{base['exact']:.3f}", "", "", "", f"{base['loss']:.4f}", ""]]
    for one in found["variants"]:
        change, low, high = one["loss_change"]
        rows.append(
            [
                one["name"],
                f"{one['exact']:.3f}",
                str(one["won"]),
                str(one["lost"]),
                tables.p_value(one["p"]),
                f"{one['loss']:.4f}",
                f"{change:+.4f} [{low:+.4f}, {high:+.4f}]",
            ]
        )
    return tables.table(header, rows)


def _sentences(found: Found) -> list[str]:
    by_name = {one["name"]: one for one in found["variants"]}
    place = "the last prompt token" if found["at"] == "last" else "the last prompt token and all of the answer"
    where = f"layers {span(found['layers'])} at {place}"
    oracle, rows, base = by_name["oracle"], found["rows"], found["base"]["exact"]
    counts = f"{oracle['won']} won and {oracle['lost']} lost of {rows}, p {tables.p_value(oracle['p'])}"
    if found["room"]:
        told = [f"Room: descent on each row's own answer, {where}, takes exact answers {base:.3f} to"]
        told[0] += f" {oracle['exact']:.3f} ({counts}); no method can be expected to win more"
    else:
        told = [f"No room: descent on each row's own answer, {where}, wins too little to tell ({counts})"]
    for name, one in by_name.items():
        if name not in METHODS:
            continue
        change, low, high = one["loss_change"]
        beside = by_name.get(f"{name}, random references")
        rest = f"; random references {beside['exact']:.3f}, {beside['loss_change'][0]:+.4f}" if beside else ""
        told.append(
            f"{name}: exact {base:.3f} to {one['exact']:.3f} ({one['won']} won, {one['lost']} lost, p"
            f" {tables.p_value(one['p'])}), loss {change:+.4f} [{low:+.4f}, {high:+.4f}]{rest}"
        )
    return told


def _notes(made: Remixed) -> list[str]:
    found = made.found
    told = [
        f"references: {found['references']['exact']} of {found['references']['given']} rows, those answered exactly",
        f"experts: {found['experts']} a layer, {found['experts_per_token']} for a token",
    ]
    if found["random_layers"]:
        told.append(f"random layers: {span(found['random_layers'])}")
    if found["blends"]:
        parts = ", ".join(f"{part} in {count}" for part, count in found["blends"].items())
        told.append(f"kernel: share of a row's own that its neighbours chose: {parts} rows")
    told.append(f"cost: {found['evaluations'] / found['num_layers']:.0f} forward and backward passes a batch")
    return told


def _warnings(made: Remixed) -> list[str]:
    told = []
    if made.run["model"]["dtype"] != "float32":
        told.append(
            f"computed in {made.run['model']['dtype'] or 'the dtype of the file'}: small changes of loss are its"
            " rounding"
        )
    own = next(one for one in made.found["variants"] if one["name"] == "own shares")
    if own["won"] + own["lost"]:
        told.append(
            f"holding a row's own shares through its answer wins {own['won']} and loses {own['lost']} rows by itself;"
            " compare the methods with that too"
        )
    return told
