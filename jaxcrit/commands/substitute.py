"""``jaxcrit substitute``: what the tuned model loses when layers are taken from the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, SITES, MeshOptions, TestedRowOptions
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.options import Options, option
from jaxcrit.core.rundir import CountedRows, SizedModel, SweepCost
from jaxcrit.core.schema import Count, Size
from jaxcrit.core.selections import LayerSpec, resolve, span, split_specs
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.criteria.substitution import Layers, Plan
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report


class Averages(TypedDict):
    """A loss: the mean over rows of their means, and over all tokens."""

    samples: float
    tokens: float


class Entry(Averages):
    """A set of layers in ``result``."""

    layers: list[Count]
    stderr: float | None
    changed: Count


class Losses(TypedDict):
    """Losses of the models as they are, in ``result``."""

    base: Averages
    tuned: Averages


class Cost(SweepCost):
    """``block_evaluations`` in ``result``."""

    unsubstituted: Count
    random: Count


class Result(TypedDict):
    """``result`` of ``run.json``."""

    loss: Losses
    changed: list[Count]
    centres: list[Count]
    sets: list[Entry]
    random: list[Entry]
    block_evaluations: Cost


class Asked(TypedDict):
    """What a report takes from ``config`` of ``run.json``."""

    sites: Literal["blocks", "attn", "mlp"]
    reverse: bool


class SubstitutedRun(TypedDict):
    """``run.json`` of a complete run."""

    config: Asked
    model: SizedModel
    data: dict[str, CountedRows]
    result: Result
    warnings: list[str]


class WindowMeta(TypedDict):
    """What the report takes from a score's meta."""

    unchanged: float
    num_samples: Count
    window: Size


CAVEATS = (
    "A layer is a 0-based decoder block. A window stands at its middle layer; layers whose window leaves the model have"
    " no value.",
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows (the paper's), or over"
    " all tokens alike.",
    "Standard errors are of the difference from the unchanged model, over rows; neighbouring windows share layers, so"
    " their losses are not independent measurements.",
    "Layers are put among others that were tuned without them: a high loss says that the tuned model relies on them"
    " here, not that tuning them alone would do.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(Options, title="model and data"):
    """Which two models."""

    base: str = option("", "checkpoint, hub id or finetune run (default: embedded)", word="DIR", free=BY_HASH)
    tuned: str = option("", "what was tuned from it: checkpoint or finetune run", word="DIR", free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubstituteOptions(PairOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit substitute`` is asked; all datasets are one here, rendered by the tuned model's template."""

    window: int = option(5, "layers taken together, around each in turn; odd", lowest=1)
    sites: Literal["blocks", "attn", "mlp"] = option("blocks", "whole blocks, or their attention or MLP alone", SITES)
    reverse: bool = option(False, "put layers of the tuned model into the base")
    sets: str = option("", "these sets in place of windows: 3-5,9;first:4;@layers.json", word="SPECS")
    random: int = option(0, "draws of as many random layers, to compare with", lowest=0, highest=10_000)
    seed: int = option(0, "seed of the random layers", lowest=0)

    @property
    def score(self) -> str:
        """Score key: other sites or the other direction are another quantity."""
        suffix = "" if self.sites == "blocks" else f"_{self.sites}"
        return f"substitution{suffix}{'_reverse' if self.reverse else ''}"


OPTIONS = SubstituteOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Substituted:
    """What substitution found.

    Attributes:
        scores: scores by key: `SubstituteOptions.score` is the mean over rows of each row's mean loss (the paper's), in
            nats; the same ``_per_token`` weighs tokens alike. Empty where sets were asked for.
        warnings: what would mislead a reader.
        run: content of ``run.json``; ``result`` has losses and counts.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    warnings: Sequence[str]
    run: Mapping[str, Any]
    out: Path | None

    @property
    def base_loss(self) -> float:
        """Loss of the base as it is, mean of per-sample means, nats."""
        return float(self.run["result"]["loss"]["base"]["samples"])

    @property
    def tuned_loss(self) -> float:
        """Loss of the tuned model as it is, mean of per-sample means, nats."""
        return float(self.run["result"]["loss"]["tuned"]["samples"])

    @property
    def block_evaluations(self) -> Mapping[str, Any]:
        """Counts: see docs/formats.md."""
        return dict(self.run["result"]["block_evaluations"])


def run(options: SubstituteOptions) -> int:
    """Substitutes, writes the run directory, prints the report."""
    return shared.show(run_substitute, report, options)


@shared.public
def substitute(
    base: Any, tuned: Any, rows: Any = "", *, out: str | Path = "", progress: Bars | None = None, **options: Any
) -> Substituted:
    """Measures what the tuned model loses when layers are taken from the model it was tuned from.

    Args:
        base: a `Model`, or the name of one, as `load` takes it.
        tuned: model that was tuned from it.
        rows: rows with responses, as `read_datasets` takes them; rendered by the tuned model's template.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `SubstituteOptions`.

    Raises:
        UserError: a mistake in options, checkpoints or rows; then nothing is left in ``out``.
    """
    asked = shared.options_for(SubstituteOptions, out, options)
    return run_substitute(asked, base=base, tuned=tuned, rows=rows, progress=progress, keep=bool(out))


def run_substitute(
    options: SubstituteOptions,
    *,
    base: Any = None,
    tuned: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Substituted:
    """`substitute` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.run import running
    from jaxcrit.criteria.substitution import make_plan, substitution_losses
    from jaxcrit.data.dataset import joined
    from jaxcrit.evidence.rows import write_scored
    from jaxcrit.models.model import changed_layers

    if tuned is None and not options.tuned:
        raise UserError("--tuned: expected the tuned model, a checkpoint directory or a run of jaxcrit finetune")
    lower, upper = shared.pair(options, ("base", "tuned"), (base, tuned))
    depth = upper.config.num_layers
    sets = [_set(text, depth) for text in split_specs(options.sets, ";")] if options.sets else []
    plan = make_plan(depth, options.window, sets, options.random, options.seed)
    datasets = upper.read(options, rows, responses=True)
    with running(
        "substitute",
        options,
        models={"model": upper, "base": lower},
        datasets=datasets,
        resolved={"sets": [list(layers) for layers in plan.sets]},
        keep=keep,
        read_back=SubstitutedRun,
    ) as run:
        if run.complete:
            return _finished(run.earlier, run.path)
        tested = joined("rows", "", datasets)
        losses, tokens, counts = substitution_losses(
            lower,
            upper,
            plan,
            tested.examples,
            sites=options.sites,
            reverse=options.reverse,
            batch_size=options.batch_size,
            directory=run.directory,
            bars=progress,
        )
        changed = changed_layers(lower, upper)
        result = _result(plan, losses, tokens, changed, reverse=options.reverse) | {"block_evaluations": counts}
        kept = losses, tokens, tested.sample_ids
        scores = _scores(options, lower, upper, result, *kept) if plan.centres else {}
        warnings = _warnings(result, lower, upper, scores)
        run.record |= {"result": result, "warnings": warnings}
        found = Substituted(scores, warnings, run.record, run.out)
        if found.out is not None:
            _write_losses(found.out, plan, depth, *kept)
            if scores:
                write_scored(found.out, scores)
            report(found).write(found.out, found.run)
    return found


def _set(text: str, num_layers: int) -> Layers:
    hint = "give the layers.json of an analysis, as @DIR/layers.json"
    return resolve(LayerSpec.parse(text, "sets"), num_layers, flag="sets", hint=hint).layers


def _scores(
    options: SubstituteOptions,
    base: Model,
    tuned: Model,
    result: Mapping[str, Any],
    losses: np.ndarray,
    tokens: np.ndarray,
    sample_ids: Sequence[str],
) -> dict[str, LayerScores]:
    """Scores of the windows that hold a layer in which the two models differ; the others say nothing of theirs."""
    from jaxcrit.evidence.sample_scores import SampleLosses

    centres, changed, depth = np.array(result["centres"]), result["changed"], tuned.config.num_layers
    differs = [entry["changed"] > 0 or not changed for entry in result["sets"]]  # none does: a warning says so
    trained = {"criteria": [], "rules": [], **tuned.trained, "layers": changed}
    meta = {
        **tuned.facts,
        **({"trained": trained} if 0 < len(changed) < depth else {}),
        "model_hash": base.model_hash,
        "tuned_hash": tuned.model_hash,
        "window": options.window,
        "sites": options.sites,
        "reverse": options.reverse,
    }
    samples = SampleLosses(centres[differs], losses[: len(centres)][differs], losses[-2], tokens, sample_ids)
    return samples.scores(options.score, depth, meta, "low" if options.reverse else "high")


def _result(
    plan: Plan, losses: np.ndarray, tokens: np.ndarray, changed: Sequence[int], *, reverse: bool
) -> dict[str, Any]:
    """Losses of every model in both averages, and of every set the error of its difference from the host.

    A set's ``changed`` is the number of its layers in which the models differ.
    """
    from jaxcrit.evidence.sample_scores import mean

    host, guest = losses[-2], losses[-1]
    names = ("base", "tuned") if reverse else ("tuned", "base")

    def averages(rows: np.ndarray) -> dict[str, Any]:
        return {"samples": mean(rows, np.ones(len(tokens))).tolist(), "tokens": mean(rows, tokens).tolist()}

    def entry(layers: Layers, row: np.ndarray) -> dict[str, Any]:
        error = float(np.std(row - host, ddof=1) / np.sqrt(len(row))) if len(row) > 1 else None
        differ = len(set(layers) & set(changed))
        return {"layers": list(layers), **averages(row), "stderr": error, "changed": differ}

    everything = [entry(layers, row) for layers, row in zip((*plan.sets, *plan.random), losses, strict=False)]
    return {
        "loss": {name: averages(row) for name, row in zip(names, (host, guest), strict=True)},
        "changed": list(changed),
        "centres": list(plan.centres),
        "sets": everything[: len(plan.sets)],
        "random": everything[len(plan.sets) :],
    }


def _write_losses(
    out: Path, plan: Plan, num_layers: int, losses: np.ndarray, tokens: np.ndarray, sample_ids: Sequence[str]
) -> None:
    sets = (*plan.sets, *plan.random)
    members = np.zeros((len(sets), num_layers), bool)
    for row, layers in zip(members, sets, strict=True):
        row[list(layers)] = True
    arrays = {
        "members": members,
        "random": np.arange(len(sets)) >= len(plan.sets),
        "losses": losses[:-2],
        "host": losses[-2],
        "guest": losses[-1],
        "tokens": tokens,
        "sample_ids": np.array(sample_ids),
    }
    from jaxcrit.core.files import write_npz

    write_npz(out / "substitution.npz", arrays, {"format": "jaxcrit.substitution", "format_version": 1})


def _finished(run: Mapping[str, Any], out: Path) -> Substituted:
    """Reads a complete run back."""
    from jaxcrit.core.files import DAMAGED
    from jaxcrit.evidence.rows import read_back

    centres, sets = len(run["result"]["centres"]), len(run["result"]["sets"])
    if not sets or centres not in (0, sets):
        raise UserError(f"{out / 'run.json'}: expected as many centres as sets, got {centres} of {sets}; {DAMAGED}")
    return Substituted(read_back(out, WindowMeta) if centres else {}, run["warnings"], run, out)


def _warnings(result: Mapping[str, Any], base: Model, tuned: Model, scores: Mapping[str, LayerScores]) -> list[str]:
    found = []
    sets = result["sets"]
    empty = sum(entry["changed"] == 0 for entry in sets)
    if 0 < len(result["changed"]) < tuned.config.num_layers:
        chosen = tuned.trained.get("criteria")
        found.append(
            f"the models differ in layers {span(result['changed'])} alone"
            + (f", which were trained, chosen by {listed(chosen)}" if chosen else "")
            + f": {empty} of {len(sets)} {'windows' if scores else 'sets'} hold none of them and have no value. What is"
            " lost elsewhere says nothing of layers that were not trained; train every layer to compare them"
        )
    before, after = (result["loss"][name]["samples"] for name in ("base", "tuned"))
    if base.model_hash == tuned.model_hash:
        found.append("base and tuned model are the same: nothing was tuned")
    elif after >= before:
        found.append(
            f"the tuned model's loss on these rows is {after:.4f}, the base's {before:.4f}: there is no gain to"
            " trace to layers"
        )
    if tuned.dtype != "float32":
        found.append(f"the forward pass ran in {tuned.dtype or 'the dtype of the file'}: losses carry its rounding")
    return found


def report(found: Substituted) -> Report:
    """Losses by window or set, beside random sets."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

    run, figures = found.run, []
    if found.scores:
        score, losses = next(iter(found.scores.values())), run["result"]["loss"]
        draw = on_axes(
            plots.layer_losses,
            score,
            {f"{name} model": losses[name]["samples"] for name in ("tuned", "base")},
            label=f"{_guest(run)} layers, {score.meta['window']} at a time",
            random=[entry["samples"] for entry in run["result"]["random"]],
            title=rows_title(run),
        )
        caption = "Loss with the window around each layer taken from the other model."
        figures = [Figure("substitution.png", draw, caption)]
    section = Section("Loss after substitution", "", lambda style: _table(run, style), figures)
    return Report(_sentences(run), found.warnings, [section], CAVEATS)


def _guest(run: Mapping[str, Any]) -> str:
    sites = {"blocks": "", "attn": "attention of ", "mlp": "MLPs of "}[run["config"]["sites"]]
    return f"{sites}{'tuned' if run['config']['reverse'] else 'base'}"


def _table(run: Mapping[str, Any], style: bool = False) -> str:
    result = run["result"]
    host, guest = (result["loss"][name]["samples"] for name in _names(run))
    windows = bool(result["centres"])
    header = ["layer" if windows else "", "layers", "loss", "− unchanged ± s.e.", "per token", "of the way", ""]
    most = result["sets"].index(_extreme(run))
    rows = []
    for place, entry in enumerate(result["sets"]):
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        share = (entry["samples"] - host) / (guest - host) if guest != host else np.nan
        where = [str(result["centres"][place]) if windows else "", _short(span(entry["layers"]))]
        if not entry["changed"]:
            rows.append([*where, "-", "-", "-", "-", "untrained"])
            continue
        rows.append(
            [
                *where,
                f"{entry['samples']:.4f}",
                f"{entry['samples'] - host:+.4f}{error}",
                f"{entry['tokens']:.4f}",
                f"{share:.1%}" if np.isfinite(share) else "-",
                ("◀ lowest" if run["config"]["reverse"] else "◀ highest")
                if place == most and len(result["sets"]) > 1
                else "",
            ]
        )
    return tables.table(header, rows, [style and place == most for place in range(len(rows))])


def _sentences(run: Mapping[str, Any]) -> list[str]:
    from jaxcrit.reporting.report import num_samples

    result, counts = run["result"], run["result"]["block_evaluations"]
    host, guest = _names(run)
    losses = {name: result["loss"][name] for name in (host, guest)}
    depth = run["model"]["num_layers"]
    extreme = _extreme(run)
    difference = extreme["samples"] - losses[host]["samples"]
    error = "" if extreme["stderr"] is None else f" ± {extreme['stderr']:.4f}"
    told = [
        f"{'Lowest' if run['config']['reverse'] else 'Highest'} loss with {_guest(run)} layers"
        f" {_short(span(extreme['layers']))}: {extreme['samples']:.4f}, {difference:+.4f}{error} from the {host} model",
        "; ".join(
            f"{name} model {loss['samples']:.4f} ({loss['tokens']:.4f} per token)" for name, loss in losses.items()
        )
        + f", {num_samples(run)} samples. 'Of the way' is from the first to the second.",
    ]
    sizes = sorted({len(entry["layers"]) for entry in result["random"]})
    for size in sizes:
        drawn = np.array([entry["samples"] for entry in result["random"] if len(entry["layers"]) == size])
        mine = np.array([entry["samples"] for entry in result["sets"] if len(entry["layers"]) == size])
        low, high = np.percentile(drawn, (5, 95))
        told.append(
            f"{len(drawn)} random sets of {size} layers: mean {drawn.mean():.4f}, 5-95 % {low:.4f} to {high:.4f};"
            f" of {len(mine)} asked for, mean {mine.mean():.4f}, {int((mine > high).sum())} are above and"
            f" {int((mine < low).sum())} below that range."
        )
    told.append(
        tables.sweep_cost(counts, depth, f"{counts['forward_passes'] / depth:.2f} L; ")
        + f"; {counts['unsubstituted']} more for the other model as it is"
        + (f", {counts['random']} for random sets" if counts["random"] else "")
    )
    return told


def _extreme(run: Mapping[str, Any]) -> Entry:
    """The set of highest loss (of lowest, in the other direction), of those in which the models differ."""
    sets = run["result"]["sets"]
    differing = [entry for entry in sets if entry["changed"]] or sets
    return (min if run["config"]["reverse"] else max)(differing, key=lambda entry: entry["samples"])


def _names(run: Mapping[str, Any]) -> tuple[str, str]:
    """The model that layers are put into, and the one they come from."""
    return ("base", "tuned") if run["config"]["reverse"] else ("tuned", "base")


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
