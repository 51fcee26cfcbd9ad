"""What `jaxcrit score` shows: a column per criterion, a picture, one page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcrit.core.files import write_bytes, write_text
from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import plots
from jaxcrit.reporting.report import Figure, Section, render_report
from jaxcrit.reporting.tables import WIDTH, aligned

CAVEATS = (
    "Each criterion responds to one thing and is blind to others (docs/criteria.md); none of them is criticality.",
    "Many of them rise or fall with depth in any model: compare by jaxcrit correlate, and read what depth leaves.",
    "Values of several datasets are joined as mean ranks, 0 for the most critical layer.",
)


def score_table(scores: Mapping[str, LayerScores]) -> str:
    """One row per layer, a column per score with its direction under the name; as many parts as the width takes."""
    columns = {key: max(len(key), 9) + 2 for key in scores}
    parts: list[list[str]] = [[]]
    for key, width in columns.items():
        if parts[-1] and 5 + sum(columns[other] for other in parts[-1]) + width > WIDTH:
            parts.append([])
        parts[-1].append(key)
    lines = []
    for part in parts:
        layers = range(next(iter(scores.values())).num_layers)
        rows = [["", *(f"({scores[key].direction})" for key in part), ""]]
        rows += [[str(layer), *(_value(scores[key], layer) for key in part), ""] for layer in layers]
        lines.append("\n".join(aligned(["layer", *part, ""], rows, [False] * len(rows))))
    return "\n\n".join(lines)


def _value(score: LayerScores, layer: int) -> str:
    value = score.values[layer]
    return f"{value:.4g}" if score.valid[layer] and math.isfinite(value) else "-"


def scores_text(scores: Mapping[str, LayerScores], warnings: Sequence[str]) -> str:
    """The result for a terminal."""
    lines = [textwrap.fill(f"warning: {line}", WIDTH, subsequent_indent="  ") for line in warnings]
    return "\n".join([score_table(scores), *lines])


def write_scores_page(
    scores: Mapping[str, LayerScores], warnings: Sequence[str], run: Mapping[str, Any], out: Path
) -> Path:
    """Writes ``scores.png`` and ``report.html``; returns the latter."""
    figure = Figure("scores.png", plots.score_grid(scores), "Every score over the layers.")
    write_bytes(out / figure.name, figure.png)
    section = Section("Scores", "low or high: which values are critical", score_table(scores), [figure])
    page = render_report(["Layers by " + ", ".join(scores)], warnings, [section], {}, run, caveats=CAVEATS)
    write_text(out / "report.html", page)
    return out / "report.html"
