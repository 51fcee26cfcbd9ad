"""What ``jaxcrit ablate`` shows: losses and right answers without each layer; for terminal and run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import plots, tables
from jaxcrit.reporting.report import Figure, Report, Section, on_axes, rows_title

CAVEATS = (
    "A layer is a 0-based decoder block. Skipped, it adds nothing to the residual stream; with its mean, it adds the"
    " same to every token.",
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows.",
    "Standard errors are of the difference from the intact model, over rows.",
    "What a layer is needed for and what training it would bring are different questions.",
)


def ablation_report(run: Mapping[str, Any], scores: Mapping[str, LayerScores]) -> Report:
    """Losses and right answers without each layer."""
    figures = []
    title = rows_title(run)
    for key, score in _shown(scores).items():
        axis = "share of right answers" if "accuracy" in key else "loss (nats, mean of sample means)"
        lines = {"intact model": score.meta["unchanged"]}
        draw = on_axes(plots.layer_losses, score, lines, label=key, title=title, axis=axis)
        figures.append(Figure(f"{key}.png", draw, f"{key} of each layer."))
    section = Section("Without each layer", "", lambda style: _table(scores, style), figures)
    return Report(_sentences(run, scores), sections=[section], caveats=CAVEATS)


def _shown(scores: Mapping[str, LayerScores]) -> dict[str, LayerScores]:
    return {key: score for key, score in scores.items() if not key.endswith("_per_token")}


def _table(scores: Mapping[str, LayerScores], style: bool = False) -> str:
    shown = _shown(scores)
    worst = {key: int(score.ranking()[0]) for key, score in shown.items()}
    header = ["layer", *(f"{key.removeprefix('ablation_')} ± s.e." for key in shown), ""]
    rows = []
    for layer in range(next(iter(shown.values())).num_layers):
        cells = [
            f"{score.values[layer]:.4f}" + ("" if score.stderr is None else f" ± {score.stderr[layer]:.4f}")
            for score in shown.values()
        ]
        marks = [key.removeprefix("ablation_") for key, place in worst.items() if place == layer]
        rows.append([str(layer), *cells, f"◀ most needed: {', '.join(marks)}" if marks else ""])
    return "\n".join(tables.aligned(header, rows, [style and layer in worst.values() for layer in range(len(rows))]))


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
        f"cost: {counts['sweep']} block evaluations a batch, as many as {counts['forward_passes']:.1f} passes of"
        f" {depth} layers (a pass each would be {counts['a_pass_each']})"
        + (f"; {counts['means']} more for the means" if counts["means"] else "")
    )
    return told
