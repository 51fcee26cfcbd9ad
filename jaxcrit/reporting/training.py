"""What a fine-tuning run says: its test-loss curve, and a few lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcrit.core.files import write_bytes
from jaxcrit.reporting.plots import loss_curves
from jaxcrit.reporting.report import Figure, on_axes

Row = Mapping[str, Any]


def evaluations(metrics: Sequence[Row]) -> list[Row]:
    """The tests among the rows of ``metrics.jsonl``."""
    return [row for row in metrics if row["kind"] == "eval"]


def write_curve(out: Path, runs: Mapping[str, Sequence[Row]]) -> Path:
    """Draws test losses over steps, a line per run, as ``loss.png``."""
    curves = {name: [(row["step"], row["loss"]) for row in evaluations(metrics)] for name, metrics in runs.items()}
    path = out / "loss.png"
    write_bytes(path, Figure(path.name, on_axes(loss_curves, curves), "Test loss over optimizer steps.").png())
    return path


def finetune_text(
    run: Mapping[str, Any], times: Mapping[str, Any], metrics: Sequence[Row], warnings: Sequence[str], out: Path
) -> str:
    """Test loss before and after, in both averages; what it took; where it is."""
    tests, result = evaluations(metrics), run["result"]
    before, after = tests[0], tests[-1]
    trained, optimizer = (result[f"{name}_bytes"] / 2**20 for name in ("trained", "optimizer"))
    lines = [f"warning: {text}" for text in warnings]
    lines += [
        f"{'test loss':<22}{'step 0':>10}{'step ' + str(after['step']):>12}",
        f"{'per token':<22}{before['loss']:>10.4f}{after['loss']:>12.4f}",
        f"{'mean of means (paper)':<22}{before['loss_per_sample']:>10.4f}{after['loss_per_sample']:>12.4f}",
        f"best {result['best_loss']:.4f} at step {result['best_step']}; {result['steps']} steps in"
        f" {times['training_seconds']:.1f} s; trained {trained:.1f} MiB, optimizer {optimizer:.1f} MiB",
        f"run: {out}",
    ]
    return "\n".join(lines)
