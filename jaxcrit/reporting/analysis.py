"""What `jaxcrit analyze` shows: text for the terminal; figures, page and configs for the run directory."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcrit.core.files import write_bytes, write_text
from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import exporters, plots, tables, views
from jaxcrit.reporting.measures import measures_table
from jaxcrit.reporting.report import Figure, Section, render_report

if TYPE_CHECKING:
    from jaxcrit.studies.analysis import Analysis, DatasetResult

_SIZES = (
    "How often so many prompts of this kind would make the same choice, predicted from how much each prompt moves the"
    " scores; beyond the prompts given an extrapolation."
)


def _chosen_by(dataset: DatasetResult) -> LayerScores:
    """The score that chose; debiased δ where no score did (``--layers=3-5``)."""
    return dataset.scores.get(dataset.chosen.criterion, dataset.scores["delta_debiased"])


def _probability(view: DatasetResult | Analysis) -> np.ndarray | None:
    return None if view.certainty is None else view.certainty.probability


def _sizes(view: DatasetResult | Analysis, directory: Path) -> list[Figure]:
    """The sample-size curve as a figure, already written; none where it was not estimated."""
    if view.certainty is None:
        return []
    picture = plots.sample_size_curve(view.certainty.sample_sizes, view.certainty.num_prompts)
    write_bytes(directory / "sample_size.png", picture)
    return [Figure("sample_size.png", picture, _SIZES)]


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


def analysis_text(analysis: Analysis, *, style: bool = False) -> str:
    """The result for a terminal: table, headline, how sure, warnings.

    Args:
        analysis: the result.
        style: bold marks, for a terminal.
    """
    consensus = _consensus(analysis)
    if consensus is not None:
        table = _consensus_table(analysis, consensus, style)
    else:
        dataset = next(iter(analysis.datasets.values()))
        others = measures_table(dataset.scores)
        table = _dataset_table(analysis, dataset, style) + (f"\n\nδ by other measures:\n{others}" if others else "")
    sentences = [*headlines(analysis), *forms(analysis), *(f"warning: {line}" for line in warnings(analysis))]
    return "\n".join([table, "", *(textwrap.fill(line, tables.WIDTH, subsequent_indent="  ") for line in sentences)])


def write_analysis(analysis: Analysis) -> Path:
    """Writes figures, ``report.html``, ``layers.json`` and ``configs/`` into the run directory; returns the report.

    Several datasets have their own figures and ``layers.json`` in a directory each.
    """
    config, out, model_type = analysis.run["config"], analysis.out, views.model_type(analysis)
    consensus, sections = _consensus(analysis), []
    if consensus is not None:
        deltas = {name: _chosen_by(dataset) for name, dataset in analysis.datasets.items()}
        picture = plots.consensus_figure(deltas, consensus, analysis.chosen)
        write_bytes(out / "consensus.png", picture)
        figure = Figure("consensus.png", picture, "δ of each dataset, and the mean rank over them that chose.")
        table = _consensus_table(analysis, consensus)
        figures = [figure, *_sizes(analysis, out)]
        sections.append(Section(f"Consensus of {len(deltas)} datasets", "", table, figures))
    for name, dataset in analysis.datasets.items():
        directory = out if consensus is None else out / name
        null = views.null_delta(dataset, config)
        curve = plots.delta_curve(
            dataset.scores,
            dataset.chosen,
            window=config["window"],
            null=null,
            title=f"{name}, {dataset.num_samples} samples",
        )
        heatmap = plots.cka_heatmap(dataset.cka["biased"], dataset.cka["debiased"])
        figures = [
            Figure("delta.png", curve, "δ of each layer; low where the representation changes. Shaded: chosen."),
            Figure("cka.png", heatmap, "CKA of every pair of layers; a bright block is a run of alike layers."),
        ]
        for figure in figures:
            write_bytes(directory / figure.name, figure.png)
        figures += _sizes(dataset, directory)
        if consensus is not None:
            exporters.layer_files(directory, dataset.chosen, model_type)
        candidates = views.num_candidates(_chosen_by(dataset), config)
        sure = " ".join(tables.certainty(dataset.chosen, dataset.certainty, candidates))
        title = f"{name}: {dataset.num_samples} samples"
        note = f"{tables.headline(dataset.chosen)}. {sure}" if consensus is not None else ""
        sections.append(Section(title, note, _dataset_table(analysis, dataset), figures))
        if others := measures_table(dataset.scores):
            sections.append(Section(f"{name}: δ by other measures", "", others, []))
    exporters.layer_files(out, analysis.chosen, model_type)
    configs = {
        name: exporters.export_selection(analysis.chosen, fmt, model_type)
        for fmt, name in exporters.CONFIG_FILES.items()
    }
    page = render_report(headlines(analysis), warnings(analysis), sections, configs, analysis.run)
    write_text(out / "report.html", page)
    return out / "report.html"
