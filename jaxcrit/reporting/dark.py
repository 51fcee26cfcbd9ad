"""A figure for a dark page: ink becomes light, paper dark, and our own colours lighter; what maps show stays."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

INK, PAPER = "#e9e5ee", "#221f27"
# What has too little contrast with dark paper; text and lines that matplotlib draws black or white by itself.
_LIGHTER = {
    "#000000": INK,
    "#262626": INK,
    "#ffffff": PAPER,
    "#6a1b9a": "#cf9be8",
    "#7a7a7a": "#a5a0ad",
    "#b0b0b0": "#6f6a77",  # grids
    "#4477aa": "#77aadd",
    "#228833": "#55bb66",
    "#aa3377": "#dd77aa",
}
_OF = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def darkened(canvas: Figure) -> Figure:
    """The figure itself, its colours changed."""
    for axes in canvas.axes:
        axes.tick_params(which="both", color=INK, labelcolor=INK)
    for artist in canvas.findobj():
        if artist.get_gid() == KEPT or (getattr(artist, "cmap", None) is not None and artist.get_array() is not None):  # type: ignore[attr-defined]
            continue
        for name in _OF:
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is not None and put is not None and (found := _lighter(get())) is not None:
                put(found)
    return canvas


KEPT = "kept"  # gid of what stands on a colour of a map, and keeps its own


def _lighter(color: Any) -> Any:
    """The colour that stands for one, or for each of an array; None where it stays."""
    if isinstance(color, str) and color in ("none", "auto", "face"):
        return None
    values = np.atleast_2d(np.array(to_rgba(color) if isinstance(color, str | tuple) else color, float))
    if values.shape[-1] != 4 or not len(values):
        return None
    changed = [to_rgba(_LIGHTER.get(to_hex(one), to_hex(one)), one[3]) for one in values]
    if np.allclose(changed, values):
        return None
    return changed[0] if len(changed) == 1 else changed
