"""Tables and sentences for the terminal; at most 100 columns wide."""

from __future__ import annotations

import contextvars
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.core.console import visible
from jaxcrit.core.layers import LayerScores, LayerSet

if TYPE_CHECKING:
    from jaxcrit.selection.confidence import Certainty

WIDTH = 100
# Columns that tables fill which are made when they are shown; on a page all fill WIDTH.
COLUMNS: contextvars.ContextVar[int] = contextvars.ContextVar("COLUMNS", default=WIDTH)
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def number(value: float, digits: int = 4) -> str:
    """A number with so many digits behind the point; - where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _probability(probability: np.ndarray | None, layer: int, score: LayerScores) -> str:
    if probability is None:
        return ""
    return number(probability[layer], 2) if score.valid[layer] else "-"


def estimate(score: LayerScores, layer: int) -> str:
    """A layer's value, with its standard error where there is one."""
    error = "" if score.stderr is None else f" ± {number(score.stderr[layer])}"
    return f"{number(score.values[layer])}{error}" if score.valid[layer] else "-"


def sweep_cost(counts: Mapping[str, Any], num_layers: int, also: str = "") -> str:
    """What a sweep of changed models cost, in words; ``also`` goes in front of what it would have cost otherwise."""
    return (
        f"cost: {counts['sweep']} block evaluations a batch, as many as {counts['forward_passes']:.1f} passes of"
        f" {num_layers} layers ({also}a pass each would be {counts['a_pass_each']})"
    )


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] = ()) -> list[str]:
    """Aligns columns to the right, the last one to the left; strips the ends. Rows may be bold, for a terminal."""
    header, rows = [visible(cell) for cell in header], [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for cells, strong in itertools.zip_longest([header, *rows], [False, *bold]):
        padded = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[:-1], strict=True)]
        line = "  ".join([*padded, cells[-1]]).rstrip()
        lines.append(f"{BOLD}{line}{PLAIN}" if strong else line)
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] = ()) -> str:
    """The lines of `aligned` as one text."""
    return "\n".join(aligned(header, rows, bold))


def estimates(scores: Mapping[str, LayerScores]) -> dict[str, list[str]]:
    """A column of `by_layer` of each score."""
    return {f"{key} ± s.e.": [estimate(one, layer) for layer in range(one.num_layers)] for key, one in scores.items()}


def by_layer(columns: Mapping[str, Sequence[str]], marks: Iterable[tuple[int, str]], style: bool = False) -> str:
    """A row of each layer; in as many parts as the width takes.

    Args:
        columns: cells of all layers by header.
        marks: what is said of a layer at the end of its row.
        style: marked rows are bold, for a terminal.
    """
    depth, marks = len(next(iter(columns.values()))), list(marks)
    named = [" ".join(text for layer, text in marks if layer == one) for one in range(depth)]
    first, margin = ["layer", *map(str, range(depth))], 7 + max(map(len, named))
    return wide_table(first, columns, ["", *named], margin=margin, least=6, bold=[style and bool(one) for one in named])


def wide_table(
    first: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    last: Sequence[str],
    *,
    margin: int,
    least: int,
    bold: Sequence[bool] = (),
) -> str:
    """A table in as many parts, one below the other, as the width takes.

    Args:
        first: header and cells of the column that every part begins with.
        columns: cells by header.
        last: header and cells of the column that ends every part.
        margin: width of what is not ``columns``.
        least: width of a column, at least.
        bold: rows that are bold.
    """
    parts: list[list[str]] = [[]]
    for name in columns:
        if parts[-1] and margin + sum(max(len(one), least) + 2 for one in (*parts[-1], name)) > COLUMNS.get():
            parts.append([])
        parts[-1].append(name)
    made = []
    for part in parts:
        rows = list(zip(first, *([name, *columns[name]] for name in part), last, strict=True))
        made.append(table(rows[0], rows[1:], bold))
    return "\n\n".join(made)


def p_value(value: float) -> str:
    """A probability in a table; - where there is none."""
    return f"{value:.1e}" if value < 1e-3 else number(value, 3)


def parted(folders: Sequence[Path]) -> list[str]:
    """Names of folders from where they part; empty where all are one."""
    parts = [folder.resolve().parts for folder in folders]
    common = 0
    while all(len(one) > common for one in parts) and len({one[common] for one in parts}) == 1:
        common += 1
    return ["/".join(one[common:]) for one in parts]


def shortened(text: str, width: int = WIDTH) -> str:
    """One line of at most so many columns."""
    return text if len(text) <= width else text[: width - 1] + "…"


def layer_table(
    scores: Mapping[str, LayerScores],
    chosen: LayerSet,
    *,
    null: np.ndarray | None = None,
    probability: np.ndarray | None = None,
    paper: LayerSet | None = None,
    step_score: np.ndarray | None = None,
    style: bool = False,
) -> str:
    """One row per layer of one dataset.

    Args:
        scores: ``delta``, ``delta_debiased``, ``step``.
        chosen: rows to mark.
        null: ``[L]`` δ that unrelated layers would score.
        probability: ``[L]`` how often resampled prompts choose the layer.
        paper: the choice by the biased δ, marked where it differs.
        step_score: ``[L]`` how far step is above chance, where that is in doubt.
        style: bold marks, for a terminal.
    """
    debiased, biased, step = scores["delta_debiased"], scores["delta"], scores["step"]
    header = ["layer", "δ debiased ± s.e.", "δ biased", "null δ", "step", "step z", "P(chosen)", ""]
    if step_score is None:
        header.remove("step z")
    rows = []
    for layer in range(chosen.num_layers):
        marks = ["◀ critical"] if layer in chosen.layers else []
        if paper and (layer in paper.layers) != (layer in chosen.layers):
            marks.append("(not by biased δ)" if marks else "(by biased δ only)")
        rows.append(
            [
                str(layer),
                estimate(debiased, layer),
                number(biased.values[layer]),
                "" if null is None else number(null[layer]),
                number(step.values[layer]),
                *([] if step_score is None else [number(step_score[layer], 1)]),
                _probability(probability, layer, debiased),
                " ".join(marks),
            ]
        )
    bold = [style and layer in chosen.layers for layer in range(chosen.num_layers)]
    return table(header, rows, bold)


def consensus_table(
    deltas: Mapping[str, LayerScores],
    consensus: LayerScores,
    chosen: LayerSet,
    *,
    probability: np.ndarray | None = None,
    style: bool = False,
) -> str:
    """One row per layer, one column of δ per dataset as far as they fit, and the mean rank that chose.

    Args:
        deltas: by dataset, the score that chose.
        consensus: mean rank over the datasets.
        chosen: rows to mark.
        probability: ``[L]`` how often resampled prompts choose the layer.
        style: bold marks, for a terminal.
    """
    names = {name: name if len(name) <= 12 else f"{name[:11]}…" for name in deltas}
    ends = ["layer", "mean rank", "P(chosen)", "◀ critical"]
    shown, used = [], len("  ".join(ends))
    for name, short in names.items():
        used += max(len(short), 6) + 2
        if used <= COLUMNS.get():
            shown.append(name)
    rows = []
    for layer in range(chosen.num_layers):
        values = [number(deltas[name].values[layer]) for name in shown]
        sure = _probability(probability, layer, consensus)
        mark = "◀ critical" if layer in chosen.layers else ""
        rows.append([str(layer), *values, number(consensus.values[layer], 2), sure, mark])
    header = ["layer", *(names[name] for name in shown), "mean rank", "P(chosen)", ""]
    lines = aligned(header, rows, [style and layer in chosen.layers for layer in range(chosen.num_layers)])
    hidden = len(deltas) - len(shown)
    return "\n".join(lines + ([f"({hidden} more datasets are in the report)"] if hidden else []))


_SAID = {"delta_debiased": "debiased δ", "delta": "biased δ", "substitution": "loss after substitution"}


def said(name: str) -> str:
    """A score's name in a sentence or on an axis: ``debiased δ, gsm8k`` for ``gsm8k:delta_debiased``."""
    folder, _, key = name.rpartition(":")
    return _SAID.get(key, key.replace("_", " ")) + (f", {folder}" if folder else "")


def headline(chosen: LayerSet, num_datasets: int = 1, *, flat: bool = False) -> str:
    """What was found, in one sentence; the parameter path stands here once.

    Args:
        chosen: the layers.
        num_datasets: how many were joined by their mean rank.
        flat: whether no layer stands out.
    """
    plural = "s" if len(chosen.layers) > 1 else ""
    path = f"model.layers.{chosen.layers[0]}{', …' if plural else ''}"
    joined = f", mean rank over {num_datasets} datasets" if num_datasets > 1 else ""
    by = f"{said(chosen.criterion)}, {chosen.rule}{joined}; {path}"
    named = f"{', '.join(map(str, chosen.layers))} of {chosen.num_layers}"
    if not chosen.rule.startswith("critical"):
        return f"Chosen layer{plural}: {named} ({by})"
    if flat:
        return f"Critical layer{plural}: none stands out, for δ is flat; {named} would be named ({by})"
    where = "there the hidden state changes most" if chosen.criterion.startswith(("delta", "step")) else "ranked first"
    return f"Critical layer{plural}: {named}, {where} ({by})"


def certainty(chosen: LayerSet, sure: Certainty | None, candidates: int, num_datasets: int = 1) -> list[str]:
    """How sure a choice is, a sentence each: the chosen layers, the most critical one, how many prompts it takes.

    Args:
        chosen: the layers.
        sure: what resampled prompts say.
        candidates: how many layers could have been chosen.
        num_datasets: how many were joined by their mean rank.
    """
    if sure is None:
        return ["How sure: not estimated for this choice."]
    if candidates <= len(chosen.layers):
        return [f"How sure: there was nothing to choose; {candidates} of {chosen.num_layers} layers have a score."]
    return [_how_sure(chosen, sure), _which_is_lowest(sure, candidates, num_datasets), _how_many(sure)]


def _how_sure(chosen: LayerSet, sure: Certainty) -> str:
    chances = sure.probability
    least = float(np.min(chances[list(chosen.layers)]))
    doubtful = [layer for layer in chosen.layers if chances[layer] < 0.5]
    others = sorted(set(np.flatnonzero(chances >= 0.1).tolist()) - set(chosen.layers), key=lambda one: -chances[one])
    instead = ", ".join(f"{layer} ({_percent(float(chances[layer]))})" for layer in others[:3])
    if doubtful:
        return (
            f"How sure: {sure.num_prompts} prompts do not settle layer{'s' if len(doubtful) > 1 else ''}"
            f" {', '.join(map(str, doubtful))}: another draw of prompts would more often choose otherwise"
            f"{f', such as {instead}' if instead else ''}."
        )
    if least < 1:
        often = f"in at least {math.floor(100 * least)}% of draws"
    else:  # the rule of three: what happens in none of n draws has a chance below 3/n, at 95 %
        often = (
            f"in all of {sure.draws:,} bootstrap draws (at 95%, in over {100 - 300 / sure.draws:.2f}% of such draws)"
        )
    weakest = min(chosen.layers, key=lambda one: chances[one])
    rival = f", layer {weakest} least often; in its place {instead}" if instead else ""
    return f"How sure: another draw of {sure.num_prompts} prompts would choose each of them {often}{rival}."


def _which_is_lowest(sure: Certainty, candidates: int, num_datasets: int) -> str:
    """Which one layer is the most critical; of several datasets this test is wide, and must not seem to deny the rest.

    It bounds all differences of all datasets at once (`jaxcrit.selection.confidence.confidence_set`).
    """
    layers = sure.confidence_set
    if len(layers) == candidates:
        if num_datasets > 1:
            return "The one most critical of all: not told over several datasets at once; see each dataset's."
        return f"The one most critical of all: not told by {sure.num_prompts} prompts, at 95% confidence."
    if len(layers) == 1:
        return f"The one most critical of all: {layers[0]}, at 95% confidence (of {candidates} candidates)."
    listed = ", ".join(map(str, layers))
    return f"The one most critical of all: among {listed}, at 95% confidence (of {candidates} candidates)."


def _how_many(sure: Certainty) -> str:
    sizes = sure.sample_sizes
    now = float(sizes.same[list(sizes.num_prompts).index(sure.num_prompts)])
    start = f"Sample size: {sure.num_prompts} prompts make this very choice {_percent(now)} of the time"
    enough, least, most = sizes.enough(), int(sizes.num_prompts[0]), int(sizes.num_prompts[-1])
    if enough is None:
        return f"{start}; for 95% more than {most:,} would be needed."
    return f"{start}; for 95% it takes {'at most' if enough == least else 'about'} {float(f'{enough:.2g}'):,.0f}."


def _percent(share: float) -> str:
    return "over 99%" if share > 0.99 else "under 1%" if share < 0.01 else f"{share:.0%}"


def agreement(chosen: LayerSet, alone: Mapping[str, LayerSet]) -> str:
    """How far the datasets agree with their consensus, in one sentence.

    Args:
        chosen: the consensus.
        alone: what each dataset would choose by itself.
    """
    by_count: dict[int, list[str]] = {}
    for layer in chosen.layers:
        by_count.setdefault(sum(layer in one.layers for one in alone.values()), []).append(str(layer))
    parts = [f"{', '.join(layers)} by {count or 'none'}" for count, layers in sorted(by_count.items(), reverse=True)]
    return f"Chosen by the {len(alone)} datasets, each by itself: {'; '.join(parts)}."
