"""``jaxcrit reuse``: whether one model may go on from another's keys and values, and which layers to recompute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, BatchOptions, MeshOptions, OutOptions, PrefixOptions, RowOptions
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.options import Options, option
from jaxcrit.core.rundir import CountedRows, SizedModel
from jaxcrit.core.schema import MOST_LAYERS, Range
from jaxcrit.core.selections import span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.data.batches import Batch
    from jaxcrit.data.templates import Example
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

REUSE_FORMAT = "jaxcrit.reuse"
_LEAST_ROWS = 4
_SHOWN = 12  # lines of the front in a terminal
Found = Mapping[str, Any]
CAVEATS = (
    "Damage is KL(p || p') in nats, mean over the scored tokens of a row, then over rows: p of the receiver over its"
    " own keys and values, p' over the mixed ones. It says that answers move, not whether they get worse: generate with"
    " --sender and score your own task.",
    "Groups are chosen on every other row and shown on the rest; intervals are bootstraps over these rows and know"
    " nothing of other kinds of prompts.",
    "kv_reuse is a diagnosis: recomputing the layers of most damage one by one begins each run of them at the sender's"
    " stream, an error of its own. The use is a group; the first n layers need no stream of the sender at all.",
    "jaxcrit serves nothing: shares of a prefill and bytes are counts, not times.",
    "Two models of which one was tuned from the other in its last K layers alone (finetune --layers=last:K) share the"
    " keys and values below for nothing.",
)


class Shown(TypedDict):
    """Damage of a set of layers to some rows, see `jaxcrit.studies.reuse.told`."""

    kl: float
    stderr: float
    low: float
    high: float
    answer: float


class Entry(TypedDict):
    """A set of layers to recompute."""

    layers: list[Annotated[int, Range(0, MOST_LAYERS)]]
    recomputed: float
    bytes_per_token: int
    choose: Shown
    test: Shown


class Chosen(Entry):
    """The set that was chosen."""

    tolerance: float


class Line(TypedDict):
    """A count of layers: the best group and its controls."""

    count: int
    best: Entry
    first: Entry
    last: Entry
    later: Entry | None
    best_less_first: list[float]


class Study(TypedDict):
    """``reuse.json`` as a report takes it."""

    pair: dict[str, str]
    rows: dict[str, int]
    num_layers: Annotated[int, Range(1, MOST_LAYERS)]
    identical: int
    beyond_window: int
    reused: Entry
    choice: Chosen
    front: list[Line]
    groups: list[Entry]
    random: list[Entry]
    most_damaging: list[Entry]
    cost: dict[str, Any]


class ReuseRun(TypedDict):
    """``run.json`` of a complete run."""

    model: SizedModel
    data: dict[str, CountedRows]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoModels(Options, title="model and data"):
    """Which two models."""

    sender: str = option("", "what has read the beginnings of prompts", word="DIR", free=BY_HASH)
    receiver: str = option("", "what answers (default: embedded)", word="DIR", free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseOptions(TwoModels, RowOptions, OutOptions, PrefixOptions, BatchOptions, MeshOptions, title="reuse"):
    """What ``jaxcrit reuse`` is asked; all datasets are one here, rendered by the receiver's template."""

    answers: Literal["own", "gold"] = option("own", "scored: the receiver's own answers, or the rows'", ("own", "gold"))
    max_new_tokens: int = option(16, "tokens of an own answer, at most", lowest=1)
    random: int = option(20, "random sets of layers to compare with", lowest=0)
    tolerance: float = option(0.01, "damage that is accepted, nats a scored token", lowest=0)
    seed: int = option(0, "seed of the random layers and of the bootstrap", lowest=0)


OPTIONS = ReuseOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Reused:
    """What the study found.

    Attributes:
        scores: ``kv_reuse``, ``kv_distance_keys`` and ``kv_distance_values``.
        found: content of ``reuse.json``: damage of every group, front, controls, choice.
        layers: the layers to recompute.
        run: content of ``run.json``.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    found: Found
    layers: LayerSet
    run: Mapping[str, Any]
    out: Path | None


def run(options: ReuseOptions) -> int:
    """Measures, writes the run directory, prints the report."""
    from jaxcrit.core.progress import bars

    found = run_reuse(options, progress=bars)
    return shared.tell(report(found), found.out)


@shared.public
def reuse(
    sender: Any, receiver: Any, rows: Any = "", *, out: str | Path = "", progress: Bars | None = None, **options: Any
) -> Reused:
    """Measures what the receiver loses over the sender's keys and values, and chooses layers to recompute.

    Args:
        sender: a `Model`, or the name of one, as `load` takes it.
        receiver: model of the same shape and vocabulary.
        rows: prompts, as `read_datasets` takes them; with responses for ``answers="gold"``.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `ReuseOptions`.

    Raises:
        UserError: a mistake in options, checkpoints or rows; then nothing is left in ``out``.
    """
    asked = shared.options_for(ReuseOptions, out, options)
    return run_reuse(asked, sender=sender, receiver=receiver, rows=rows, progress=progress, keep=bool(out))


def run_reuse(
    options: ReuseOptions,
    *,
    sender: Any = None,
    receiver: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Reused:
    """Runs the study; goes on where an interrupted run of the same options stopped, reads a complete one back.

    Args:
        options: what is asked.
        sender: model in place of the one that the options name.
        receiver: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars; None for silence.
        keep: whether a run directory is written.

    Raises:
        UserError: see `reuse`.
    """
    from jaxcrit.core.files import read_json, write_json
    from jaxcrit.core.processes import share
    from jaxcrit.core.run import running
    from jaxcrit.data.dataset import joined
    from jaxcrit.data.prefix import with_prefixes
    from jaxcrit.evidence.rows import read_back, write_scored

    if sender is None and not options.sender:
        raise UserError("--sender: expected the model that has read the prefixes, such as a run of jaxcrit finetune")
    below, above = pair(options, sender, receiver)
    gold = options.answers == "gold"
    read = below.read(options, rows, responses=gold, reserve=0 if gold else options.max_new_tokens)
    datasets = with_prefixes(read, options)
    tested = joined("rows", "", datasets)
    check_rows(below, tested.examples, 0 if gold else options.max_new_tokens)
    models = {"model": below, "sender": above}
    with running("reuse", options, models=models, datasets=datasets, keep=keep, read_back=ReuseRun) as run:
        if run.complete:
            path = run.path
            found = share(lambda: read_json(path / "reuse.json", REUSE_FORMAT, Study))
            return Reused(read_back(path, dict[str, Any]), found, _layers(found, below), run.earlier, path)
        scores, found = _studied(options, below, above, tested.examples, run.directory, progress)
        run.record |= {"result": {key: found[key] for key in ("reused", "choice", "identical", "cost")}}
        made = Reused(scores, found, _layers(found, below), run.record, run.out)
        if made.out is not None:
            write_json(made.out / "reuse.json", REUSE_FORMAT, found)
            write_scored(made.out, scores)
            made.layers.save(made.out / "layers.json")
            report(made).write(made.out, made.run)
    return made


def pair(options: Any, sender: Any, receiver: Any, role: str = "receiver") -> tuple[Model, Model]:
    """The receiver, which ``role`` names, and the sender; checked to be of one shape and vocabulary.

    Raises:
        UserError: see `check_pair`; or weights of two dtypes.
    """
    from jaxcrit.models.model import check_pair, open_model

    below = shared.opened(options, receiver, role)
    name = options.sender if sender is None else sender
    above = open_model(name, mesh=below.mesh, dtype=options.dtype, keep=sender is not None)
    check_pair(below, above, (role, "sender"))
    if below.dtype != above.dtype:
        raise UserError(f"--{role} is in {below.dtype}, --sender in {above.dtype}; give --dtype")
    return below, above


def check_rows(model: Model, examples: Sequence[Example], reserve: int) -> None:
    """Refuses rows whose prefix and whole rotate differently.

    Args:
        model: model of a certain context.
        examples: rows with prefixes.
        reserve: tokens of an answer that are not there yet.

    Raises:
        UserError: it names the rows.
    """
    boundary = model.config.rope.boundary
    if boundary is None:
        return
    over = [
        row
        for row, one in enumerate(examples, 1)
        if one.prefix_length <= boundary < (one.prompt_length + reserve if reserve else len(one.token_ids))
    ]
    if over:
        raise UserError(
            f"row {listed(over)}: the prefix lies on one side of the {boundary} tokens at which the model's longrope"
            " takes other frequencies, the whole on the other: no cache serves both; leave these rows out"
        )


def _studied(
    options: ReuseOptions, receiver: Model, sender: Model, examples: Sequence[Example], directory: Any, bars: Any
) -> tuple[dict[str, LayerScores], dict[str, Any]]:
    """Both passes over the rows: all groups and random sets, then the layers that the first found most damaging."""
    from jaxcrit.criteria.kv_reuse import scores
    from jaxcrit.evidence.reuse import damage, own_answers, planned, sources
    from jaxcrit.models.stops import stop_tokens
    from jaxcrit.studies.reuse import halves, most_damaging, sets_to_try, studied

    if len(examples) < _LEAST_ROWS:
        raise UserError(f"expected {_LEAST_ROWS} rows or more, half to choose by and half to test, got {len(examples)}")
    config, depth = receiver.config, receiver.config.num_layers
    sets = sets_to_try(depth, options.random, options.seed)
    longest = options.max_new_tokens if options.answers == "own" else 0
    answer: Any = _of_rows(examples)
    if longest:
        stop = stop_tokens("", receiver, options.template)
        answer = own_answers(receiver, receiver.decoder(bars), examples, longest, stop)
    how = {"batch_size": options.batch_size, "directory": directory, "bars": bars}
    pass_over = (examples, answer, longest)
    first = damage(receiver, sender, sets.plan, *pass_over, partial="partial.npz", **how)
    alone = first.measures[0, 1 : 1 + depth]
    worst = most_damaging(alone[:, halves(len(examples))[0]].mean(axis=1))
    plan = np.stack([np.zeros(depth, int), *(sources(depth, one) for one in worst)])
    second = damage(receiver, sender, plan, *pass_over, partial="partial_worst.npz", **how)
    itemsize = receiver.decoder().embed.get_value().dtype.itemsize
    how = {"tolerance": options.tolerance, "seed": options.seed, "itemsize": itemsize}
    found = studied(config, sets, first.measures, worst, second.measures[:, 1:], first.distances, **how)
    windows = [window for window in config.windows if window is not None]
    cost = {
        "groups": planned(sets.plan[[0, *range(1 + depth, 1 + depth + sets.groups)]]),
        "all": planned(sets.plan),
        "most_damaging": planned(plan),
        "batches": first.batches,
    }
    found |= {
        "pair": {"receiver": receiver.model_hash, "sender": sender.model_hash},
        "scored": options.answers,
        "num_layers": depth,
        "beyond_window": sum(one.prefix_length > min(windows) for one in examples) if windows else 0,
        "cost": cost,
    }
    meta = {**receiver.facts, "sender_hash": sender.model_hash, "prefix": options.prefix, "answers": options.answers}
    return scores(alone, first.distances, [one.sample_id for one in examples], meta), found


def _of_rows(examples: Sequence[Example]) -> Any:
    """Function that gives the answers which the rows of a batch have themselves."""

    def answer(batch: Batch) -> dict[int, Any]:
        rows = batch.rows[batch.rows < len(examples)].tolist()
        return {row: examples[row].token_ids[examples[row].prompt_length :].tolist() for row in rows}

    return answer


def _layers(found: Found, receiver: Model) -> LayerSet:
    layers, tolerance = found["choice"]["layers"], found["choice"]["tolerance"]
    rule = f"group:{len(layers)} within {tolerance:g} nats"
    return LayerSet(tuple(layers), "reuse", rule, receiver.config.num_layers, receiver.model_hash)


def report(made: Reused) -> Report:
    """Whether it is safe, which layers to recompute, and what the controls say."""
    from jaxcrit.reporting import plots, reuse_plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

    found, depth = made.found, made.found["num_layers"]
    draw = on_axes(
        plots.layer_losses,
        made.scores["kv_reuse"],
        {"all layers reused": _mean(found["reused"])},
        label="this layer reused alone",
        title=rows_title(made.run),
        axis="KL (nats a scored token)",
    )
    alone = Figure("kv_reuse.png", draw, "Damage of each layer's keys and values, reused alone.")
    front = Figure("front.png", on_axes(reuse_plots.reuse_front, found), "Damage over recomputed layers, controls.")
    matrix = on_axes(reuse_plots.reuse_matrix, found["groups"], depth)
    groups = Figure("groups.png", matrix, "Damage of every group by its first layer and its size.", (7.0, 5.4))
    steps = sorted({*np.rint(np.linspace(0, depth, _SHOWN)).astype(int).tolist(), len(found["choice"]["layers"])})
    note = (
        "On the rows that did not choose; each count's best group was chosen on the others. later: the best group that"
        " begins above layer 0; random and damaging: the worst of the random sets, and the layers of most damage, of n."
    )
    sections = [
        Section(
            "Recomputed layers", note, _front(found, range(depth + 1)), [front, groups], brief=_front(found, steps)
        ),
        Section("One layer reused", "", lambda style: _alone(made.scores, style), [alone]),
    ]
    return Report(_sentences(made), _warnings(made), sections, CAVEATS, _notes(made))


def _mean(entry: Found) -> float:
    return float(entry["choose"]["kl"] + entry["test"]["kl"]) / 2


def _kl(entry: Found | None) -> str:
    return "-" if entry is None else f"{entry['test']['kl']:.4f}"


def _interval(one: Found) -> str:
    return f"{one['kl']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"


def _front(found: Found, counts: Sequence[int] | range) -> str:
    by_count = {
        name: {len(one["layers"]): one for one in sorted(found[name], key=lambda one: -one["test"]["kl"])}
        for name in ("random", "most_damaging")
    }
    header = ["n", "best group", "KL ± s.e.", "first:n", "later", "last:n", "random", "damaging", "bytes/token", ""]
    rows = []
    for count in counts:
        line = found["front"][count]
        best, marks = line["best"], line["best"]["layers"] == found["choice"]["layers"]
        rows.append(
            [
                str(count),
                span(best["layers"]) or "none",
                f"{best['test']['kl']:.4f} ± {best['test']['stderr']:.4f}",
                *(_kl(line[name]) for name in ("first", "later", "last")),
                *(_kl(by_count[name].get(count)) for name in ("random", "most_damaging")),
                str(best["bytes_per_token"]),
                "◀ chosen" if marks and len(best["layers"]) == count else "",
            ]
        )
    return tables.table(header, rows)


def _alone(scores: Mapping[str, LayerScores], style: bool = False) -> str:
    worst = int(scores["kv_reuse"].ranking()[0])
    header = ["layer", *(f"{key} ± s.e." for key in scores), ""]
    rows = [
        [str(layer), *(tables.estimate(score, layer) for score in scores.values()), "◀" if layer == worst else ""]
        for layer in range(next(iter(scores.values())).num_layers)
    ]
    return tables.table(header, rows, [style and layer == worst for layer in range(len(rows))])


def _sentences(made: Reused) -> list[str]:
    found, chosen, reused = made.found, made.found["choice"], made.found["reused"]["test"]
    layers, depth, tolerance = chosen["layers"], found["num_layers"], f"--tolerance={chosen['tolerance']:g}"
    rows, test = f"{found['rows']['test']} held-out rows", chosen["test"]
    everything = f"KL {_interval(reused)} nats a scored token, {reused['answer']:.0%} of answers change ({rows})"
    if not layers:
        told = [f"Safe for this pair within {tolerance}: every layer's keys and values reused, {everything}"]
    else:
        told = [f"Not safe for this pair as it is, by {tolerance}: every layer's keys and values reused, {everything}"]
        share = f"{len(layers)} of {depth} layers, {chosen['recomputed']:.1%} of the prefill's block evaluations"
        if len(layers) == depth:
            told.append(f"No group short of all {depth} layers stays within {tolerance}: nothing can be reused")
        else:
            told.append(
                f"Recompute layers {span(layers)} ({share}): KL {_interval(test)}, {test['answer']:.0%} of answers"
                f" change, {chosen['bytes_per_token']} bytes a token to hand over"
            )
    if len(layers) < depth:
        within = test["high"] <= chosen["tolerance"]
        told.append(f"On the {rows} the choice {'is' if within else 'is not shown to be'} within {tolerance}")
    if layers:
        line = found["front"][len(layers)]
        difference, low, high = line["best_less_first"]
        told.append(
            f"Of as many layers: first:{len(layers)} {_kl(line['first'])} (the group less it {difference:+.4f}"
            f" [{low:.4f}, {high:.4f}]), last:{len(layers)} {_kl(line['last'])}; see the table for random layers and"
            " for the most damaging ones"
        )
    return told


def _notes(made: Reused) -> list[str]:
    found, score = made.found, made.scores["kv_reuse"]
    depth, cost, total = found["num_layers"], found["cost"], score.values.sum()
    top = score.ranking()[: max(1, round(depth / 10))]
    told = [
        f"Leading layers whose keys and values are equal to the bit: {found['identical']} of {depth}",
        f"cost: all {len(found['groups'])} groups by {cost['groups']['receiver'] / depth:g} prefills of the receiver"
        f" and 1 of the sender a row, {cost['groups']['suffix'] / depth:.1f} passes over what follows; with controls"
        f" {(cost['all']['receiver'] + cost['most_damaging']['receiver']) / depth:g},"
        f" {(cost['all']['sender'] + cost['most_damaging']['sender']) / depth:g} and"
        f" {(cost['all']['suffix'] + cost['most_damaging']['suffix']) / depth:.1f}",
    ]
    if total > 0:
        share = score.values[top].sum() / total
        told.insert(0, f"Of the damage of single layers, {span(sorted(top))} hold {share:.0%} ({len(top)} of {depth})")
    if found["beyond_window"]:
        told.append(f"{found['beyond_window']} prefixes are longer than the window of some layer")
    if made.out is not None and len(found["choice"]["layers"]) < depth:
        config = made.run["config"]
        receiver = f"--model={config['receiver']} " if config["receiver"] else ""
        told.append(
            f"next: jaxcrit generate {receiver}--sender={config['sender']} --recompute=@{made.out / 'layers.json'}"
            f" --prefix={config['prefix']} --data={config['data'] or 'FILE'}"
        )
    return told


def _warnings(made: Reused) -> list[str]:
    told = []
    if made.found["pair"]["receiver"] == made.found["pair"]["sender"]:
        told.append("sender and receiver are the same model: damage is 0 by definition")
    if made.run["model"]["dtype"] != "float32":
        told.append(
            f"computed in {made.run['model']['dtype'] or 'the dtype of the file'}: small damage is its rounding"
        )
    return told
