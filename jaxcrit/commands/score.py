"""``jaxcrit score``: layers by other criteria than δ: one pass for all that need the same, one scores.json for all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError
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
from jaxcrit.core.options import Options, option
from jaxcrit.reporting.tables import table, wide_table
from jaxcrit.selection.decisions import Choice, agreed, choices

if TYPE_CHECKING:
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.evidence.criterion import Criterion, Measured, Needs, Own
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report

CAVEATS = (
    "Each criterion responds to one thing and is blind to others (docs/criteria.md); none of them is criticality.",
    "Many of them rise or fall with depth in any model: compare by jaxcrit correlate, and read what depth leaves.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="criteria"):
    """What ``jaxcrit score`` is asked."""

    criteria: str = option("", "keys of docs/criteria.md (default: all but perturbations)", word="KEYS")
    base: str = option("", "what the model was tuned from, for weight_change", word="DIR", free=BY_HASH)


OPTIONS = ScoreOptions
_FEW = 32  # rows


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A finished run.

    Attributes:
        scores: by key; of several datasets their mean ranks, for criteria that need data.
        datasets: by dataset, what needs its data.
        warnings: what would mislead a reader.
        run: what ``run.json`` holds.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    datasets: dict[str, dict[str, LayerScores]]
    warnings: list[str]
    run: dict[str, Any]
    out: Path | None


def extra() -> list[type[Options]]:
    """Options of single criteria, given as ``--KEY.NAME``."""
    from jaxcrit.criteria.registry import own_options

    return own_options()


def run(options: ScoreOptions, *own: Options) -> int:
    """Scores, writes, prints the table."""
    return shared.show(run_score, report, options, own)


def run_score(
    options: ScoreOptions,
    given: Sequence[Options] = (),
    *,
    model: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Scored:
    """Scores, and writes the run directory.

    Args:
        options: what is asked.
        given: options of single criteria; those of criteria that are not asked for must stand at their defaults.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        keep: whether a run directory is written.

    Raises:
        UserError: any mistake in flags, checkpoints or data; then nothing is left in the run directory.
    """
    from jaxcrit.core.deletions import write_deletions
    from jaxcrit.core.layers import write_scores
    from jaxcrit.core.run import running
    from jaxcrit.criteria.registry import of_chosen, parse_criteria
    from jaxcrit.selection.cautions import training_caution
    from jaxcrit.selection.choice import mean_rank

    chosen = parse_criteria(options.criteria, two_models=bool(options.base))
    model = shared.opened(options, model)
    if not model.config.experts:
        if options.criteria and (of_mixtures := [key for key, one in chosen.items() if one.needs == "routing"]):
            raise UserError(
                f"--criteria={of_mixtures[0]}: is of a mixture of experts; this {model.config.family} model has no"
                " router"
            )
        chosen = {key: one for key, one in chosen.items() if one.needs != "routing"}
    own, needs = of_chosen(chosen, given), {one.needs for one in chosen.values()}
    base = shared.opened(options, None, "base", mesh=model.mesh) if "two models" in needs else None
    answered = bool(needs & {"backward", "routing"})
    of_rows = answered or bool(needs & {"forward", "perturbed"})
    datasets = model.read(options, rows, responses=answered) if of_rows else []
    models = {"model": model} | ({} if base is None else {"base": base})
    resolved, further = {"criteria": list(chosen)}, tuple(own.values())
    with running(
        "score", options, models=models, datasets=datasets, resolved=resolved, further=further, keep=keep
    ) as run:
        without: dict[str, str] = {}
        meta = model.facts | ({} if base is None else {"base_hash": base.model_hash})
        results = _measured(chosen, own, _of_weights(chosen, model, base, progress))
        of_model = {key: chosen[key].scores(key, one, meta) for key, one in results.items()}
        of_data: dict[str, dict[str, LayerScores]] = {}
        rows = _rows_pass(options, chosen, own, model, datasets, progress)
        for dataset in datasets:
            evidence = rows(dataset)
            results = _measured(chosen, own, evidence, None if options.criteria else without)
            meta = {**model.facts, "dataset": dataset.name, "num_samples": len(dataset.examples)}
            of_data[dataset.name] = {key: chosen[key].scores(key, one, meta) for key, one in results.items()}
            if run.out is None:
                continue
            folder = run.folder(dataset.name, len(datasets) == 1)
            if len(datasets) > 1:
                write_scores(folder / "scores.json", of_data[dataset.name])
            if left := {key: one.without_each for key, one in results.items() if one.without_each is not None}:
                write_deletions(folder, left, dataset.sample_ids)
        scores = {
            key: of_model[key] if key in of_model else mean_rank([one[key] for one in of_data.values()])
            for key in chosen
            if key not in without
        }
        warnings = [*_warnings(scores), *(f"{key}: is left out: {why}" for key, why in without.items())]
        few = [f"{one.name} ({count})" for one in datasets if (count := len(one.examples)) < _FEW]
        if few and of_data:
            warnings.append(
                f"few rows in {', '.join(few)}: what is measured on fewer than {_FEW} changes much with other rows"
            )
        warnings += training_caution(model.facts)
        run.record["warnings"] = warnings
        found = Scored(scores, of_data, warnings, run.record, run.out)
        if found.out is not None:
            write_scores(found.out / "scores.json", scores)
            report(found).write(found.out, found.run)
    return found


def _measured(
    chosen: Mapping[str, Criterion], own: Own, evidence: Mapping[str, Any], without: dict[str, str] | None = None
) -> dict[str, Measured]:
    """By key, every criterion whose evidence is there.

    A function that serves several keys is called once. A criterion that refuses its evidence goes into ``without``
    with the reason; where that is None, the refusal is raised.
    """
    made: dict[tuple[Any, int], Any] = {}
    found: dict[str, Measured] = {}
    for key in (key for key in chosen if key in evidence):
        call = chosen[key].score, id(evidence[key])
        try:
            if call not in made:
                made[call] = chosen[key].measured(evidence[key], own)
        except UserError as error:
            if without is None:
                raise
            without[key] = str(error)
            continue
        found[key] = made[call][key] if isinstance(made[call], Mapping) else made[call]
    return found


def _of_weights(chosen: Mapping[str, Criterion], model: Model, base: Model | None, bars: Bars | None) -> dict[str, Any]:
    """By key, evidence that takes no data."""
    from jaxcrit.evidence.weights import weight_changes, weight_spectra

    layers = model.config.num_layers
    found = _pass("weights", chosen, bars, layers, "weights", lambda _, step: weight_spectra(model, step))
    if base is not None:
        taken = _pass(
            "two models", chosen, bars, layers, "both models", lambda _, step: weight_changes(base, model, step)
        )
        found |= taken
    return found


def _rows_pass(
    options: ScoreOptions,
    chosen: Mapping[str, Criterion],
    own: Own,
    model: Model,
    datasets: Sequence[Dataset],
    bars: Bars | None,
) -> Callable[[Dataset], dict[str, Any]]:
    """What gives, by key, evidence from the rows of a dataset; shapes of batches are common to all."""
    from jaxcrit.data.batches import common_shapes
    from jaxcrit.evidence.backward import response_gradients
    from jaxcrit.evidence.forward import forward_pass
    from jaxcrit.evidence.perturbed import perturbed_pass
    from jaxcrit.evidence.routing import routed

    budget = model.budget(options.batch_size)

    def shapes(prompt_only: bool) -> Any:
        parts = [dataset.examples for dataset in datasets]
        return common_shapes(parts, budget, prompt_only=prompt_only, max_length=model.config.max_length)

    def take(dataset: Dataset) -> dict[str, Any]:
        given, count = (model, model.decoder(bars), dataset.examples, budget), len(dataset.examples)

        def prompts(run: Callable[..., Any], wanted: Mapping[str, Criterion], step: Any) -> Any:
            how = {"precision": options.precision, "progress": step, "shapes": shapes(True)}
            return run(*given, wanted, own=own, **how)

        def backward(wanted: Mapping[str, Criterion], step: Any) -> Any:
            each = any(one.per_sample for one in wanted.values())
            how = {"precision": options.precision, "progress": step, "shapes": shapes(False)}
            return response_gradients(*given, per_sample=each, **how)

        def routing(_: Mapping[str, Criterion], step: Any) -> Any:
            return routed(*given, precision=options.precision, progress=step, shapes=shapes(False))

        passes: dict[Needs, Callable[..., Any]] = {
            "forward": functools.partial(prompts, forward_pass),
            "perturbed": functools.partial(prompts, perturbed_pass),
            "backward": backward,
            "routing": routing,
        }
        found: dict[str, Any] = {}
        for needs, run in passes.items():
            found |= _pass(needs, chosen, bars, count, f"{dataset.name}, {needs}", run)
        return found

    return take


def _knee(which: str, layer: int | None, share: float | None) -> str:
    agreed = "too few prompts, or no such drop" if share is None else f"{share:.0%} of the resamples agree"
    return f"{which} knee {'not named' if layer is None else f'at layer {layer}'} ({agreed})"


def _pass(
    needs: Needs, chosen: Mapping[str, Criterion], bars: Bars | None, total: int, name: str, take: Callable[..., Any]
) -> dict[str, Any]:
    """By key of the criteria with these needs, what one pass finds for all of them; nothing where there are none."""
    from jaxcrit.core.progress import bar, moved

    wanted = {key: one for key, one in chosen.items() if one.needs == needs}
    if not wanted:
        return {}
    with bar(bars, total=total, desc=name) as shown:
        found = take(wanted, moved(shown))
    return found if needs in ("forward", "perturbed") else dict.fromkeys(wanted, found)


def _warnings(scores: Mapping[str, LayerScores]) -> list[str]:
    found = []
    for key, score in scores.items():
        invalid = np.flatnonzero(~score.valid)
        if len(invalid):
            found.append(f"{key}: has no finite value in layers {', '.join(map(str, invalid))}; they are left out")
        elif np.ptp(score.values) == 0:
            found.append(f"{key}: is the same in every layer, and chooses none")
    return found


def score_table(scores: Mapping[str, LayerScores]) -> str:
    """One row per layer, a column per score with what it is under the name; as many parts as the width takes.

    Under the name stands which values are critical; of several datasets what is shown is a rank, 0 the most critical.
    """
    layers = range(next(iter(scores.values())).num_layers)
    columns = {key: [f"({_kind(one)})", *(_value(one, layer) for layer in layers)] for key, one in scores.items()}
    first = ["layer", "", *map(str, layers)]
    return wide_table(first, columns, [""] * len(first), margin=5, least=9)


def _kind(score: LayerScores) -> str:
    return "mean rank" if score.meta.get("consensus") == "mean_rank" else score.direction


def _value(score: LayerScores, layer: int) -> str:
    value = score.values[layer]
    if not (score.valid[layer] and math.isfinite(value)):
        return "-"
    error = "" if score.stderr is None or not math.isfinite(score.stderr[layer]) else f" ± {score.stderr[layer]:.1g}"
    return f"{value:.4g}{error}"


def choice_table(found: Mapping[str, Choice], scores: Mapping[str, LayerScores]) -> str:
    """A row per criterion: which values are critical, the layers it would choose, and whether these are told apart."""
    sure = {True: ", further than two errors", False: ", within two errors", None: ""}
    rows = [
        [
            key,
            f"{_kind(scores[key])}, low" if _kind(scores[key]) == "mean rank" else scores[key].direction,
            ", ".join(map(str, one.layers)),
            "" if one.next is None else f"next: {one.next}{sure[one.firm]}",
        ]
        for key, one in found.items()
    ]
    return table(["criterion", "critical is", "would choose", ""], rows)


def headline(found: Mapping[str, Choice], num_layers: int, trim: int = 2) -> list[str]:
    """Where criteria agree, beside what chance would give, in a sentence or two."""
    if not found:
        return ["No criterion ranks the layers."]
    if len(found) == 1:
        ((key, one),) = found.items()
        return [f"{key} would choose layers {', '.join(map(str, one.layers))} of {num_layers}"]
    counts, share = agreed(found), len(next(iter(found.values())).layers) / max(1, num_layers - 2 * trim)
    chance = f"by chance a layer has {share * len(found):.1f}"
    if not counts:
        return [f"The {len(found)} criteria agree on no layer: each chooses others ({chance})."]
    most = max(counts.values())
    best = [layer for layer, count in counts.items() if count == most]
    rest = [f"{layer} by {count}" for layer, count in counts.items() if count < most][:4]
    named = f"layer{'s' if len(best) > 1 else ''} {', '.join(map(str, best[:6]))}{' ...' if len(best) > 6 else ''}"
    return [
        f"Of {len(found)} criteria {most} choose {named}{'; ' if rest else ''}{', '.join(rest)} ({chance})",
        "Criteria measure different things. Where they disagree, take the one that is made for what you want to do"
        " (docs/criteria.md), or let held-out rows decide between finetune --layers=KEY:K of two.",
    ]


def report(found: Scored) -> Report:
    """A column per score, a picture of all."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section

    scores = found.scores
    size = (6.2, 1.7 * -(-len(scores) // 2) + 0.6)
    figure = Figure("scores.png", lambda canvas: plots.score_grid(scores, canvas), "Every score over the layers.", size)
    chosen, several = choices(scores), len(found.datasets) > 1
    note = f"two layers at each end are never chosen; {len(next(iter(chosen.values())).layers)} each" if chosen else ""
    sections = [Section("What each criterion would choose", note, choice_table(chosen, scores))] if chosen else []
    note = "mean rank: over the datasets, 0 the most critical; low or high: which values are critical"
    sections.append(Section("Scores", note, score_table(scores), [figure]))
    for name, one in found.datasets.items() if several else ():
        title = f"{name}: values, with standard errors where they are known"
        sections.append(Section(title, "low or high: which values are critical", score_table(one), (), ""))
    key = "routing_sensitivity"
    loads = {name: np.array(one[key].meta["load"]) for name, one in found.datasets.items() if key in one}
    if loads:
        size, what = (
            (6.2, 1.2 + 3.2 * len(loads)),
            "Part of the tokens that go to each expert, by layer.",
        )
        drawn = Figure("load.png", lambda canvas: plots.load_heatmaps(loads, canvas), what, size)
        sections.append(
            Section(
                "Experts in use",
                "the three that most tokens go to, and their part of the tokens",
                load_table(loads),
                [drawn],
            )
        )
    told = beside(scores, found.datasets if several else None)
    first = headline(chosen, next(iter(scores.values())).num_layers)
    return Report([*first, *told], found.warnings, sections, CAVEATS)


def load_table(loads: Mapping[str, np.ndarray]) -> str:
    """By layer and dataset, the experts most in use; of several datasets also how far two are apart, from 0 to 1.

    Args:
        loads: by dataset, part of the tokens that go to each expert ``[L, E]``.
    """
    layers = range(len(next(iter(loads.values()))))

    def most(load: np.ndarray) -> str:
        return " ".join(f"{expert}:{load[expert]:.2f}" for expert in np.argsort(-load, kind="stable")[:3])

    columns = {name: ["", *(most(load[layer]) for layer in layers)] for name, load in loads.items()}
    if len(loads) > 1:
        pairs = list(itertools.combinations(loads.values(), 2))
        apart = [max(np.abs(one[layer] - other[layer]).sum() / 2 for one, other in pairs) for layer in layers]
        columns["apart"] = ["", *(f"{value / next(iter(loads.values()))[0].sum():.3f}" for value in apart)]
    first = ["layer", "", *map(str, layers)]
    return wide_table(first, columns, [""] * len(first), margin=5, least=9)


def beside(scores: Mapping[str, LayerScores], each: Mapping[str, Mapping[str, LayerScores]] | None = None) -> list[str]:
    """What a value has to be read against: ranks where datasets are joined, chance, the spread over starts.

    Also the knees of a curve, and what noise does; of several datasets those of ``each`` by its name.
    """
    from jaxcrit.selection.correlation import spearman

    told = []
    for name, of_dataset in (each or {"": scores}).items():
        for key, score in of_dataset.items():
            whose = f"{key} of {name}" if name else key
            if knees := score.meta.get("knees"):
                shares = score.meta["agreement"]
                named = [_knee(which, layer, shares[which]) for which, layer in knees.items()]
                told.append(f"{whose}: {', '.join(named)}")
            if gains := score.meta.get("noise_gain"):
                noise = np.array(gains, float)[score.valid]
                rho = spearman(score.values[score.valid], noise)
                told.append(
                    f"{whose}: noise of the same size ranks the layers with ρ {rho:.2f} to this, and its gains are"
                    f" {noise.min():.2f} to {noise.max():.2f}"
                )
    if ranked := [key for key, score in scores.items() if score.meta.get("consensus") == "mean_rank"]:
        what = "every value" if len(ranked) == len(scores) else ", ".join(ranked)
        told.append(
            f"{what}: mean rank over {scores[ranked[0]].meta['of']} datasets, 0 for the most critical layer; values and"
            " their errors are in scores.json of each dataset"
        )
    for key, score in scores.items():
        if chance := score.meta.get("chance"):
            spread = score.meta.get("spread")
            told.append(
                f"{key}: by chance {min(chance):.3g} to {max(chance):.3g} (labels permuted)"
                + (f"; the starts spread by up to {max(spread):.2g}" if spread else "; one start, so no spread")
            )
    return told
