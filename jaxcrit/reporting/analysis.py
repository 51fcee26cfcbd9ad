"""What `jaxcrit analyze` shows: text for the terminal; figures, page and configs for the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import exporters, plots, tables, views
from jaxcrit.reporting.measures import measures_table
from jaxcrit.reporting.report import Figure, Report, Section, on_axes

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
    return [Figure(f"{folder}sample_size.png", draw, _SIZES, (8.4, 3.6))]


def heatmap(
    cka: Mapping[str, np.ndarray], caption: str, folder: str = "", labels: tuple[str, str] = ("layer ℓ", "layer ℓ")
) -> Figure:
    """CKA of every pair of layers, biased and debiased side by side."""

    def draw(canvas: Canvas) -> None:
        plots.cka_heatmap(cka["biased"], cka["debiased"], canvas, labels=labels)

    return Figure(f"{folder}cka.png", draw, caption, (10.4, 5.0), "compressed")


def _consensus(analysis: Analysis) -> LayerScores | None:
    return analysis.consensus if len(analysis.datasets) > 1 else None


def headlines(analysis: Analysis) -> list[str]:
    """Which layers, and how sure, a sentence each; of several datasets also how far they agree."""
    chosen, datasets = analysis.chosen, analysis.datasets
    scores = analysis.consensus or _chosen_by(next(iter(datasets.values())))
    candidates = views.num_candidates(scores, analysis.run["config"])
    sure = tables.certainty(chosen, analysis.certainty, candidates)
    alone = {name: dataset.chosen for name, dataset in datasets.items()}
    agreement = [tables.agreement(chosen, alone)] if len(datasets) > 1 else []
    return [tables.headline(chosen, len(datasets)), *sure, *agreement]


def _dataset_table(analysis: Analysis, dataset: DatasetResult, style: bool = False) -> str:
    config = analysis.run["config"]
    return tables.layer_table(
        dataset.scores,
        dataset.chosen,
        null=views.null_delta(dataset, config),
        probability=_probability(dataset),
        paper=views.paper_choice(dataset, config),
        step_score=views.step_score(dataset),
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
        figures = [Figure("consensus.png", draw, caption, (8.4, 6.0)), *_sizes(analysis)]
        title = f"Consensus of {len(deltas)} datasets"
        sections.append(Section(title, "", lambda style: _consensus_table(analysis, consensus, style), figures))
    for name, dataset in analysis.datasets.items():
        sections += _dataset_sections(analysis, name, dataset, alone=consensus is None)
    model_type = views.model_type(analysis)
    configs = {
        name: exporters.export_selection(analysis.chosen, fmt, model_type)
        for fmt, name in exporters.CONFIG_FILES.items()
    }
    return Report(headlines(analysis), warnings(analysis), sections, CAVEATS, forms(analysis), configs)


def _dataset_sections(analysis: Analysis, name: str, dataset: DatasetResult, *, alone: bool) -> list[Section]:
    config, folder = analysis.run["config"], "" if alone else f"{name}/"
    curve = on_axes(
        plots.delta_curve,
        dataset.scores,
        dataset.chosen,
        window=config["window"],
        null=views.null_delta(dataset, config),
        title=f"{name}, {dataset.num_samples} samples",
    )
    caption = "δ of each layer; low where the representation changes. Shaded: chosen."
    figures = [
        Figure(f"{folder}delta.png", curve, caption),
        heatmap(dataset.cka, "CKA of every pair of layers; a bright block is a run of alike layers.", folder),
        *_sizes(dataset, folder),
    ]
    candidates = views.num_candidates(_chosen_by(dataset), config)
    sure = " ".join(tables.certainty(dataset.chosen, dataset.certainty, candidates))
    note = "" if alone else f"{tables.headline(dataset.chosen)}. {sure}"

    def table(style: bool) -> str:
        return _dataset_table(analysis, dataset, style)

    brief = None if alone else ""
    sections = [Section(f"{name}: {dataset.num_samples} samples", note, table, figures, brief)]
    if others := measures_table(dataset.scores):
        shown = f"δ by other measures:\n{others}" if alone else ""
        sections.append(Section(f"{name}: δ by other measures", "", others, brief=shown))
    return sections


def write_selections(analysis: Analysis, out: Path) -> None:
    """Writes ``layers.json`` and ``configs/`` of the choice, and of each dataset's own where there are several."""
    model_type = views.model_type(analysis)
    if _consensus(analysis) is not None:
        for name, dataset in analysis.datasets.items():
            exporters.layer_files(out / name, dataset.chosen, model_type)
    exporters.layer_files(out, analysis.chosen, model_type)
