"""What `jaxcrit spectrum` shows: tables for the terminal; the paper's figure and a page for the run directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxcrit.reporting import plots
from jaxcrit.reporting.report import Figure, Report, Section, on_axes
from jaxcrit.reporting.tables import WIDTH, aligned, number, table
from jaxcrit.selection.tracking import Tracking

if TYPE_CHECKING:
    from jaxcrit.studies.spectrum import SpectralAnalysis, SpectrumResult

CAVEATS = (
    "CCA of the first k principal components compares which directions two layers vary in, whatever their size; δ is"
    " of CKA, which weighs them by their variance.",
    "Which component is the k-th is settled only where its variance is apart from the next one's by more than other"
    " samples would change it (North et al. 1982); ~ marks where it is not.",
    "Neighbouring layers are alike, so that layers are fewer independent observations than they are layers: p is the"
    " share of all circular shifts of one curve against the other that correlate as much, never below one over the"
    " number of layers.",
    "Curves that both drift with depth correlate whatever else they measure: read ρ given depth beside ρ.",
    "Standard errors are of the samples (infinitesimal jackknife), not of another kind of prompt or another model.",
)


def headlines(analysis: SpectralAnalysis) -> list[str]:
    """Which number of components tracks δ best: a sentence per dataset."""
    lines = []
    for name, dataset in analysis.datasets.items():
        found = dataset.tracking
        where = f"{name}: " if len(analysis.datasets) > 1 else ""
        if found is None:
            lines.append(f"{where}Nothing to correlate: see the warning.")
            continue
        best = found.correlations[found.best]
        if best.rho <= 0:
            lines.append(f"{where}CCA of none of these numbers of components rises and falls with δ.")
            continue
        lines.append(
            f"{where}CCA of {_components(found.best)} tracks δ best: Spearman's ρ = {best.rho:+.2f} over"
            f" {best.num_layers} layers (circular-shift p = {found.p_best:.3f} for the best of"
            f" {len(found.correlations)}); given depth {_signed(best.partial)}."
        )
    return lines


def tracking_table(found: Tracking) -> str:
    """One row per number of components: how its curve goes along with δ."""
    rows = [
        [
            name.removeprefix("cca_"),
            _signed(one.rho),
            number(one.p_shift, 3),
            _signed(one.partial),
            number(one.p_partial, 3),
            _signed(one.depth[1]),
            "◀ best" if name == found.best else "",
        ]
        for name, one in found.correlations.items()
    ]
    header = ["k", f"ρ with {_shown(found.reference)}", "p (shifts)", "ρ given depth", "p (shifts)", "ρ with depth", ""]
    return table(header, rows)


def layer_table(dataset: SpectrumResult, ks: Sequence[int], reference: str) -> str:
    """One row per layer: δ, CCA with its neighbours by number of components, and how many directions carry it.

    Errors are left out, then the largest numbers of components, until the table fits.
    """
    for errors, count in [(True, len(ks)), *((False, count) for count in range(len(ks), 0, -1))]:
        lines = _layer_lines(dataset, ks[:count], reference, errors)
        if max(map(len, lines)) <= WIDTH:
            break
    if count < len(ks):
        lines.append(f"(k = {', '.join(map(str, ks[count:]))} are in scores.json)")
    return "\n".join(lines)


def _layer_lines(dataset: SpectrumResult, ks: Sequence[int], reference: str, errors: bool) -> list[str]:
    spectrum, curves = dataset.spectrum, [dataset.scores[f"cca_{k}"] for k in ks]
    delta = dataset.scores[reference]
    explained = spectrum.explained_variance[:, : ks[-1]].sum(axis=1)
    header = ["layer", _shown(reference), *(f"CCA top {k}" for k in ks), f"var {ks[-1]}", "PR", "eff. rank", ""]
    rows = []
    for layer in range(delta.num_layers):
        cells = []
        for k, curve in zip(ks, curves, strict=True):
            cell = number(curve.values[layer])
            if errors and curve.stderr is not None and curve.valid[layer]:
                cell += f" ±{number(curve.stderr[layer])}"
            cells.append(cell + ("~" if spectrum.gaps[layer, k - 1] < spectrum.sampling_gap else " "))
        facts = [explained[layer], spectrum.participation_ratio[layer], spectrum.effective_rank[layer]]
        rows.append(
            [
                str(layer),
                number(delta.values[layer]),
                *cells,
                number(facts[0], 2),
                number(facts[1], 1),
                number(facts[2], 1),
                "",
            ]
        )
    return aligned(header, rows)


def warnings(analysis: SpectralAnalysis) -> list[str]:
    """Every dataset's warnings, with its name in front where there are several."""
    several = len(analysis.datasets) > 1
    return [
        f"{name}: {line}" if several else line
        for name, dataset in analysis.datasets.items()
        for line in dataset.warnings
    ]


def spectrum_report(analysis: SpectralAnalysis) -> Report:
    """Every dataset's layers, and which number of components tracks δ; of several the terminal shows the latter."""
    sections, several = [], len(analysis.datasets) > 1
    for name, dataset in analysis.datasets.items():
        draw = on_axes(
            plots.component_curves,
            dataset.scores[_reference(analysis)],
            {f"top {k}": dataset.scores[f"cca_{k}"] for k in analysis.ks},
            title=f"{name}, {dataset.num_samples} samples",
        )
        caption = "Bars: δ. Lines: mean CCA of the first k principal components of a layer and of its neighbours."
        figure = Figure(f"{name}/spectrum.png" if several else "spectrum.png", draw, caption)
        layers = layer_table(dataset, analysis.ks, _reference(analysis))
        found = "" if dataset.tracking is None else tracking_table(dataset.tracking)
        title = f"{name}: {dataset.num_samples} samples"
        page = "\n\n".join(filter(None, [layers, found]))
        sections.append(Section(title, "", page, [figure], brief=f"{name}:\n{found}" if several else page))
    return Report(headlines(analysis), warnings(analysis), sections, CAVEATS)


def _reference(analysis: SpectralAnalysis) -> str:
    return "delta" if analysis.run["config"]["bias"] == "biased" else "delta_debiased"


def _shown(key: str) -> str:
    return {"delta": "δ biased", "delta_debiased": "δ debiased"}[key]


def _components(key: str) -> str:
    k = int(key.removeprefix("cca_"))
    return f"the first {k} components" if k > 1 else "the first component"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"
