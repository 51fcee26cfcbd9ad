"""What `jaxcrit compare` shows: text for the terminal; figures and page for the run directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcrit.reporting import plots, tables
from jaxcrit.reporting.analysis import CAVEATS, heatmap
from jaxcrit.reporting.report import Figure, Report, Section, on_axes

if TYPE_CHECKING:
    from jaxcrit.studies.comparison import Comparison

# A layer that no step of training has touched has a CKA of 1 with itself, but for rounding.
_SAME = 1 - 1e-6


def partners(comparison: Comparison) -> np.ndarray:
    """``[L]`` which layer of b each layer of a stands beside: the same one, or the most alike where depths differ."""
    debiased = comparison.cka["debiased"]
    return np.arange(len(debiased)) if comparison.score is not None else debiased.argmax(axis=1)


def comparison_table(comparison: Comparison) -> str:
    """One row per layer of a."""
    cka, beside = comparison.cka, partners(comparison)
    # A tuned model may differ from its base in the fifth digit only.
    digits = 6 if cka["debiased"][np.arange(len(beside)), beside].min() > 0.99 else 4
    header = ["a", "b", "CKA debiased ± s.e.", "biased", "null", "z", "most alike in b"]
    rows = []
    for layer, other in enumerate(beside):
        values = {key: float(matrix[layer, other]) for key, matrix in cka.items()}
        error = f" ± {values['stderr']:.{digits}f}" if "stderr" in values else ""
        score = ""
        if "null_stddev" in values:
            score = f"{(values['biased'] - values['null_mean']) / values['null_stddev']:.1f}"
        best = int(cka["debiased"][layer].argmax())
        rows.append(
            [
                str(layer),
                str(other),
                f"{values['debiased']:.{digits}f}{error}",
                f"{values['biased']:.{digits}f}",
                f"{values['null_mean']:.4f}",
                score,
                str(best) + (f" ({cka['debiased'][layer, best]:.4f})" if best != other else ""),
            ]
        )
    return "\n".join(tables.aligned(header, rows, [False] * len(rows)))


def headlines(comparison: Comparison) -> list[str]:
    """Which layers differ most, and how sure, a sentence each."""
    score, prompts = comparison.score, comparison.num_prompts
    if score is None:
        depth, other = comparison.cka["debiased"].shape
        return [f"Models of {depth} and {other} layers on {prompts} prompts; each layer beside the most alike."]
    lowest = int(score.values.argmin())
    if score.values[lowest] > _SAME:
        return [f"No layer differs: all {score.num_layers} have CKA 1 with themselves on {prompts} prompts."]
    same = int((score.values > _SAME).sum())
    error = "" if score.stderr is None else f" ± {score.stderr[lowest]:.2g}"
    first = f"Changed most: layer {lowest} of {score.num_layers} (1 - CKA {1 - score.values[lowest]:.3g}{error})"
    if same:
        first += f"; {same} layers are unchanged"
    sure = comparison.changed_most
    if sure is None:
        return [first]
    if len(sure) == 1:
        return [first, f"How sure: with {prompts} prompts it is this layer at 95% confidence."]
    among = ", ".join(map(str, sure))
    return [first, f"How sure: with {prompts} prompts the layer changed most is one of {among} at 95% confidence."]


def comparison_report(comparison: Comparison) -> Report:
    """CKA of each layer with its partner, and of every layer with every other."""
    cka, beside = comparison.cka, partners(comparison)
    places = np.arange(len(beside)), beside
    curve = on_axes(
        plots.cross_curve,
        cka["debiased"][places],
        biased=cka["biased"][places],
        null=cka["null_mean"][places],
        stderr=cka["stderr"][places] if "stderr" in cka else None,
        title=f"{comparison.num_prompts} prompts",
    )
    partner = "the most alike layer" if comparison.score is None else "the same layer"
    figures = [
        Figure("cross_cka.png", curve, f"CKA of each layer of a with {partner} of b; low where they differ."),
        heatmap(cka, "CKA of every layer of a with every layer of b.", labels=("layer of a", "layer of b")),
    ]
    section = Section("Layer by layer", "", comparison_table(comparison), figures)
    return Report(headlines(comparison), comparison.warnings, [section], CAVEATS[:3])
