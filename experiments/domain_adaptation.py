"""Test-loss curves of training all layers, the critical ones, others, random ones, the first and the last.

    python experiments/domain_adaptation.py --out=runs/adaptation                  (embedded model, its held-out task)
    python experiments/domain_adaptation.py --model=DIR --data=dolly:FILE.jsonl --out=runs/dolly --steps=50

The paper's table (Llama-2-7B-chat, Dolly and OpenBookQA) has full training, critical and noncritical layers. Random
layers, and the first and last, say whether it matters *which* layers train, or only how many. Every arm is a
fine-tuning run in OUT/<arm>-<seed>, so an interrupted experiment goes on where it stopped. Prints, and writes to
OUT/adaptation.json, the share of full training's loss reduction that each arm reaches in the same steps, with 95 %
intervals over seeds (of the order of rows, and for ``random`` of the layers too).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave
from scipy import stats

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.selections import default_count
from jaxcrit.data.demo import generate
from jaxcrit.models.model import open_model
from jaxcrit.reporting.finetuned import evaluations
from jaxcrit.reporting.plots import loss_curves
from jaxcrit.reporting.report import Figure, on_axes

# PAPER: Llama-2-7B-chat, read off the figures; shares of full training's drop at the last step.
PAPER = {"critical": {"dolly": 0.96, "openbookqa": 0.94}, "noncritical": {"dolly": 0.87, "openbookqa": 0.80}}
ARMS = ("full", "critical", "noncritical", "random", "first", "last")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        arm: of `ARMS`.
        seed: of the order of rows.
        layers: that trained.
        points: (step, test loss per token).
        paper_points: (step, mean of per-sample means).
    """

    arm: str
    seed: int
    layers: list[int]
    points: list[tuple[int, float]]
    paper_points: list[tuple[int, float]]


def configs(arguments: argparse.Namespace, data: str, count: int) -> dict[tuple[str, int], FinetuneOptions]:
    """The runs: every arm with every seed, ``random`` with five at least."""
    out = Path(arguments.out)
    common = FinetuneOptions(
        model=arguments.model,
        data=data,
        analysis=str(out / "analysis"),
        steps=arguments.steps,
        epochs=0,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        checkpoint_every=arguments.steps,
        eval_every=max(1, arguments.steps // 10),
        mesh=arguments.mesh,
        truncate=arguments.truncate,
        max_length=arguments.max_length,
    )
    runs = {}
    for arm in ARMS:
        for seed in range(max(arguments.seeds, 5) if arm == "random" else arguments.seeds):
            spec = {"full": "all", "random": f"random:{count}:{seed}"}.get(arm, f"{arm}:{count}")
            outside = True if arm == "full" else None
            runs[arm, seed] = dataclasses.replace(
                common,
                layers=spec,
                seed=seed,
                out=str(out / f"{arm}-{seed}"),
                train_embeddings=outside,
                train_norms=outside,
                train_head=outside,
            )
    return runs


def held_out_task(out: Path, rows: int) -> str:
    """Rows of the family that the embedded model has never seen."""
    path = out / "order.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in generate("order", rows)))
    return str(path)


def curve(arm: str, seed: int, config: FinetuneOptions) -> Curve:
    """Trains, or reads what an earlier call trained."""
    finetuned = run_finetune(config)
    tests = evaluations(finetuned.metrics)
    return Curve(
        arm,
        seed,
        finetuned.run["trained"]["layers"],
        [(row["step"], row["loss"]) for row in tests],
        [(row["step"], row["loss_per_sample"]) for row in tests],
    )


def shares(curves: Sequence[Curve], arm: str, points: str = "points") -> np.ndarray:
    """By seed, the arm's loss reduction over that of full training with the same seed (or, lacking it, the mean)."""
    drops = {(one.arm, one.seed): getattr(one, points)[0][1] - getattr(one, points)[-1][1] for one in curves}
    full = {seed: drop for (name, seed), drop in drops.items() if name == "full"}
    mean = float(np.mean(list(full.values())))
    return np.array([drop / full.get(seed, mean) for (name, seed), drop in drops.items() if name == arm])


def interval(values: np.ndarray) -> float:
    """Half of Student's 95 % interval of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def table(curves: Sequence[Curve], warnings: Sequence[str] = ()) -> str:
    """The table, at most 100 columns wide."""
    head = (
        f"{'arm':<12}{'layers':<22}{'runs':>5}{'loss at end':>13}{'share of full drop':>24}{'paper: Dolly, OBQA':>21}"
    )
    lines = [*warnings, head]
    for arm in ARMS:
        mine = [one for one in curves if one.arm == arm]
        if not mine:
            continue
        found = shares(curves, arm)
        layers = "drawn anew" if arm == "random" else ",".join(map(str, mine[0].layers))
        layers = layers if len(layers) <= 20 else f"{len(mine[0].layers)} layers"
        ends = np.mean([one.points[-1][1] for one in mine])
        half = interval(found)
        shown = f"{found.mean():.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
        paper = ", ".join(f"{value:.2f}" for value in PAPER.get(arm, {}).values())
        lines.append(f"{arm:<12}{layers:<22}{len(mine):>5}{ends:>13.4f}{shown:>24}{paper:>21}")
    start = np.mean([one.points[0][1] for one in curves])
    lines.append(f"test loss before training {start:.4f} (nats per response token); ± is Student's 95 % over seeds")
    return "\n".join(lines)


def mean_curves(curves: Sequence[Curve]) -> dict[str, list[tuple[int, float]]]:
    """By arm, the mean over seeds."""
    means = {}
    for arm in ARMS:
        mine = [one.points for one in curves if one.arm == arm]
        if mine:
            means[arm] = [
                (points[0][0], float(np.mean([loss for _, loss in points]))) for points in zip(*mine, strict=True)
            ]
    return means


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory (default: embedded)")
    parser.add_argument("--data", default="", help="rows with responses (default: the embedded model's held-out task)")
    parser.add_argument("--out", default="runs/adaptation")
    parser.add_argument("--count", type=int, default=0, help="layers of each arm (default: 15 %%)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2000, help="of the held-out task")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mesh", default="")
    parser.add_argument("--truncate", default="")
    parser.add_argument("--max_length", type=int, default=0)
    given = parser.parse_args(arguments)
    out = Path(given.out)
    try:
        count = given.count or default_count(open_model(given.model).config.num_layers)
        runs = configs(given, given.data or held_out_task(out, given.rows), count)
        curves: list[Curve] = []
        for (arm, seed), config in runs.items():
            curves.append(curve(arm, seed, config))
            one = curves[-1]
            print(f"{arm}-{seed}: {one.points[0][1]:.4f} to {one.points[-1][1]:.4f}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "config": vars(given),
        "count": count,
        "paper": PAPER,
        "curves": [dataclasses.asdict(one) for one in curves],
        "shares": {arm: shares(curves, arm).tolist() for arm in ARMS},
        "shares_mean_of_means": {arm: shares(curves, arm, "paper_points").tolist() for arm in ARMS},
    }
    write_json(out / "adaptation.json", "jaxcrit.adaptation", result)
    Figure("adaptation.png", on_axes(loss_curves, mean_curves(curves)), "Test loss of every arm.").write(out)
    print(table(curves))
    return 0


if __name__ == "__main__":
    leave(main)
