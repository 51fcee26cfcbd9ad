"""What `jaxcrit correlate` shows: the statistics of a pair or the matrix of a folder, two pictures, one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcrit.reporting import plots
from jaxcrit.reporting.report import Figure, Report, Section, on_axes
from jaxcrit.reporting.tables import WIDTH, aligned
from jaxcrit.selection.correlation import Correlation

if TYPE_CHECKING:
    from jaxcrit.studies.correlation import Correlated

CAVEATS = (
    "Neighbouring layers are alike, so that layers are fewer independent observations than they are layers: read the"
    " circular-shift p, not the naive one.",
    "Scores that both drift with depth correlate whatever else they measure: read the correlation given depth.",
    "The interval says how the correlation would change with other prompts of the same kind, not with other layers or"
    " another model.",
)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def pair_table(pair: Correlation, names: Sequence[str]) -> str:
    """One row per statistic: its value, its p, and what the p takes for granted."""
    interval = "not available" if pair.interval is None else " to ".join(_number(end) for end in pair.interval)
    rows = [
        ["Spearman ρ", _number(pair.rho), _p(pair.p_naive), "naive: as if layers were independent"],
        ["", "", _p(pair.p_shift), f"all circular shifts; never below 1/{pair.num_layers}"],
        ["", "", _p(pair.p_block), f"permuted blocks of {pair.block} layers"],
        ["Kendall τ", _number(pair.tau), "", ""],
        ["ρ given depth", _number(pair.partial), _p(pair.p_partial), "circular shifts of what depth leaves"],
        *(
            [f"ρ of {'AB'[index]} with depth", _number(value), "", names[index]]
            for index, value in enumerate(pair.depth)
        ),
        ["smallest ρ", _number(pair.smallest), "0.05", f"significant of {pair.num_layers} independent layers"],
    ]
    table = aligned(["", "value", "p", ""], rows, [False] * len(rows))
    return "\n".join([*table, f"95 % interval of ρ over the samples: {interval}"])


def matrix_table(names: Sequence[str], matrix: np.ndarray) -> str:
    """Spearman's ρ of every two scores; columns by number, in as many parts as the width takes."""
    longest = min(40, max(map(len, names)))
    short = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    fit = max(1, (WIDTH - longest - 4) // 7)
    parts = []
    for start in range(0, len(names), fit):
        columns = range(start, min(start + fit, len(names)))
        header = ["", *(str(column + 1) for column in columns), ""]
        rows = [
            [str(row + 1), *(_number(matrix[row, column], 2) for column in columns), name]
            for row, name in enumerate(short)
        ]
        parts.append("\n".join(aligned(header, rows, [False] * len(rows))))
    return "\n\n".join(parts)


def headline(correlated: Correlated) -> str:
    """What was compared over which layers."""
    if correlated.pair is None:
        return "Spearman's ρ of every two scores; scores whose high values are critical are turned round."
    pair, (a, b) = correlated.pair, correlated.names
    layers = f"{pair.num_layers} layers ({pair.first} to {pair.last} of {correlated.scores[0].num_layers})"
    return f"A {a} against B {b}, {layers}"


def _table(correlated: Correlated) -> str:
    if correlated.pair is None:
        return matrix_table(correlated.names, correlated.spearman)
    return pair_table(correlated.pair, correlated.names)


def correlation_report(correlated: Correlated) -> Report:
    """The statistics of a pair, or the matrix of a folder."""
    figures = []
    if correlated.pair is not None:
        (a, b), names = correlated.scores, correlated.names
        both, each = on_axes(plots.twin_curves, a, b, names), on_axes(plots.score_scatter, a, b, names)
        figures = [
            Figure("layers.png", both, "Both scores over the layers, each on its own axis."),
            Figure("scatter.png", each, "Each layer by both scores; darker is deeper.", (5.6, 5.0)),
        ]
    section = Section("Correlation", "", _table(correlated), figures)
    return Report([headline(correlated)], correlated.warnings, [section], CAVEATS)
