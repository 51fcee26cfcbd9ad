"""What removing components does, as a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from removal import Cell, Removal

from jaxcrit.core.layers import LayerSet
from jaxcrit.evaluation.intervals import wilson
from jaxcrit.reporting.plots import LINES, layer_axis, mark
from jaxcrit.reporting.report import Figure
from jaxcrit.reporting.tables import aligned, shortened

_SHOWN_WARNINGS = 3
Contrasts = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]  # by set, contrast and measure: mean, low, high


def removal_text(found: Removal) -> str:
    """Per layer and set: share of answers changed, exact match, KL of the next token; then the controls."""
    cells = {(cell.layer, cell.name): cell for cell in found.cells}
    plain = found.plain
    lines = [f"warning: {text}" for text in found.warnings[:_SHOWN_WARNINGS]]
    if len(found.warnings) > _SHOWN_WARNINGS:
        lines.append(f"({len(found.warnings) - _SHOWN_WARNINGS} more such warnings are in the file)")
    lines += [
        f"{found.dataset}: {plain.n} prompts",
        f"nothing removed: exact match {_share(plain.exact, plain.n)}, rationale before the conclusion"
        f" {_share(plain.rationale, plain.n)}",
    ]
    for title, value in _COLUMNS.items():
        if plain.exact is None and title.startswith("exact"):
            continue
        shown = {place: value(cell) for place, cell in cells.items()}
        lines += ["", f"{title}:", *layer_lines(shown, found.critical.layers)]
    lines += ["", *contrast_lines(found.contrasts, found.plain.exact is not None), "", *example_lines(found)]
    lines.append(
        f"\n{plain.n} prompts x {len(found.cells)} removals in {found.seconds} s ({found.cpu_seconds} s of CPU);"
        f" {found.buckets} buckets, {found.compiled[0]} + {found.compiled[1]} compiled"
    )
    return "\n".join(lines)


def layer_lines(shown: Mapping[tuple[int, str], str], critical: Sequence[int]) -> list[str]:
    """A line for each layer with what is shown of every set, by (layer, set)."""
    layers, sets = (list(dict.fromkeys(place)) for place in zip(*shown, strict=True))
    rows = [
        [str(layer), *(shown[layer, name] for name in sets), "◀ critical" if layer in critical else ""]
        for layer in layers
    ]
    return aligned(["layer", *sets, ""], rows)


def contrast_lines(contrasts: Contrasts, exact: bool) -> list[str]:
    """Differences with intervals, a line for each set and contrast; of exact match where there are references."""
    shown = ["changed", *(["exact"] if exact else []), "kl"]
    rows = []
    for name, kinds in contrasts.items():
        for kind, measures in kinds.items():
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*measures[measure]) for measure in shown]
            rows.append([*cells, f"{name}: {kind}"])
    title = "differences of means over the layers, paired by prompt, 95 % intervals:"
    return [title, *aligned([*shown, "set"], rows)]


def removal_told(content: Mapping[str, Any]) -> str:
    """What ``removal.json`` says, in short: of every dataset the answers that change, and the differences."""
    parts = []
    for one in content["datasets"]:
        changed = {(cell["layer"], cell["name"]): _share(cell["changed"], cell["n"]) for cell in one["cells"]}
        parts += [
            f"{one['dataset']}: {one['plain']['n']} prompts; share of answers changed, 95 % intervals:",
            *layer_lines(changed, one["critical"]),
            "",
            *contrast_lines(one["contrasts"], one["plain"]["exact"] is not None),
            "",
        ]
    return "\n".join(parts[:-1])


def example_lines(found: Removal) -> list[str]:
    """One prompt's answers at the first critical layer."""
    answers = found.example["answers"]
    edited = [layer for layer in answers if layer != "none"]
    layer = next((str(one) for one in found.critical.layers if str(one) in answers), edited[0])
    lines = [shortened(f"prompt {found.example['prompt_index']} at layer {layer}: {found.example['prompt']}")]
    lines += [shortened(f"  {name}: {text!r}") for name, text in {**answers["none"], **answers[layer]}.items()]
    return lines


def removal_curves(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    layers: Sequence[int],
    chosen: LayerSet,
    figure: Canvas,
    *,
    title: str = "",
) -> None:
    """Shares over the layers, a panel per measure and a line per set.

    Args:
        panels: by measure and set, share and interval ``[layers, 3]``.
        layers: that were measured.
        chosen: layers to shade.
        title: title of the figure.
        figure: figure to draw on, empty.
    """
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for place, (axes, (measure, curves)) in enumerate(zip(rows, panels.items(), strict=True)):
        mark(axes, chosen.layers, label=place == 0)
        for index, (name, points) in enumerate(curves.items()):
            color = LINES[index % len(LINES)]
            axes.fill_between(layers, points[:, 1], points[:, 2], color=color, alpha=0.15, linewidth=0)
            axes.plot(layers, points[:, 0], "o-", color=color, markersize=3, linewidth=1.4, label=name)
        layer_axis(axes, chosen.num_layers)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(measure)
        axes.set_xlabel(axes.get_xlabel() if place == len(panels) - 1 else "")
    rows[0].legend(frameon=False, fontsize=9, title="removed components", title_fontsize=9)
    if title:
        rows[0].set_title(title, fontsize=11, loc="left", pad=18)


def removal_figure(found: Removal) -> Figure:
    """Share of answers changed and exact match over the layers, a line per set, Wilson's 95 % intervals."""
    panels: dict[str, Mapping[str, np.ndarray]] = {"answers changed": _curves(found, lambda cell: cell.changed)}
    if found.plain.exact is not None:
        panels["exact match"] = _curves(found, lambda cell: cell.exact)
    layers = list(dict.fromkeys(cell.layer for cell in found.cells if cell.layer is not None))
    name = f"removal-{found.dataset.rpartition(':')[2].rpartition('/')[2]}.png"

    def draw(canvas: Canvas) -> None:
        removal_curves(panels, layers, found.critical, canvas, title=found.dataset)

    caption = "Share of answers that change, and of right ones, without components at each layer."
    return Figure(name, draw, caption, (8.4, 3.2 * len(panels)))


def _curves(found: Removal, count: Callable[[Cell], int | None]) -> dict[str, np.ndarray]:
    """By set, share with its interval ``[layers, 3]``."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for cell in found.cells:
        k = count(cell) or 0
        curves.setdefault(cell.name, []).append((k / cell.n, *wilson(k, cell.n)))
    return {name: np.array(points) for name, points in curves.items()}


def _share(k: int | None, n: int) -> str:
    if k is None:
        return "unknown"
    low, high = wilson(k, n)
    return f"{k / n:.2f} [{low:.2f}, {high:.2f}]"


def _mean(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


_COLUMNS = {
    "share of answers changed": lambda cell: _share(cell.changed, cell.n),
    "exact match": lambda cell: _share(cell.exact, cell.n),
    "rationale before the conclusion": lambda cell: _share(cell.rationale, cell.n),
    "KL of the next token, nats": lambda cell: _mean(cell.kl),
    "tokens more": lambda cell: _mean(cell.length_change),
}
