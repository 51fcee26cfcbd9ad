"""Figures: functions that draw data on axes, or on an empty figure where there are several panels.

`jaxcrit.reporting.report.Figure` makes PNG bytes of them; a notebook gives its own axes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.reporting.dark import KEPT
from jaxcrit.selection.confidence import SampleSizes

DEBIASED, BIASED, NULL, CHOSEN = "#6a1b9a", "#d9772b", "#7a7a7a", "#6a1b9a"
LINES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")

_LABELS = 14  # of runs of layers that fit side by side over an axis
TRAINING = "training loss, of each step's rows"
_WRITTEN = 16  # scores, up to which each cell of their matrix holds its number
_TOLD_APART = 6  # of these colours; the seventh is grey


class Drawing(Figure):
    """A figure that a notebook shows as it is, whatever its backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(self)
        self.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        return buffer.getvalue()


def mark(axes: Axes, layers: Sequence[int], *, label: bool = True) -> None:
    """Shades each run of chosen layers and writes its numbers along the upper edge, those of near runs together."""
    near: list[list[tuple[int, int]]] = []
    for _, group in itertools.groupby(enumerate(layers), key=lambda item: item[1] - item[0]):
        run = [layer for _, layer in group]
        axes.axvspan(run[0] - 0.5, run[-1] + 0.5, color=CHOSEN, alpha=0.12, linewidth=0)
        if near and run[0] - near[-1][-1][1] < layers[-1] / _LABELS:
            near[-1].append((run[0], run[-1]))
        else:
            near.append([(run[0], run[-1])])
    above = axes.get_xaxis_transform()
    for runs in near if label else []:
        text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
        middle = (runs[0][0] + runs[-1][1]) / 2
        axes.text(middle, 1.01, text, transform=above, ha="center", va="bottom", color=CHOSEN, fontsize=9)


def clean(axes: Axes) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def named(axes: Axes, x: str, y: str) -> None:
    """Names of both axes, a light grid, and a legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    clean(axes)
    axes.legend(frameon=False, fontsize=9)


def _band(axes: Axes, score: LayerScores, color: str, alpha: float, most: float = np.inf) -> None:
    """A score ±1.96 standard errors, where it has them, cut at the most that it can be."""
    if score.stderr is not None:
        low, high = score.values - 1.96 * score.stderr, np.minimum(score.values + 1.96 * score.stderr, most)
        axes.fill_between(np.arange(score.num_layers), low, high, color=color, alpha=alpha, linewidth=0)


def layer_axis(axes: Axes, num_layers: int) -> None:
    """Labels and limits of an axis of layers, and a light grid."""
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.set_xlabel("layer ℓ (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    clean(axes)


def cka_heatmap(
    biased: np.ndarray, debiased: np.ndarray, figure: Figure, *, labels: tuple[str, str] = ("layer ℓ", "layer ℓ")
) -> None:
    """CKA of every pair of layers, biased above debiased.

    Args:
        biased: ``[L, L']``, the paper's estimator, on the paper's scale of 0 to 1.
        debiased: ``[L, L']``, on the same scale; values below 0, which this estimator can have, look like 0.
        labels: names of the rows and the columns.
        figure: figure to draw on, empty.
    """
    panels = figure.subplots(2, 1)
    for axes, matrix, name in zip(panels, (biased, debiased), ("biased", "debiased"), strict=True):
        image = axes.imshow(matrix, cmap="magma", vmin=0, vmax=1, origin="lower", interpolation="nearest")
        axes.set_title(f"CKA, {name} ({np.nanmin(matrix):.2f} to {np.nanmax(matrix):.2f})", fontsize=10)
        axes.set_ylabel(labels[0])
        figure.colorbar(image, ax=axes, label="CKA", shrink=0.9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    panels[1].set_xlabel(labels[1])


def delta_curve(
    scores: Mapping[str, LayerScores],
    chosen: LayerSet,
    axes: Axes,
    *,
    window: int,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """δ over the layers: debiased with ±1.96 standard errors, and biased.

    Args:
        scores: ``delta`` and ``delta_debiased``.
        chosen: layers to shade.
        window: layers a δ averages over, for the axis.
        title: title of the figure.
        limits: ends of the axis, where several figures are to share one scale.
        axes: axes to draw on.
    """
    debiased, biased = scores["delta_debiased"], scores["delta"]
    layers = np.arange(chosen.num_layers)
    mark(axes, chosen.layers)
    _band(axes, debiased, DEBIASED, 0.22)
    axes.plot(layers, debiased.values, "o-", color=DEBIASED, markersize=4, label="debiased, ±1.96 s.e.")
    axes.plot(layers, biased.values, "s-", color=BIASED, markersize=2.5, linewidth=1, label="biased (the paper's)")
    layer_axis(axes, chosen.num_layers)
    axes.set_ylabel(f"δ (CKA within {window} layers)")
    if limits is not None:
        axes.set_ylim(*limits)
    if title:
        axes.set_title(title, fontsize=10, loc="left", pad=16)
    axes.legend(frameon=False, fontsize=9)


def delta_panels(
    scores: Mapping[str, LayerScores],
    chosen: LayerSet,
    null: np.ndarray,
    figure: Figure,
    *,
    window: int,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """δ as `delta_curve` draws it, and below, on an axis of its own, what unrelated layers would score.

    Args:
        scores, chosen, window, title, limits: as of `delta_curve`.
        null: ``[L]`` biased δ that unrelated layers would score; the debiased one is near 0 for them.
        figure: figure to draw on, empty.
    """
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    delta_curve(scores, chosen, above, window=window, title=title, limits=limits)
    above.set_xlabel("")
    mark(below, chosen.layers, label=False)
    layers = np.arange(chosen.num_layers)
    below.plot(layers, scores["delta"].values, "s-", color=BIASED, markersize=2.5, linewidth=1)
    below.plot(layers, null, ".--", color=NULL, markersize=3, linewidth=1, label="unrelated layers (biased null)")
    layer_axis(below, chosen.num_layers)
    below.set_ylim(min(0.0, float(np.nanmin(null))), 1.02)
    below.set_ylabel("biased δ")
    below.legend(frameon=False, fontsize=9, loc="lower right")


def delta_limits(datasets: Sequence[Mapping[str, LayerScores]]) -> tuple[float, float]:
    """One scale for δ of several datasets, whole bands of error on it."""
    ends = []
    for scores in datasets:
        for score in (scores["delta"], scores["delta_debiased"]):
            half = 0.0 if score.stderr is None else 1.96 * score.stderr
            ends += [np.nanmin(score.values - half), np.nanmax(score.values + half)]
    margin = 0.04 * (max(ends) - min(ends)) or 0.01
    return float(min(ends) - margin), float(max(ends) + margin)


def consensus_figure(
    deltas: Mapping[str, LayerScores], consensus: LayerScores, chosen: LayerSet, figure: Figure
) -> None:
    """δ of several datasets, one line each with ±1.96 standard errors, above the mean rank that chose.

    Args:
        deltas: by dataset, the score that chose.
        consensus: mean rank over the datasets.
        chosen: layers to shade.
        figure: figure to draw on, empty.
    """
    layers = np.arange(chosen.num_layers)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    mark(above, chosen.layers)
    for index, (name, score) in enumerate(deltas.items()):
        color, dashes = LINES[index % len(LINES)], "-" if index < len(LINES) else "--"
        _band(above, score, color, 0.1)
        above.plot(layers, score.values, dashes, marker="o", color=color, markersize=3, linewidth=1.2, label=name)
    above.set_ylabel(next(iter(deltas.values())).name.replace("delta", "δ").replace("_", " "))
    above.legend(frameon=False, fontsize=8, ncols=1 + (len(deltas) > 6), loc="best")
    mark(below, chosen.layers, label=False)
    _band(below, consensus, DEBIASED, 0.2)
    below.plot(layers, consensus.values, "o-", color=DEBIASED, markersize=4)
    below.set_ylabel("mean rank")
    for axes in (above, below):
        layer_axis(axes, chosen.num_layers)
    above.set_xlabel("")


def layer_losses(
    scores: LayerScores,
    lines: Mapping[str, float],
    axes: Axes,
    *,
    label: str,
    random: Sequence[float] = (),
    title: str = "",
    axis: str = "loss (nats, mean of sample means)",
) -> None:
    """Loss of a changed model over the layer that was changed, with ±1.96 standard errors.

    Args:
        scores: losses in nats.
        lines: losses that do not depend on a layer, by name; one far outside is named with its value instead.
        label: name of the axis.
        random: losses of random sets of as many layers; drawn as a band from the 5th to the 95th percentile.
        title: title of the figure.
        axis: what the values are.
        axes: axes to draw on.
    """
    layers, values = np.arange(scores.num_layers), scores.values
    if len(random):
        low, high = np.percentile(random, (5, 95))
        axes.axhspan(low, high, color=NULL, alpha=0.18, linewidth=0, label=f"{len(random)} random sets, 5-95 %")
    _band(axes, scores, DEBIASED, 0.22)
    axes.plot(layers, values, "o-", color=DEBIASED, markersize=4, label=f"{label}, ±1.96 s.e.")
    low, high = np.nanmin(values), np.nanmax(values)
    reach = max(high - low, 1e-12)
    for (name, value), color in zip(lines.items(), LINES, strict=False):
        near = low - 1.5 * reach <= value <= high + 1.5 * reach
        text = f"{name}: {value:.4f}" + ("" if near else " (outside)")
        axes.plot(
            [0, scores.num_layers - 1] if near else [], [value] * 2 if near else [], "--", color=color, label=text
        )
    layer_axis(axes, scores.num_layers)
    axes.set_ylabel(axis)
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9)


def stacked_curves(a: LayerScores, b: LayerScores, names: Sequence[str], figure: Figure) -> None:
    """Two scores over the layers, one above the other, each on a scale of its own with ±1.96 standard errors."""
    panels = figure.subplots(2, 1, sharex=True)
    for axes, score, name, color, marker in zip(panels, (a, b), names, LINES, "os", strict=False):
        axes.plot(np.arange(score.num_layers), score.values, f"{marker}-", color=color, markersize=4)
        _band(axes, score, color, 0.18)
        layer_axis(axes, a.num_layers)
        axes.set_title(f"{name} ({score.direction} is critical)", fontsize=10, loc="left")
    panels[0].set_xlabel("")


def rank_heatmap(names: Sequence[str], matrix: np.ndarray, axes: Axes) -> None:
    """Spearman's ρ of every two scores, written into its cell while there is room.

    Args:
        names: names of the M scores.
        matrix: ``[M, M]``; NaN where a pair has nothing to compare.
        axes: axes to draw on.
    """
    count = len(names)
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks(np.arange(count), [str(place) for place in range(1, count + 1)], fontsize=8)
    axes.set_yticks(np.arange(count), [f"{name}  {place}" for place, name in enumerate(names, 1)], fontsize=8)
    for (row, column), rho in np.ndenumerate(matrix) if count <= _WRITTEN else ():
        if np.isfinite(rho):
            color, told = "white" if abs(rho) > 0.7 else "black", f"{rho:.1f}".replace("0.", ".")
            axes.text(column, row, told, ha="center", va="center", fontsize=6, color=color, gid=KEPT)
    bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.6, pad=0.08)
    bar.set_label("Spearman's ρ; 1: the two agree", fontsize=8)


def score_grid(scores: Mapping[str, LayerScores], figure: Figure) -> None:
    """Every score over the layers in a panel of its own, with ±1.96 standard errors where it has them."""
    rows = -(-len(scores) // 2)
    for place, (name, score) in enumerate(scores.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        axes.plot(np.arange(score.num_layers), score.values, "o-", color=LINES[0], markersize=3, linewidth=1.2)
        _band(axes, score, LINES[0], 0.2)
        axes.set_title(f"{name} ({score.direction})", fontsize=9, loc="left")
        layer_axis(axes, score.num_layers)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=8)
        axes.set_xlabel("")


def load_heatmaps(loads: Mapping[str, np.ndarray], figure: Figure) -> None:
    """Part of the tokens that go to each expert, layer by layer, a panel for each dataset.

    Args:
        loads: by dataset ``[L, E]``.
        figure: figure to draw on, empty.
    """
    panels = np.atleast_1d(figure.subplots(len(loads), 1))
    most = max(float(load.max()) for load in loads.values())
    for axes, (name, load) in zip(panels, loads.items(), strict=True):
        image = axes.imshow(
            load, cmap="magma", vmin=0, vmax=most, origin="lower", interpolation="nearest", aspect="auto"
        )
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("layer ℓ")
        figure.colorbar(image, ax=axes, label="part of the tokens")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("expert")


def score_scatter(a: LayerScores, b: LayerScores, names: Sequence[str], axes: Axes) -> None:
    """Each layer that both scores are valid for, by both with ±1.96 standard errors; darker is deeper."""
    layers = np.flatnonzero(a.valid & b.valid)
    x, y = a.values[layers], b.values[layers]
    across, up = (None if one.stderr is None else 1.96 * one.stderr[layers] for one in (a, b))
    axes.errorbar(x, y, yerr=up, xerr=across, fmt="none", ecolor=NULL, alpha=0.35, linewidth=0.8)
    axes.scatter(x, y, c=layers, cmap="viridis_r", s=24, zorder=3, edgecolors=NULL, linewidths=0.6)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.margins(0.08)
    clean(axes)
    sides = float(np.ptp(axes.get_xlim())), float(np.ptp(axes.get_ylim()))
    for layer, place, offset in zip(layers, zip(x, y, strict=True), _beside(x, y, sides), strict=True):
        axes.annotate(
            str(layer), place, xytext=offset, textcoords="offset points", fontsize=7, ha="center", va="center"
        )


def _beside(x: np.ndarray, y: np.ndarray, sides: tuple[float, float]) -> list[tuple[int, int]]:
    """Where the name of each point goes, in points from it: the first place of eight that is not taken.

    Taken are the points and the names before it, on axes of 280 by 240 points that show so much of x and y.
    """
    scale = np.array([280.0, 240.0]) / np.maximum(sides, 1e-300)
    points = np.stack([x, y], axis=1) * scale
    around = [(7, 7), (-7, 7), (7, -7), (-7, -7), (10, 0), (-10, 0), (0, 10), (0, -10)]
    taken, found = list(points), []
    for point in points:
        room = [min(_apart(point + offset, other) for other in taken) for offset in around]
        best = next((place for place, least in enumerate(room) if least >= 1), int(np.argmax(room)))
        found.append(around[best])
        taken.append(point + around[best])
    return found


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """How far two names are apart, in their own widths and heights; below 1 they overlap."""
    return float(np.max(np.abs(one - other) / (9.0, 8.0)))


def component_curves(delta: LayerScores, curves: Mapping[str, LayerScores], figure: Figure, *, title: str = "") -> None:
    """δ, and below it CCA of principal components, which the paper draws over each other on two cut axes.

    Args:
        delta: above, with ±1.96 standard errors.
        curves: lines with ±1.96 standard errors, by label; errors go to what a CCA can be, 0 to 1.
        title: title of the figure.
        figure: figure to draw on, empty.
    """
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    above.plot(np.arange(delta.num_layers), delta.values, "o-", color=DEBIASED, markersize=4)
    _band(above, delta, DEBIASED, 0.2)
    above.set_ylabel(delta.name.replace("delta", "δ").replace("_", " "))
    for index, (label, score) in enumerate(curves.items()):
        color = LINES[index % len(LINES)]
        below.plot(np.arange(score.num_layers), score.values, "o-", color=color, markersize=3.5, label=label)
        _band(below, score, color, 0.15, most=1)
    least = min(float(np.nanmin(score.values)) for score in curves.values())
    below.set_ylim(max(0.0, least - 0.25 * (1 - least)), 1.02)
    below.set_ylabel("mean CCA with neighbours")
    for axes in (above, below):
        layer_axis(axes, delta.num_layers)
    above.set_xlabel("")
    if title:
        above.set_title(title, fontsize=10, loc="left")
    below.legend(frameon=False, fontsize=9, loc="lower left", ncols=3)


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]], axes: Axes) -> None:
    """Loss over optimizer steps, one line each; what is noted at every step is thin.

    Args:
        curves: by name, (step, loss in nats per token).
        axes: axes to draw on.
    """
    for index, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        color, many = LINES[index % len(LINES)], name == TRAINING
        style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6} if many else {"marker": "o", "markersize": 3}
        axes.plot(steps, losses, color=color, label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    what = "loss" if TRAINING in curves else "test loss"
    named(axes, "optimizer step", f"{what} (nats per response token)")


def drift_panels(rows: Sequence[Mapping[str, Any]], canvas: Figure) -> None:
    """How far each layer has moved from the base, in weights and in states, a line for each of up to six steps.

    Args:
        rows: of kind ``drift`` in ``metrics.jsonl``; with too few test rows none has a CKA, and that panel is left out.
        canvas: empty figure.
    """
    shown = [rows[round(place)] for place in np.linspace(0, len(rows) - 1, min(6, len(rows)))]
    panels = 2 if any(row["cka"] is not None for row in shown) else 1
    above, *states = canvas.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for index, row in enumerate(shown):
        style: dict[str, Any] = {"color": DEBIASED, "alpha": (index + 1) / len(shown), "linewidth": 1.4}
        above.plot(row["weights"], label=f"step {row['step']}", **style)
        for below in states:
            if row["cka"] is not None:
                below.plot(row["cka"], **style)
    named(above, "", "change / weights")
    for below in states:
        below.set_ylabel("CKA with the base")
        clean(below)
    last = [above, *states][-1]
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.set_xlabel("layer")


def sample_size_curve(sizes: SampleSizes, num_prompts: int, axes: Axes) -> None:
    """How often n prompts would make the same choice, over n.

    Args:
        sizes: the curve.
        num_prompts: there are now, marked.
        axes: axes to draw on.
    """
    axes.axhline(0.95, color=NULL, linestyle="--", linewidth=1)
    axes.axvline(num_prompts, color=NULL, linestyle=":", linewidth=1)
    axes.plot(sizes.num_prompts, sizes.same, "o-", color=DEBIASED, markersize=4, label="the same layers")
    axes.plot(
        sizes.num_prompts, sizes.overlap, "s-", color=BIASED, markersize=3, linewidth=1, label="share of them in common"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes.num_prompts, [f"{count:,}" for count in sizes.num_prompts])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"prompts (dotted: the {num_prompts:,} of this run)")
    axes.set_ylabel("how often")
    clean(axes)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def cross_curve(cka: Mapping[str, np.ndarray], axes: Axes, *, title: str) -> None:
    """CKA of each layer of one model with its partner in another: debiased with errors, biased and null beside it.

    Args:
        cka: ``debiased``, ``biased``, ``null_mean``, and ``stderr`` of the debiased where it is known, each ``[L]``.
        axes: axes to draw on.
        title: title of the figure.
    """
    values, biased, null = cka["debiased"], cka["biased"], cka["null_mean"]
    layers, half = np.arange(len(values)), 1.96 * cka["stderr"] if "stderr" in cka else None
    style = {"fmt": "o-", "color": DEBIASED, "markersize": 4, "capsize": 2}
    axes.errorbar(layers, values, half, **style, label="debiased, ±1.96 s.e.")  # type: ignore[arg-type]
    axes.plot(layers, biased, "s-", color=BIASED, markersize=2.5, linewidth=1, label="biased")
    low, high = np.nanmin([values, biased]), np.nanmax([values, biased])
    # Far below, it would press a curve that stays near 1 into a line.
    near = null.max() > low - 1.5 * (high - low)
    where = "" if near else f", {null.min():.2f} to {null.max():.2f}: outside"
    label = f"biased, unrelated layers (null mean{where})"
    axes.plot(layers, null if near else np.full(len(null), np.nan), ".--", color=NULL, markersize=3, label=label)
    axes.ticklabel_format(axis="y", useOffset=False)
    layer_axis(axes, len(values))
    axes.set_ylabel("CKA between the models")
    axes.set_title(title, fontsize=11, loc="left")
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= min(top, 1 + 1e-9)])
    axes.set_ylim(bottom, top + 0.35 * (top - bottom))  # room for names, where no curve is
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def cohesion_curves(classes: Mapping[str, tuple[Sequence[float], int | None]], axes: Axes) -> None:
    """Cohesion of classes over the layers; a dot marks a layer of interest.

    Args:
        classes: by name, cohesion of each layer, and the layer of interest or None; the largest class first.
        axes: axes to draw on.
    """
    for index, (name, (values, interest)) in enumerate(classes.items()):
        known = index < _TOLD_APART
        color, rest = LINES[index] if known else NULL, len(classes) - index
        label = name if known else f"{rest} more" if index == _TOLD_APART else None
        axes.plot(values, color=color, linewidth=1.4 if known else 0.6, label=label)
        if interest is not None:
            axes.plot(interest, values[interest], "o", color=color, markersize=5)
    layer_axis(axes, len(values))
    axes.set_ylabel("cohesion: mean cosine with the others")
    axes.legend(frameon=False, fontsize=9, title="classes (dot: layer of interest)")


def auroc_curve(auroc: Mapping[str, Any], axes: Axes) -> None:
    """AUROC of every layer alone with its interval, and lines for what has no layer.

    Args:
        auroc: ``layers``, ``score`` and ``mahalanobis``, each ``value`` and ``interval``.
        axes: axes to draw on.
    """
    values = np.array([one["value"] for one in auroc["layers"]])
    ends = np.array([one["interval"] for one in auroc["layers"]])
    axes.fill_between(np.arange(len(values)), *ends.T, color=DEBIASED, alpha=0.2, linewidth=0)
    axes.plot(values, "o-", color=DEBIASED, markersize=4, label="one layer, 95 %")
    for (key, label), color in zip((("score", "the score"), ("mahalanobis", "Mahalanobis")), LINES, strict=False):
        axes.axhline(auroc[key]["value"], color=color, linestyle="--", linewidth=1.2, label=label)
    axes.axhline(0.5, color=NULL, linestyle=":", linewidth=1)
    layer_axis(axes, len(values))
    axes.set_ylabel("AUROC")
    axes.legend(frameon=False, fontsize=9)


def trace_panels(
    scores: Mapping[str, LayerScores],
    layers: Sequence[int],
    jump: int,
    beside: Mapping[str, LayerScores],
    figure: Figure,
) -> None:
    """Effects of putting things back: at the subject, in windows, at the last token; ±1.96 standard errors.

    Args:
        scores: ``trace``, ``trace_recall``, ``trace_mlp``, ``trace_attn``, ``trace_last``.
        layers: layers to shade in the first panel.
        jump: layer where ``trace_last`` rises most, marked in the third and fourth.
        beside: other scores of the model, in a fourth panel, which is left out where there are none.
        figure: figure to draw on, empty.
    """
    panels = figure.subplots(4 if beside else 3, 1, sharex=True)
    groups = (("trace", "trace_recall"), ("trace_mlp", "trace_attn"), ("trace_last",))
    for axes, keys in zip(panels, groups, strict=False):
        for index, key in enumerate(keys):
            score, color = scores[key], LINES[index]
            axes.plot(np.arange(score.num_layers), score.values, "o-", color=color, markersize=3.5, label=key)
            _band(axes, score, color, 0.18)
        axes.set_ylabel("probability brought back")
    mark(panels[0], layers)
    panels[2].axvline(jump, color=NULL, linestyle=":", linewidth=1)
    if beside:
        for index, (key, score) in enumerate(beside.items(), 1):
            style: dict[str, Any] = {"color": LINES[index], "markersize": 2.5, "label": key}
            panels[3].plot(np.arange(score.num_layers), score.values, "s--", **style)
        panels[3].axvline(jump, color=NULL, linestyle=":", linewidth=1)
        panels[3].set_ylabel("other scores")
    for axes in panels:  # above the panel, where no curve is
        layer_axis(axes, scores["trace"].num_layers)
        where: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0, "ncols": 3}
        axes.legend(frameon=False, fontsize=9, **where)
