"""Figure of `jaxcrit remix`: every variant beside the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from jaxcrit.reporting.plots import BIASED, DEBIASED, NULL, clean

_LABELS = {"exact": "exact answers (share of rows, change)", "loss": "loss (nats, change)"}


def remix_effects(found: Mapping[str, Any], measure: Literal["exact", "loss"], axes: Axes) -> None:
    """Change by variant with its 95 % interval; methods, oracle and controls in colours of their own.

    Args:
        found: content of ``remix.json``.
        measure: which change.
        axes: axes to draw on.
    """
    variants = found["variants"][::-1]
    for place, one in enumerate(variants):
        change, low, high = one[f"{measure}_change"]
        control = "," in one["name"] or one["name"] in ("own shares", "mean of all references")
        color = NULL if control else BIASED if one["name"] == "oracle" else DEBIASED
        axes.errorbar(change, place, xerr=[[change - low], [high - change]], fmt="o", color=color, capsize=3)
        # Above its interval, in whose way it would stand elsewhere: no margin is wide enough on a phone.
        axes.text(0.01, place + 0.22, one["name"], transform=axes.get_yaxis_transform(), fontsize=9)
    axes.axvline(0, color=NULL, linewidth=1)
    axes.set_yticks(np.arange(len(variants)), [""] * len(variants))
    axes.set_ylim(-0.4, len(variants) - 0.3)
    axes.set_xlabel(_LABELS[measure])
    clean(axes)
