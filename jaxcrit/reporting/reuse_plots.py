"""Figures of `jaxcrit reuse`: damage over the number of recomputed layers, and of every group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxcrit.reporting.plots import BIASED, DEBIASED, LINES, NULL, named

Entry = Mapping[str, Any]


def reuse_front(found: Mapping[str, Any], axes: Axes) -> None:
    """Damage on held-out rows over the number of recomputed layers, beside the controls.

    Args:
        found: content of ``reuse.json``.
        axes: axes to draw on.
    """
    counts = np.array([line["count"] for line in found["front"]])

    def of(name: str) -> np.ndarray:
        return np.array([line[name]["test"]["kl"] if line[name] else np.nan for line in found["front"]])

    ends = np.array([[line["best"]["test"][end] for line in found["front"]] for end in ("low", "high")])
    axes.fill_between(counts, *ends, color=DEBIASED, alpha=0.2, linewidth=0)
    axes.plot(counts, of("best"), "o-", color=DEBIASED, markersize=4, label="best group, 95 %")
    axes.plot(counts, of("first"), "s-", color=BIASED, markersize=3, linewidth=1, label="first n layers")
    axes.plot(counts, of("later"), "^-", color=LINES[2], markersize=3, linewidth=1, label="best group begun above 0")
    axes.plot(counts, of("last"), "-", color=LINES[4], linewidth=1, label="last n layers")
    for name, mark, label in (("random", ".", "random layers"), ("most_damaging", "x", "n most damaging layers")):
        points = [(len(one["layers"]), one["test"]["kl"]) for one in found[name]]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=NULL, label=label)
    axes.axhline(found["choice"]["tolerance"], color=NULL, linestyle="--", linewidth=1, label="tolerance")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    named(axes, "recomputed layers", "KL (nats a scored token)")


def reuse_matrix(groups: Sequence[Entry], num_layers: int, axes: Axes) -> None:
    """Damage of every group on held-out rows: where it begins, and how many layers it has.

    Args:
        groups: ``layers`` and ``test`` of each.
        num_layers: L.
        axes: axes to draw on.
    """
    values = np.full((num_layers, num_layers + 1), np.nan)
    for one in groups:
        values[one["layers"][0], len(one["layers"])] = one["test"]["kl"]
    image = axes.imshow(values, cmap="magma_r", vmin=0, origin="lower", interpolation="nearest", aspect="auto")
    axes.set_xlim(0.5, num_layers + 0.5)
    axes.set_xlabel("recomputed layers")
    axes.set_ylabel("first of them (0-based decoder block)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
    axes.figure.colorbar(image, ax=axes, label="KL (nats a scored token)", shrink=0.92)
