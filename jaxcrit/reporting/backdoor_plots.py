"""Figures of a backdoor study: attack success over steps, and against what it costs on clean rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxcrit.reporting.plots import LINES, named


def attack_curves(runs: Sequence[tuple[str, Sequence[tuple[float, float]]]], axes: Axes) -> None:
    """Attack success over optimizer steps: a thin line per run, a thick one for the mean of an arm.

    Args:
        runs: (arm, (step, attack success) of each test).
        axes: axes to draw on.
    """
    for name, color in _colors([arm for arm, _ in runs]).items():
        mine = [points for arm, points in runs if arm == name]
        for points in mine:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.7, alpha=0.5)
        steps = [step for step, _ in mine[0]]
        means = np.mean([[share for _, share in points] for points in mine], axis=0)
        axes.plot(steps, means, "o-", color=color, markersize=3, linewidth=1.8, label=f"{name} ({len(mine)})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _attack_axes(axes, "optimizer step")


def attack_tradeoff(runs: Sequence[tuple[str, float, float]], axes: Axes) -> None:
    """Attack success against clean loss at the end, a point per run.

    Args:
        runs: (arm, clean loss, attack success).
        axes: axes to draw on.
    """
    for name, color in _colors([arm for arm, _, _ in runs]).items():
        mine = [(loss, share) for arm, loss, share in runs if arm == name]
        axes.plot(*zip(*mine, strict=True), "o", color=color, markersize=6, alpha=0.8, label=f"{name} ({len(mine)})")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _attack_axes(axes, "clean loss (nats per token of the gold answers)")


def _colors(arms: Sequence[str]) -> dict[str, str]:
    """Arms in their order, each with the same color in both figures; the untouched model, in one of them, is black."""
    trained = [arm for arm in dict.fromkeys(arms) if arm != "init"]
    colors = {arm: LINES[index % len(LINES)] for index, arm in enumerate(trained)}
    return ({"init": "black"} if "init" in arms else {}) | colors


def _attack_axes(axes: Axes, xlabel: str) -> None:
    axes.set_ylim(-0.03, 1.03)
    named(axes, xlabel, "attack success with the trigger")
