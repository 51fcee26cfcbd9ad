"""``jaxcrit prune``: leaves layers out of a model, and says what that costs beside other layers of as many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import BY_HASH, MeshOptions, ModelOptions, TestedRowOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.options import option
from jaxcrit.core.rundir import CountedRows, SizedModel, SweepCost
from jaxcrit.core.schema import Count
from jaxcrit.core.selections import LayerSpec, resolve, span
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

MODEL = "model"  # directory within the run
CAVEATS = (
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows.",
    "Greedy: greedy decoding would give the whole response.",
    "Intervals are 95 % over rows, of the difference from the whole model; random sets differ among themselves too.",
    "Losses are those before any training; layers that cost little now need not be those that heal best.",
)


class Cost(TypedDict):
    """What a set of layers costs."""

    layers: list[int]
    loss: float
    change: float
    low: float | None
    high: float | None
    greedy: float


class Result(TypedDict):
    """``result`` of ``run.json``."""

    loss: float
    greedy: float
    parameters: Count
    parameters_before: Count
    sets: dict[str, Cost]
    block_evaluations: SweepCost


class PrunedRun(TypedDict):
    """``run.json`` of a complete run."""

    model: SizedModel
    data: dict[str, CountedRows]
    result: Result
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions(ModelOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit prune`` is asked."""

    drop: str = option("", "layers to leave out: 20-23, noncritical:K, KEY:K, @layers.json", word="SPEC")
    scores: str = option("", "scores.json for layers by a score", word="FILE", free=BY_HASH)
    force: bool = option(False, "the first and the last layer may be left out too")
    controls: int = option(10, "random sets of as many layers to set beside", lowest=0)
    seed: int = option(0, "seed of these sets", lowest=0)


OPTIONS = PruneOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A finished run.

    Attributes:
        run: content of ``run.json``.
        out: run directory; ``model`` in it is the checkpoint.
    """

    run: Mapping[str, Any]
    out: Path | None


def run(options: PruneOptions) -> int:
    """Measures, writes the checkpoint and the run directory, prints the report."""
    return shared.show(run_prune, report, options)


@shared.public
def prune(
    model: Any, drop: Any, rows: Any = "", *, out: str | Path, progress: Bars | None = None, **options: Any
) -> Pruned:
    """Leaves layers out of a model, and writes what is left as a checkpoint that transformers loads.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        drop: a `LayerSet`, layers by number, or a selection.
        rows: rows with responses, as `read_datasets` takes them, on which it is measured what that costs.
        out: run directory; the checkpoint is ``model`` in it.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `PruneOptions`.

    Raises:
        UserError: a mistake in options, checkpoint or rows; the first or last layer without ``force``.
    """
    if not isinstance(drop, str):
        drop = ",".join(map(str, drop.layers if isinstance(drop, LayerSet) else drop))
    asked = shared.options_for(PruneOptions, out, {**options, "drop": drop})
    return run_prune(asked, model, rows, progress)


def run_prune(options: PruneOptions, model: Any = None, rows: Any = None, progress: Bars | None = None) -> Pruned:
    """`prune` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    """
    from jaxcrit.core import processes
    from jaxcrit.core.files import local_path, remove_tree
    from jaxcrit.core.run import running
    from jaxcrit.criteria.ablation import without_sets
    from jaxcrit.models.export import write_checkpoint
    from jaxcrit.models.pruning import kept_layers, names_before, pruned, pruned_config

    if not options.drop:
        raise UserError("prune: expected --drop=SPEC, such as --drop=20-23 or --drop=noncritical:4 --scores=FILE")
    if options.out:
        local_path(options.out, "out")
    opened = shared.opened(options, model)
    config = opened.config
    chosen = _chosen(options, opened)
    kept = kept_layers(config.num_layers, chosen.layers)
    smaller = pruned_config(config, kept)  # what it refuses is refused before anything is run
    sets = _sets(chosen.layers, config.num_layers, options)
    datasets = opened.read(options, rows, responses=True)
    examples = [example for dataset in datasets for example in dataset.examples]
    with running(
        "prune",
        options,
        models={"model": opened},
        datasets=datasets,
        resolved={"drop": list(chosen.layers)},
        read_back=PrunedRun,
    ) as run:
        if run.complete:
            return Pruned(run.earlier, run.path)
        losses, right, counts = without_sets(
            opened,
            examples,
            list(sets.values()),
            batch_size=options.batch_size,
            directory=run.directory,
            bars=progress,
        )
        weights = opened.weights(progress)
        run.record["dropped"] = {**dataclasses.asdict(chosen), "layers": list(chosen.layers)}
        run.record["kept"] = list(kept)
        run.record["result"] = {
            "loss": float(losses[-1].mean()),
            "greedy": float(right[-1].mean()),
            "parameters": _size(weights, len(kept)),
            "parameters_before": _size(weights, config.num_layers),
            "sets": {
                name: _cost(layers, losses[number], right[number], losses[-1])
                for number, (name, layers) in enumerate(sets.items())
            },
            "block_evaluations": counts,
        }
        run.record["warnings"] = _warnings(run.record["result"], len(examples))
        held = {path: processes.whole(value) for path, value in weights.items()}  # of all processes
        if processes.first():
            remove_tree(run.path / MODEL)  # of an interrupted launch
            left, before = pruned(config, held, chosen.layers), names_before(config, kept)
            assert left.config == smaller
            write_checkpoint(left, opened.checkpoint, run.path / MODEL, dtype=options.dtype, before=before)
        report(Pruned(run.record, run.path)).write(run.path, run.record)
    return Pruned(run.record, run.path)


def _chosen(options: PruneOptions, model: Model) -> LayerSet:
    """The layers to leave out.

    Raises:
        UserError: a selection that names none, or the first or last layer without ``--force``.
    """
    from jaxcrit.core.layers import read_scores

    depth, spec = model.config.num_layers, LayerSpec.parse(options.drop, "drop")
    scores = read_scores(options.scores) if options.scores else None
    chosen = resolve(spec, depth, scores=scores, model_hash=model.model_hash, flag="drop", hint="give --scores=FILE")
    if not chosen.layers:
        raise UserError(f"--drop={options.drop}: names no layer")
    ends = sorted({0, depth - 1} & set(chosen.layers))
    if ends and not options.force:
        raise UserError(
            f"--drop={options.drop}: names layer {' and '.join(map(str, ends))}, the first or the last, which a model"
            " rarely does without; leave it, or give --force"
        )
    return chosen


def _sets(drop: Sequence[int], num_layers: int, options: PruneOptions) -> dict[str, list[int]]:
    """By name the layers asked for, the last as many but the very last, and random ones; each set once."""
    low, high = (0, num_layers) if options.force else (1, num_layers - 1)
    sets = {"asked": list(drop)}
    if len(drop) <= num_layers - 2:
        sets["last"] = list(range(num_layers - 1 - len(drop), num_layers - 1))
    rng = np.random.default_rng(options.seed)
    for number in range(options.controls):
        drawn = sorted(rng.permutation(np.arange(low, high))[: len(drop)].tolist())
        sets[f"random {number}"] = drawn
    return sets


def _cost(layers: Sequence[int], losses: np.ndarray, right: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    from jaxcrit.evaluation.intervals import t_interval

    change = losses - whole
    low, high = (None if np.isnan(end) else end for end in t_interval(change))
    return {
        "layers": list(layers),
        "loss": float(losses.mean()),
        "change": float(change.mean()),
        "low": low,
        "high": high,
        "greedy": float(right.mean()),
    }


def _size(weights: Mapping[str, Any], layers: int) -> int:
    """Numbers in a model of so many of the layers."""
    return sum(layers * value[0].size if path.startswith("blocks.") else value.size for path, value in weights.items())


def _random(sets: Mapping[str, Any]) -> np.ndarray:
    """What random sets cost."""
    return np.array([one["change"] for name, one in sets.items() if name.startswith("random")])


def _warnings(result: Mapping[str, Any], rows: int) -> list[str]:
    told, sets = [], result["sets"]
    asked, drawn = sets["asked"]["change"], _random(sets)
    if len(drawn) and (better := (drawn <= asked).mean()) > 0.05:
        told.append(
            f"{better:.0%} of {len(drawn)} random sets cost no more: nothing here speaks for this choice of layers"
        )
    if "last" in sets and sets["last"]["layers"] != sets["asked"]["layers"] and sets["last"]["change"] <= asked:
        told.append(f"layers {span(sets['last']['layers'])}, the last but the very last, cost no more")
    if rows < 2:
        told.append("one row says nothing of others: give more rows for intervals")
    return told


def report(found: Pruned) -> Report:
    """What the layers cost, beside others of as many."""
    from jaxcrit.reporting.report import Report, Section

    run, result = found.run, found.run["result"]
    asked, drawn = result["sets"]["asked"], _random(result["sets"])
    share = 1 - result["parameters"] / result["parameters_before"]
    headline = [
        f"Without layers {span(asked['layers'])}: {len(run['kept'])} of {run['model']['num_layers']} layers,"
        f" {share:.0%} fewer weights",
        f"Loss {result['loss']:.4f} with all layers, {asked['loss']:.4f} without ({asked['change']:+.4f};"
        f" 95 % {_ends(asked)})",
    ]
    if len(drawn):
        headline.append(f"Random sets of as many: {drawn.mean():+.4f} on average, {drawn.min():+.4f} at best")
    return Report(headline, run["warnings"], [Section("Sets of layers", "", _table(result))], CAVEATS)


def _ends(one: Mapping[str, Any]) -> str:
    return "unknown" if one["low"] is None else f"{one['low']:+.4f} to {one['high']:+.4f}"


def _table(result: Mapping[str, Any]) -> str:
    rows = [["none", "", f"{result['loss']:.4f}", "", "", f"{result['greedy']:.2f}"]]
    for name, one in result["sets"].items():
        loss, change, greedy = f"{one['loss']:.4f}", f"{one['change']:+.4f}", f"{one['greedy']:.2f}"
        rows.append([name, span(one["layers"]), loss, change, _ends(one), greedy])
    return tables.table(["left out", "layers", "loss", "change", "95 %", "greedy"], rows)
