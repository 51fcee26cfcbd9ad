"""What ``jaxcrit finetune`` shows: whether test loss fell, at which steps, what it took, and how far layers moved."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcrit.core.selections import span
from jaxcrit.reporting.plots import TRAINING, drift_panels, loss_curves
from jaxcrit.reporting.report import Figure, Report, Section, on_axes
from jaxcrit.reporting.tables import aligned

if TYPE_CHECKING:
    from jaxcrit.core.layers import LayerSet

Row = Mapping[str, Any]
CAVEATS = (
    "Test loss is of rows that were held out: of rows like those that were trained on. What happens to other tasks it"
    " does not say.",
    "One training is one order of rows and one start of what is new: another --seed would say how much of a difference"
    " between two runs is chance.",
    "Per token every response token counts the same; the mean of means is over rows of the mean over a row's tokens.",
)
_FEW = 20  # held-out rows, below which a change of test loss is told with a warning


def evaluations(metrics: Iterable[Row]) -> list[Row]:
    """The tests among the rows of ``metrics.jsonl``."""
    return [row for row in metrics if row["kind"] == "eval"]


def finetune_report(
    run: Mapping[str, Any], metrics: Sequence[Row], chosen: LayerSet, warnings: Sequence[str] = ()
) -> Report:
    """Test loss before and after, over steps, and drift where it was measured.

    Args:
        run: content of ``run.json``, with ``time``.
        metrics: rows of ``metrics.jsonl``.
        chosen: layers named by ``--layers``; with ``--reselect`` the first of them.
        warnings: what the user should know.
    """
    tests, rows = evaluations(metrics), _held_out(run)
    only = f"only {_counted(rows, 'held-out row')}: such a change of test loss may be chance"
    few = [only] if 0 < rows < _FEW else []
    columns = _columns(tests, run)
    section = Section("Test loss", "", _over_steps(tests, columns), _figures(metrics), "\n".join(_ends(tests, columns)))
    return Report(_headline(tests, run, chosen, rows), [*warnings, *few], [section], CAVEATS, [_spent(run, metrics)])


def _held_out(run: Mapping[str, Any]) -> int:
    return run["data"].get("eval", {}).get("num_samples", 0)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _headline(tests: Sequence[Row], run: Mapping[str, Any], chosen: LayerSet, rows: int) -> list[str]:
    before, after, best = tests[0], tests[-1], run["result"]
    ends = f"from {before['loss']:.4f} to {after['loss']:.4f} nats a token"
    freezes, trained = run["config"]["mode"] == "freeze", run["trained"]["layers"]  # of --reselect all that ever did
    layers = f"layers {span(chosen.layers if freezes else trained)} of {chosen.num_layers}"
    held = _counted(rows, "held-out row") if rows else "the held-out rows"
    what = f"{held}, in {_counted(after['step'], 'step')} {f'with {layers} frozen' if freezes else f'of {layers}'}"
    if not after["loss"] < before["loss"]:
        return [f"Test loss did not fall: {ends} on {what}. A lower --learning_rate or other rows may do better."]
    told = [f"Test loss fell {ends} on {what}."]
    if best["best_loss"] < after["loss"]:
        told.append(
            f"It was lowest, {best['best_loss']:.4f}, at step {best['best_step']} and has risen since; the run holds"
            f" step {after['step']}. Fewer --steps would end there, --patience ends soon after."
        )
    return told


def _columns(tests: Sequence[Row], run: Mapping[str, Any]) -> dict[str, str]:
    """What a test tells, by its key in ``metrics.jsonl``."""
    names = {"loss": "per token", "loss_per_sample": "mean of means (paper)"}
    beside = {f"aux_{number}": one["name"] for number, one in enumerate(run.get("auxiliaries", []))}
    return names | {key: f"aux {key[4:]}: {name}" for key, name in beside.items() if tests[0].get(key) is not None}


def _ends(tests: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    before, after = tests[0], tests[-1]
    lines = [f"{'test loss':<22}{'step 0':>10}{'step ' + str(after['step']):>12}"]
    for key, name in columns.items():
        lines.append(f"{name:<22}{before[key]:>10.4f}{after[key]:>12.4f}")
    return lines


def _over_steps(tests: Sequence[Row], columns: Mapping[str, str]) -> str:
    body = [[str(row["step"]), *(f"{row[key]:.4f}" for key in columns), ""] for row in tests]
    return "\n".join(aligned(["step", *columns.values(), ""], body))


def _figures(metrics: Sequence[Row]) -> list[Figure]:
    tests = [(row["step"], row["loss"]) for row in evaluations(metrics)]
    losses = [(row["step"], row["loss"]) for row in metrics if row["kind"] == "train"]
    figures = [Figure("loss.png", on_axes(loss_curves, {"test loss": tests, TRAINING: losses}), "Loss over steps.")]
    if moved := [row for row in metrics if row["kind"] == "drift"]:
        states = any(row["cka"] is not None for row in moved)
        caption = f"How far each layer is from the base: its weights{', and its states on held-out rows' * states}."
        size = (6.2, 5.4 if states else 3.2)
        figures.append(Figure("drift.png", functools.partial(drift_panels, moved), caption, size))
    return figures


def _spent(run: Mapping[str, Any], metrics: Sequence[Row]) -> str:
    """How many steps took how long, in this launch and with those before it; memory of what was trained."""
    times, result = run["time"], run["result"]
    seconds, steps = times["training_seconds"], result["steps"]
    trained, optimizer = (result[f"{name}_bytes"] / 2**20 for name in ("trained", "optimizer"))
    sizes = f"trained {trained:.1f} MiB, optimizer {optimizer:.1f} MiB"
    if not (before := times.get("resumed", 0)):
        return f"{steps} steps in {seconds:.1f} s; {sizes}."
    earlier = sum(row.get("seconds", 0.0) for row in metrics if row["step"] <= before)
    return (
        f"{steps} steps in {earlier + seconds:.1f} s, of which this launch, from step {before} on, ran"
        f" {steps - before} in {seconds:.1f} s; {sizes}."
    )
