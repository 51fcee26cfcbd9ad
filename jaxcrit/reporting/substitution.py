"""What ``jaxcrit substitute`` shows: losses by window or set, beside random sets; for terminal and run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting import plots, tables
from jaxcrit.reporting.report import Figure, Report, Section, num_samples, on_axes, rows_title

Entry = Mapping[str, Any]
CAVEATS = (
    "A layer is a 0-based decoder block. A window stands at its middle layer; layers whose window leaves the model have"
    " no value.",
    "The loss is that of the response, in nats: the mean over each row's tokens, then over rows (the paper's), or over"
    " all tokens alike.",
    "Standard errors are of the difference from the unchanged model, over rows; neighbouring windows share layers, so"
    " their losses are not independent measurements.",
    "Layers are put among others that were tuned without them: a high loss says that the tuned model relies on them"
    " here, not that tuning them alone would do.",
)


def span(layers: Sequence[int]) -> str:
    """Layers in the words of a LayerSpec, such as ``3-5,9``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def substitution_report(run: Mapping[str, Any], scores: Mapping[str, LayerScores], warnings: Sequence[str]) -> Report:
    """Losses by window or set, beside random sets."""
    figures = []
    if scores:
        score, losses = next(iter(scores.values())), run["result"]["loss"]
        draw = on_axes(
            plots.layer_losses,
            score,
            {f"{name} model": losses[name]["samples"] for name in ("tuned", "base")},
            label=f"{_guest(run)} layers, {score.meta['window']} at a time",
            random=[entry["samples"] for entry in run["result"]["random"]],
            title=rows_title(run),
        )
        caption = "Loss with the window around each layer taken from the other model."
        figures = [Figure("substitution.png", draw, caption)]
    section = Section("Loss after substitution", "", lambda style: _table(run, style), figures)
    return Report(_sentences(run), warnings, [section], CAVEATS)


def _guest(run: Mapping[str, Any]) -> str:
    sites = {"blocks": "", "attn": "attention of ", "mlp": "MLPs of "}[run["config"]["sites"]]
    return f"{sites}{'tuned' if run['config']['reverse'] else 'base'}"


def _table(run: Mapping[str, Any], style: bool = False) -> str:
    result = run["result"]
    host, guest = (result["loss"][name]["samples"] for name in _names(run))
    windows = bool(result["centres"])
    header = ["layer" if windows else "", "layers", "loss", "− unchanged ± s.e.", "per token", "of the way", ""]
    values = [entry["samples"] for entry in result["sets"]]
    most = int(np.argmin(values) if run["config"]["reverse"] else np.argmax(values))
    rows = []
    for place, entry in enumerate(result["sets"]):
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        share = (entry["samples"] - host) / (guest - host) if guest != host else np.nan
        rows.append([
            str(result["centres"][place]) if windows else "",
            _short(span(entry["layers"])),
            f"{entry['samples']:.4f}",
            f"{entry['samples'] - host:+.4f}{error}",
            f"{entry['tokens']:.4f}",
            f"{share:.1%}" if np.isfinite(share) else "-",
            ("◀ lowest" if run["config"]["reverse"] else "◀ highest") if place == most and len(values) > 1 else "",
        ])  # fmt: skip
    return "\n".join(tables.aligned(header, rows, [style and place == most for place in range(len(rows))]))


def _sentences(run: Mapping[str, Any]) -> list[str]:
    result, counts = run["result"], run["result"]["block_evaluations"]
    host, guest = _names(run)
    losses = {name: result["loss"][name] for name in (host, guest)}
    depth = run["model"]["num_layers"]
    extreme = (min if run["config"]["reverse"] else max)(result["sets"], key=lambda entry: entry["samples"])
    difference = extreme["samples"] - losses[host]["samples"]
    error = "" if extreme["stderr"] is None else f" ± {extreme['stderr']:.4f}"
    told = [
        f"{'Lowest' if run['config']['reverse'] else 'Highest'} loss with {_guest(run)} layers"
        f" {_short(span(extreme['layers']))}: {extreme['samples']:.4f}, {difference:+.4f}{error} from the {host} model",
        "; ".join(
            f"{name} model {loss['samples']:.4f} ({loss['tokens']:.4f} per token)" for name, loss in losses.items()
        )
        + f", {num_samples(run)} samples. 'Of the way' is from the first to the second.",
    ]
    sizes = sorted({len(entry["layers"]) for entry in result["random"]})
    for size in sizes:
        drawn = np.array([entry["samples"] for entry in result["random"] if len(entry["layers"]) == size])
        mine = np.array([entry["samples"] for entry in result["sets"] if len(entry["layers"]) == size])
        low, high = np.percentile(drawn, (5, 95))
        told.append(
            f"{len(drawn)} random sets of {size} layers: mean {drawn.mean():.4f}, 5-95 % {low:.4f} to {high:.4f};"
            f" of {len(mine)} asked for, mean {mine.mean():.4f}, {int((mine > high).sum())} are above and"
            f" {int((mine < low).sum())} below that range."
        )
    told.append(
        f"cost: {counts['sweep']} block evaluations a batch, as many as {counts['forward_passes']:.1f} passes of"
        f" {depth} layers ({counts['forward_passes'] / depth:.2f} L; a pass each would be {counts['a_pass_each']});"
        f" {counts['unsubstituted']} more for the other model as it is"
        + (f", {counts['random']} for random sets" if counts["random"] else "")
    )
    return told


def _names(run: Mapping[str, Any]) -> tuple[str, str]:
    """The model that layers are put into, and the one they come from."""
    return ("base", "tuned") if run["config"]["reverse"] else ("tuned", "base")


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
