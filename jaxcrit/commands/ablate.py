"""``jaxcrit ablate``: what a model loses without each layer."""

from __future__ import annotations

import dataclasses
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
    from jaxcrit.evidence.sample_scores import SampleLosses
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

METHODS = ("skip", "mean")
CAVEATS = (
    "A layer is a 0-based decoder block. Skipped, it adds nothing to the residual stream; with its mean, it adds the"
    " same to every token.",
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows.",
    "Standard errors are of the difference from the intact model, over rows.",
    "What a layer is needed for and what training it would bring are different questions.",
)


class Cost(SweepCost):
    """``block_evaluations`` in ``result``."""

    means: Count


class Result(TypedDict):
    """``result`` of ``run.json``."""

    block_evaluations: Cost


class AblatedRun(TypedDict):
    """``run.json`` of a complete run."""

    model: SizedModel
    data: dict[str, CountedRows]
    result: Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateOptions(ModelOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit ablate`` is asked; all datasets are one here."""

    methods: str = option("skip,mean", "what a layer adds: skip nothing, mean the average", word="LIST")
    sites: Literal["blocks", "attn", "mlp"] = option("blocks", "whole blocks, or their attention or MLP alone", SITES)
    generate: bool = option(False, "count right answers too, with each layer skipped")
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)

    def check(self) -> None:
        """Checks the methods by name."""
        super().check()
        for method in self.chosen_methods:
            if method not in METHODS:
                zero = " (zeroing the weights is the same as skip)"
                hint = zero if method == "zero" else did_you_mean(method, METHODS)
                raise UserError(
                    f"--methods={self.methods}: expected {listed(METHODS)} with commas, got {method!r}{hint}"
                )

    @property
    def chosen_methods(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(part.strip() for part in self.methods.split(",")))

    def score(self, what: str) -> str:
        """Score key: of a method, or of ``skip_accuracy``."""
        return f"ablation_{what}{'' if self.sites == 'blocks' else f'_{self.sites}'}"


OPTIONS = AblateOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Ablated:
    """What ablation found.

    Attributes:
        scores: scores by key: ``ablation_METHOD`` is the mean over rows of each row's mean loss, in nats; the same
            ``_per_token`` weighs tokens alike; ``ablation_skip_accuracy`` is the share of right answers.
        run: content of ``run.json``; ``result`` has the counts.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    run: Mapping[str, Any]
    out: Path | None


def run(options: AblateOptions) -> int:
    """Ablates, writes the run directory, prints the report."""
    from jaxcrit.core.progress import bars

    found = run_ablate(options, progress=bars)
    return shared.tell(report(found), found.out)


@shared.public
def ablate(
    model: Any = "", rows: Any = "", *, out: str | Path = "", progress: Bars | None = None, **options: Any
) -> Ablated:
    """Measures what a model loses without each layer.

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
    """Runs the sweep; goes on where an interrupted run of the same options stopped, reads a complete one back.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars; None for silence.
        keep: whether a run directory is written.

    Raises:
        UserError: see `ablate`.
    """
    from jaxcrit.core.run import running
    from jaxcrit.criteria.ablation import ablation_losses, accuracies
    from jaxcrit.data.dataset import joined
    from jaxcrit.evidence.rows import forget_partial, read_back, write_scored

    opened = shared.opened(options, model)
    datasets = opened.read(options, rows, responses=True)
    with running(
        "ablate", options, models={"model": opened}, datasets=datasets, keep=keep, read_back=AblatedRun
    ) as run:
        if run.complete:
            return Ablated(read_back(run.path), run.earlier, run.path)
        examples = joined("rows", "", datasets).examples
        how: dict[str, Any] = {"batch_size": options.batch_size, "bars": progress}
        samples, counts = ablation_losses(
            opened, examples, options.sites, options.chosen_methods, directory=run.directory, **how
        )
        if options.generate:
            samples["skip_accuracy"] = accuracies(opened, examples, options.sites, options.max_new_tokens, **how)
        run.record["result"] = {"block_evaluations": counts}
        found = Ablated(_scores(options, opened, samples), run.record, run.out)
        if found.out is not None:
            write_scored(found.out, found.scores)
            report(found).write(found.out, found.run)
    forget_partial(found.out)
    return found


def _scores(options: AblateOptions, model: Model, samples: Mapping[str, SampleLosses]) -> dict[str, LayerScores]:
    depth, meta = model.config.num_layers, {**model.facts, "sites": options.sites}
    scores: dict[str, LayerScores] = {}
    for name, one in samples.items():
        key = options.score(name)
        if name == "skip_accuracy":
            scores[key] = one.score(key, depth, {**meta, "max_new_tokens": options.max_new_tokens}, "low")
        else:
            scores |= one.scores(key, depth, {**meta, "method": name})
    return scores


def report(found: Ablated) -> Report:
    """Losses and right answers without each layer."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

    figures = []
    for key, score in _shown(found.scores).items():
        axis = "share of right answers" if "accuracy" in key else "loss (nats, mean of sample means)"
        lines = {"intact model": score.meta["unchanged"]}
        draw = on_axes(plots.layer_losses, score, lines, label=key, title=rows_title(found.run), axis=axis)
        figures.append(Figure(f"{key}.png", draw, f"{key} of each layer."))
    section = Section("Without each layer", "", lambda style: _table(found.scores, style), figures)
    warnings = training_caution(next(iter(found.scores.values())).meta)
    return Report(_sentences(found.run, found.scores), warnings, [section], CAVEATS)


def _shown(scores: Mapping[str, LayerScores]) -> dict[str, LayerScores]:
    return {key: score for key, score in scores.items() if not key.endswith("_per_token")}


def _table(scores: Mapping[str, LayerScores], style: bool = False) -> str:
    shown = _shown(scores)
    worst = {key: int(score.ranking()[0]) for key, score in shown.items()}
    header = ["layer", *(f"{key.removeprefix('ablation_')} ± s.e." for key in shown), ""]
    rows = []
    for layer in range(next(iter(shown.values())).num_layers):
        cells = [tables.estimate(score, layer) for score in shown.values()]
        marks = [key.removeprefix("ablation_") for key, place in worst.items() if place == layer]
        rows.append([str(layer), *cells, f"◀ most needed: {', '.join(marks)}" if marks else ""])
    return tables.table(header, rows, [style and layer in worst.values() for layer in range(len(rows))])


def _sentences(run: Mapping[str, Any], scores: Mapping[str, LayerScores]) -> list[str]:
    counts, depth = run["result"]["block_evaluations"], run["model"]["num_layers"]
    first = next(iter(_shown(scores).values()))
    worst = int(first.ranking()[0])
    told = [
        f"Most needed: layer {worst} of {depth}; {first.name} {first.values[worst]:.4f},"
        f" {first.values[worst] - first.meta['unchanged']:+.4f} from the intact model"
    ]
    for key, score in _shown(scores).items():
        told.append(f"{key}: intact {score.meta['unchanged']:.4f}, median over layers {np.median(score.values):.4f}")
    told.append(
        tables.sweep_cost(counts, depth) + (f"; {counts['means']} more for the means" if counts["means"] else "")
    )
    return told
