"""What `jaxcrit score` shows: a column per criterion, a picture, one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import plots
from jaxcrit.reporting.report import Figure, Report, Section
from jaxcrit.reporting.tables import WIDTH, table

CAVEATS = (
    "Each criterion responds to one thing and is blind to others (docs/criteria.md); none of them is criticality.",
    "Many of them rise or fall with depth in any model: compare by jaxcrit correlate, and read what depth leaves.",
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
        lines.append(table(["layer", *part, ""], rows))
    return "\n\n".join(lines)


def _value(score: LayerScores, layer: int) -> str:
    value = score.values[layer]
    return f"{value:.4g}" if score.valid[layer] and math.isfinite(value) else "-"


def scores_report(scores: Mapping[str, LayerScores], warnings: Sequence[str]) -> Report:
    """A column per score, a picture of all."""
    size = (10.4, 2.4 * -(-len(scores) // 2) + 0.4)
    figure = Figure("scores.png", lambda canvas: plots.score_grid(scores, canvas), "Every score over the layers.", size)
    section = Section("Scores", "low or high: which values are critical", score_table(scores), [figure])
    return Report(["Layers by " + ", ".join(scores), *beside(scores)], warnings, [section], CAVEATS)


def beside(scores: Mapping[str, LayerScores]) -> list[str]:
    """What a value has to be read against: ranks where datasets are joined, chance, the spread over starts."""
    told = []
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
