"""What `jaxcrit analyze` shows: text for the terminal; figures, page and configs for the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import delta
from jaxcrit.reporting import exporters, plots, tables
from jaxcrit.reporting.report import Figure, Report, Section, on_axes
from jaxcrit.selection.cautions import flat_curve
from jaxcrit.selection.correlation import spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from jaxcrit.studies.analysis import Analysis, DatasetResult

CAVEATS = (
    "A layer here is a 0-based decoder block; its state is what leaves the block, before the final norm.",
    "Biased CKA is high for any two layers when there are fewer samples than dimensions: compare it with the null, or"
    " read the debiased values, which are near 0 for unrelated layers.",
    "Standard errors and P(chosen) say how much the result would change with other prompts of the same kind, not with"
    " another kind of prompt, another template or another model.",
    "A low δ says that the representation changes at a layer. That training these layers pays more is the paper's"
    " observation on its models and data; a run on your own data is the test.",
)
_PLAIN = 0.001  # p of chance below which it is out of the question
_SIZES = (
    "How often so many prompts of this kind would make the same choice, predicted from how much each prompt moves the"
    " scores; beyond the prompts given an extrapolation."
)


def _chosen_by(dataset: DatasetResult) -> LayerScores:
    """The score that chose; debiased δ where no score did (``--layers=3-5``)."""
    return dataset.scores.get(dataset.chosen.criterion, dataset.scores["delta_debiased"])


def _probability(view: DatasetResult | Analysis) -> np.ndarray | None:
    return None if view.certainty is None else view.certainty.probability


def _sizes(view: DatasetResult | Analysis, folder: str = "") -> list[Figure]:
    """The sample-size curve; none where it was not estimated."""
    if view.certainty is None:
        return []
    draw = on_axes(plots.sample_size_curve, view.certainty.sample_sizes, view.certainty.num_prompts)
    return [Figure(f"{folder}sample_size.png", draw, _SIZES, (6.2, 3.6))]


def heatmap(
    cka: Mapping[str, np.ndarray], caption: str, folder: str = "", labels: tuple[str, str] = ("layer ℓ", "layer ℓ")
) -> Figure:
    """CKA of every pair of layers, biased above debiased."""

    def draw(canvas: Canvas) -> None:
        plots.cka_heatmap(cka["biased"], cka["debiased"], canvas, labels=labels)

    return Figure(f"{folder}cka.png", draw, caption, (5.0, 8.6))


def _consensus(analysis: Analysis) -> LayerScores | None:
    return analysis.consensus if len(analysis.datasets) > 1 else None


def null_delta(cka: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> np.ndarray:
    """δ that unrelated layers would score, ``[L]``: the window mean of the null, a layer with itself still being 1."""
    return _window_mean(cka["null_mean"], 1.0, config)


def null_delta_stddev(cka: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> np.ndarray:
    """Upper bound of the standard deviation of `null_delta`, ``[L]``: as if all pairs of a window moved as one."""
    return _window_mean(cka["null_stddev"], 0.0, config)


def _window_mean(matrix: np.ndarray, itself: float, config: Mapping[str, Any]) -> np.ndarray:
    filled = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(filled, itself)
    values, valid = delta(filled, window=config["window"], include_self=config["include_self"])
    return np.where(valid, values, np.nan)


def step_score(dataset: DatasetResult) -> np.ndarray | None:
    """How far ``step`` is above chance, in standard deviations of the null, ``[L]``.

    None where chance is out of the question at every layer (p < 0.001), as it mostly is within one model.
    """
    if "null_p" not in dataset.cka or np.diagonal(dataset.cka["null_p"], offset=1).max() < _PLAIN:
        return None
    matrices = (dataset.cka[key] for key in ("biased", "null_mean", "null_stddev"))
    values, mean, stddev = (np.diagonal(matrix, offset=1) for matrix in matrices)
    return np.concatenate([[np.nan], (values - mean) / stddev])


def paper_choice(dataset: DatasetResult, config: Mapping[str, Any]) -> LayerSet | None:
    """As many layers as were chosen, by the paper's biased δ; None where the choice was not of critical layers."""
    if not dataset.chosen.rule.startswith("critical:"):
        return None
    spec = LayerSpec("critical", count=len(dataset.chosen.layers))
    return resolve(spec, dataset.chosen.num_layers, scores=dataset.scores["delta"], trim=config["trim"])


def num_candidates(scores: LayerScores, config: Mapping[str, Any]) -> int:
    """How many layers a selection by these scores could have chosen."""
    return int(scores.valid[config["trim"] : scores.num_layers - config["trim"]].sum())


def model_type(analysis: Analysis) -> str | None:
    """The ``model_type`` of config.json as noted in the scores' meta, or None."""
    return next(iter(analysis.datasets.values())).scores["delta"].meta.get("model_type")


def headlines(analysis: Analysis) -> list[str]:
    """Which layers, and how sure, a sentence each; of several datasets also how far they agree."""
    chosen, datasets = analysis.chosen, analysis.datasets
    scores = analysis.consensus or _chosen_by(next(iter(datasets.values())))
    candidates = num_candidates(scores, analysis.run["config"])
    sure = tables.certainty(chosen, analysis.certainty, candidates, len(datasets))
    alone = {name: dataset.chosen for name, dataset in datasets.items()}
    agreement = [tables.agreement(chosen, alone)] if len(datasets) > 1 else []
    flat = all(flat_curve(dataset.scores["delta_debiased"]) for dataset in datasets.values())
    return [tables.headline(chosen, len(datasets), flat=flat), *sure, *agreement]


def _dataset_table(analysis: Analysis, dataset: DatasetResult, style: bool = False) -> str:
    config = analysis.run["config"]
    return tables.layer_table(
        dataset.scores,
        dataset.chosen,
        null=null_delta(dataset.cka, config),
        probability=_probability(dataset),
        paper=paper_choice(dataset, config),
        step_score=step_score(dataset),
        style=style,
    )


def _consensus_table(analysis: Analysis, consensus: LayerScores, style: bool = False) -> str:
    deltas = {name: _chosen_by(dataset) for name, dataset in analysis.datasets.items()}
    return tables.consensus_table(deltas, consensus, analysis.chosen, probability=_probability(analysis), style=style)


def warnings(analysis: Analysis) -> list[str]:
    """Every dataset's warnings; one that several datasets share stands once, with their names in front."""
    names: dict[str, list[str]] = {}
    for name, dataset in analysis.datasets.items():
        for line in dataset.warnings:
            names.setdefault(line, []).append(name)
    everywhere = len(analysis.datasets)
    return [line if len(of) == everywhere else f"{', '.join(of)}: {line}" for line, of in names.items()]


def forms(analysis: Analysis) -> list[str]:
    """How CKA was computed, a line for each form."""
    chosen = analysis.run.get("forms", {})
    return [f"Sweep: {text}." for text in dict.fromkeys(form["text"] for form in chosen.values())]


def analysis_report(analysis: Analysis) -> Report:
    """The chosen layers, how sure that is, and every dataset's layers; of several the terminal shows the consensus."""
    consensus, sections = _consensus(analysis), []
    if consensus is not None:
        deltas = {name: _chosen_by(dataset) for name, dataset in analysis.datasets.items()}

        def draw(canvas: Canvas) -> None:
            plots.consensus_figure(deltas, consensus, analysis.chosen, canvas)

        caption = "δ of each dataset, and the mean rank over them that chose."
        figures = [Figure("consensus.png", draw, caption, (6.2, 5.6)), *_sizes(analysis)]
        title = f"Consensus of {len(deltas)} datasets"
        sections.append(Section(title, "", lambda style: _consensus_table(analysis, consensus, style), figures))
    limits = plots.delta_limits([dataset.scores for dataset in analysis.datasets.values()])
    for name, dataset in analysis.datasets.items():
        sections += _dataset_sections(analysis, name, dataset, alone=consensus is None, limits=limits)
    kind = model_type(analysis)
    configs = {
        name: exporters.export_selection(analysis.chosen, fmt, kind) for fmt, name in exporters.CONFIG_FILES.items()
    }
    return Report(headlines(analysis), warnings(analysis), sections, CAVEATS, forms(analysis), configs)


def _dataset_sections(
    analysis: Analysis, name: str, dataset: DatasetResult, *, alone: bool, limits: tuple[float, float]
) -> list[Section]:
    config, folder = analysis.run["config"], "" if alone else f"{name}/"

    def curve(canvas: Canvas) -> None:
        null, title = null_delta(dataset.cka, config), f"{name}, {dataset.num_samples} samples"
        how: dict[str, Any] = {"window": config["window"], "title": title, "limits": limits}
        plots.delta_panels(dataset.scores, dataset.chosen, null, canvas, **how)

    caption = "δ of each layer; low where the representation changes. Shaded: chosen. Below: unrelated layers."
    figures = [
        Figure(f"{folder}delta.png", curve, caption, (6.2, 5.4)),
        heatmap(dataset.cka, "CKA of every pair of layers; a bright block is a run of alike layers.", folder),
        *_sizes(dataset, folder),
    ]
    candidates = num_candidates(_chosen_by(dataset), config)
    sure = " ".join(tables.certainty(dataset.chosen, dataset.certainty, candidates))
    flat = flat_curve(dataset.scores["delta_debiased"])
    note = "" if alone else f"{tables.headline(dataset.chosen, flat=flat)}. {sure}"

    def table(style: bool) -> str:
        return _dataset_table(analysis, dataset, style)

    brief = None if alone else ""
    sections = [Section(f"{name}: {dataset.num_samples} samples", note, table, figures, brief)]
    if others := measures_table(dataset.scores):
        shown = f"δ by other measures:\n{others}" if alone else ""
        sections.append(Section(f"{name}: δ by other measures", "", others, brief=shown))
    return sections


def write_configs(analysis: Analysis, out: Path) -> None:
    """Writes ``configs/`` of the choice, and of each dataset's own where there are several."""
    kind = model_type(analysis)
    if _consensus(analysis) is not None:
        for name, dataset in analysis.datasets.items():
            exporters.config_files(out / name, dataset.chosen, kind)
    exporters.config_files(out, analysis.chosen, kind)


def measures_table(scores: Mapping[str, LayerScores]) -> str:
    """One row per layer, one column per measure of ``--measures``; below, how each ranks the layers beside δ.

    Args:
        scores: ``delta_debiased``, and ``delta_NAME`` with ``measure`` in its meta.

    Returns:
        The table, empty where there are no such scores.
    """
    others = {score.meta["measure"]: score for score in scores.values() if "measure" in score.meta}
    if not others:
        return ""
    columns = {"δ debiased": scores["delta_debiased"], **others}
    rows = [
        [str(layer), *(tables.number(score.values[layer]) for score in columns.values()), ""]
        for layer in range(scores["delta_debiased"].num_layers)
    ]
    rhos = [spearman(scores["delta_debiased"].values, score.values) for score in columns.values()]
    rows.append(["ρ", *(tables.number(rho, 2) for rho in rhos), "Spearman's with δ debiased"])
    return tables.table(["layer", *columns, ""], rows)
