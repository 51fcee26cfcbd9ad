"""``jaxcrit reuse``: whether one model may go on from another's keys and values, and which layers to recompute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import BY_HASH, BatchOptions, MeshOptions, OutOptions, PrefixOptions, RowOptions
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.options import Options, option
from jaxcrit.core.rundir import CountedRows, SizedModel
from jaxcrit.core.schema import MOST_LAYERS, Range
from jaxcrit.core.selections import span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
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
    groups: int = option(1, "groups of layers recomputed, at most: 1, or greedily 2", lowest=1, highest=2)
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
    return shared.show(run_reuse, report, options)


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
    """`reuse` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.files import write_json
    from jaxcrit.core.processes import share
    from jaxcrit.core.run import running
    from jaxcrit.data.dataset import joined
    from jaxcrit.data.prefix import with_prefixes
    from jaxcrit.evidence.rows import read_back, write_scored

    if sender is None and not options.sender:
        raise UserError("--sender: expected the model that has read the prefixes, such as a run of jaxcrit finetune")
    below, above = shared.pair(options, ("receiver", "sender"), (receiver, sender))
    longest = options.max_new_tokens if options.answers == "own" else 0
    read = below.read(options, rows, responses=not longest, reserve=longest)
    datasets = with_prefixes(read, options, boundary=below.config.rope.boundary, reserve=longest)
    tested = joined("rows", "", datasets)
    models = {"model": below, "sender": above}
    with running("reuse", options, models=models, datasets=datasets, keep=keep, read_back=ReuseRun) as run:
        if run.complete:
            path = run.path
            found = share(lambda: read_study(path / "reuse.json"))
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


def read_study(path: Path) -> dict[str, Any]:
    """Reads ``reuse.json``.

    Raises:
        UserError: absent or damaged.
    """
    from jaxcrit.core.files import read_json

    return read_json(path, REUSE_FORMAT, Study)


def _studied(
    options: ReuseOptions, receiver: Model, sender: Model, examples: Sequence[Example], directory: Any, bars: Any
) -> tuple[dict[str, LayerScores], dict[str, Any]]:
    """All passes over the rows: groups and random sets, pairs of groups if asked for, the most damaging layers."""
    from jaxcrit.criteria.kv_reuse import scores
    from jaxcrit.evidence.reuse import damage, own_answers, planned, sources
    from jaxcrit.models.stops import stop_tokens
    from jaxcrit.studies.reuse import best_of_each_size, halves, most_damaging, pairs_with, sets_to_try, studied

    if len(examples) < _LEAST_ROWS:
        raise UserError(f"expected {_LEAST_ROWS} rows or more, half to choose by and half to test, got {len(examples)}")
    config, depth, choose = receiver.config, receiver.config.num_layers, halves(len(examples))[0]
    longest = options.max_new_tokens if options.answers == "own" else 0
    gold = {row: one.token_ids[one.prompt_length :].tolist() for row, one in enumerate(examples)}
    stop = stop_tokens("", receiver, options.template)
    answer = own_answers(receiver, receiver.decoder(bars), examples, longest, stop) if longest else lambda _: gold
    rows: Any = (examples, answer, longest)
    how: dict[str, Any] = {"batch_size": options.batch_size, "directory": directory, "bars": bars}
    costs: dict[str, Any] = {}

    def over(sets: Sequence[tuple[int, ...]], name: str, number: int = 0) -> np.ndarray:
        plan = np.stack([np.zeros(depth, int), *(sources(depth, one) for one in sets)])
        costs[name] = {kind: count + costs.get(name, {}).get(kind, 0) for kind, count in planned(plan).items()}
        return damage(receiver, sender, plan, *rows, partial=f"partial_{name}{number}.npz", **how).measures[:, 1:]

    sets = sets_to_try(depth, options.random, options.seed)
    first = damage(receiver, sender, sets.plan, *rows, partial="partial.npz", **how)
    measures, alone, behind = first.measures, first.measures[0, 1 : 1 + depth], 1 + depth + sets.groups
    if options.groups == 2:
        pairs: dict[tuple[int, ...], np.ndarray] = {}
        groups = sets.recomputed[: sets.groups]
        best = best_of_each_size(groups, measures[0, 1 + depth : behind], choose)
        for number, place in enumerate(best[1:]):
            if wanted := [one for one in pairs_with(groups[place], depth) if one not in pairs]:
                pairs |= zip(wanted, over(wanted, "pairs", number).swapaxes(0, 1), strict=True)
        if pairs:
            sets, of_pairs = sets.with_pairs(list(pairs)), np.stack([*pairs.values()], axis=1)
            measures = np.concatenate([measures[:, :behind], of_pairs, measures[:, behind:]], axis=1)
    worst = most_damaging(alone[:, choose].mean(axis=1))
    of_worst = over(worst, "most_damaging")
    itemsize = receiver.decoder().embed.get_value().dtype.itemsize
    about = {"tolerance": options.tolerance, "seed": options.seed, "itemsize": itemsize}
    found = studied(config, sets, measures, worst, of_worst, first.distances, **about)
    windows = [window for window in config.windows if window is not None]
    cost = {
        "groups": planned(sets.plan[[0, *range(1 + depth, 1 + depth + sets.groups)]]),
        "all": planned(sets.plan),
        **costs,
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


def _layers(found: Found, receiver: Model) -> LayerSet:
    layers, tolerance = found["choice"]["layers"], found["choice"]["tolerance"]
    rule = f"group:{len(layers)} within {tolerance:g} nats"
    return LayerSet(tuple(layers), "reuse", rule, receiver.config.num_layers, receiver.model_hash)


def report(made: Reused) -> Report:
    """Whether it is safe, which layers to recompute, and what the controls say."""
    from jaxcrit.reporting import plots, reuse_plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

    found, depth, worst = made.found, made.found["num_layers"], int(made.scores["kv_reuse"].ranking()[0])
    each = tables.estimates(made.scores)
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
    groups = Figure("groups.png", matrix, "Damage of every group by its first layer and its size.", (6.2, 5.0))
    steps = sorted({*np.rint(np.linspace(0, depth, _SHOWN)).astype(int).tolist(), len(found["choice"]["layers"])})
    note = (
        "On the rows that did not choose; each count's best group was chosen on the others. later: the best group that"
        " begins above layer 0; random and damaging: the worst of the random sets, and the layers of most damage, of n."
    )
    sections = [
        Section(
            "Recomputed layers", note, _front(found, range(depth + 1)), [front, groups], brief=_front(found, steps)
        ),
        Section("One layer reused", "", functools.partial(tables.by_layer, each, [(worst, "◀")]), [alone]),
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
    groups, rest = cost["groups"], [cost[name] for name in ("all", "most_damaging", "pairs") if name in cost]
    own, theirs, behind = (sum(one[kind] for one in rest) / depth for kind in ("receiver", "sender", "suffix"))
    told = [
        f"Leading layers whose keys and values are equal to the bit: {found['identical']} of {depth}",
        f"cost: all {len(found['groups'])} groups by {groups['receiver'] / depth:g} prefills of the receiver and 1 of"
        f" the sender a row, {groups['suffix'] / depth:.1f} passes over what follows; with controls"
        f"{' and pairs' if 'pairs' in cost else ''} {own:g}, {theirs:g} and {behind:.1f}",
    ]
    if total > 0:
        share = score.values[top].sum() / total
        told.insert(0, f"Of the damage of single layers, {span(sorted(top))} hold {share:.0%} ({len(top)} of {depth})")
    if found["beyond_window"]:
        told.append(f"{found['beyond_window']} prefixes are longer than the window of some layer")
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
