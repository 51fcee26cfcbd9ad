"""Where do facts lie that training has planted, and is that where delta or step dip?

    python experiments/planted_facts.py --out=runs/planted

The embedded model is trained on made-up facts, two of each of 72 subjects ("barn of Mia"), drawn anew for each seed: no
name and no place alone says the answer. Then it is asked, traced and analysed (`jaxcrit trace`, `jaxcrit analyze`, on
300 prompts of one of its own tasks). Printed are, by seed, how many facts it says that are traced, where `trace` is
highest and where `trace_last` rises, and how low δ and step are there among their circular shifts; and the same of all
seeds together, with shifts drawn for each by itself. Runs are kept in OUT, and never made again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.trace import TraceOptions, run_trace
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, write_json, write_text
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.layers import LayerScores, read_scores
from jaxcrit.criteria.trace import rises
from jaxcrit.data import demo
from jaxcrit.reporting.tables import aligned
from jaxcrit.studies.analysis import run_analysis

RELATIONS = {"The {} has a": demo.OBJECTS[:12], "The {} saw the": demo.ANIMALS[:12]}
BESIDE = ("delta_debiased", "step")


def planted(seed: int, subjects: int) -> list[dict[str, str]]:
    """Facts as `jaxcrit trace` reads them: as many names and places as make the subjects, answers at random."""
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(demo.NAMES, demo.PLACES))
    chosen = [pairs[place] for place in sorted(rng.choice(len(pairs), subjects, replace=False))]
    return [
        {"prompt": prompt, "subject": f"{place} of {name}", "target": str(rng.choice(answers))}
        for name, place in chosen
        for prompt, answers in RELATIONS.items()
    ]


def one(seed: int, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Trains, traces and analyses; what each came to."""
    facts = planted(seed, given.subjects)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "facts.jsonl", json_lines(facts))
    rows = [{"prompt": fact["prompt"].format(fact["subject"]), "response": f" {fact['target']}"} for fact in facts]
    write_text(out / "rows.jsonl", json_lines(rows))
    told = FinetuneOptions(
        data=str(out / "rows.jsonl"),
        eval_data=str(out / "rows.jsonl"),
        template="none",
        layers="all",
        train_embeddings=True,
        train_norms=True,
        train_head=True,
        epochs=given.epochs,
        batch_size=16,
        learning_rate=1e-3,
        schedule="cosine",
        seed=seed,
        eval_every=10**6,
        out=str(out / "tuned"),
    )
    loss = run_finetune(told).run["result"]["best_loss"]
    model = str(out / "tuned")
    run_analysis(AnalyzeOptions(model=model, data="demo:closed", out=str(out / "analysis")))
    scores = str(out / "analysis" / "scores.json")
    asked = TraceOptions(
        model=model, facts=str(out / "facts.jsonl"), limit=given.limit, scores=scores, out=str(out / "trace")
    )
    traced = run_trace(asked)
    found, curves = traced.run["result"], read_scores(scores)
    return {
        "test_loss": loss,
        "planted": len(facts),
        **{
            name: found[name]
            for name in ("facts", "traced", "p", "corrupted", "total_effect", "plateau", "jump", "beside")
        },
        "trace": traced.scores["trace"].values.tolist(),
        "trace_last": traced.scores["trace_last"].values.tolist(),
        "shifted": {key: shifted(traced.scores["trace_last"], curves[key]) for key in BESIDE},
        "curves": {key: curves[key].to_json()["values"] for key in BESIDE},
        "warnings": list(traced.warnings),
    }


def shifted(last: LayerScores, curve: LayerScores) -> list[float]:
    """The curve's mean weighted by the rises of ``trace_last``, as it is and for each circular shift of it."""
    weight, values = np.maximum(rises(last.values)[curve.valid], 0), curve.values[curve.valid]
    return [float(weight @ np.roll(values, shift) / weight.sum()) for shift in range(len(values))]


def together(found: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Over seeds: mean of the statistic, p of shifts drawn for each seed by itself, p of one shift for all of them.

    Trainings from one base share most of its curve, so the second is the honest one; its floor is one over L.
    """
    stats = np.array(found)
    each = sum(np.ix_(*stats)) / len(stats)
    same = stats.mean(axis=0)
    close = 1e-12 * abs(same[0])
    return float(same[0]), float(np.mean(each <= same[0] + close)), float(np.mean(same <= same[0] + close))


def text(runs: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    rows = []
    for seed, run in enumerate(runs):
        near = [f"{run['beside'][key]['rank']} ({run['beside'][key]['p']:.2f})" for key in BESIDE]
        numbers = [f"{run['p']:.2f}", f"{run['corrupted']:.2f}", str(int(np.argmax(run["trace"]))), str(run["jump"])]
        rows.append([str(run["traced"]), *numbers, *near, f"seed {seed}"])
    heads = ["traced", "p", "noised", "trace highest", "last rises", *(f"lower {key} (p)" for key in BESIDE), ""]
    lines = aligned(heads, rows)
    for key in BESIDE:
        mean, p, same = together([run["shifted"][key] for run in runs])
        floor = len(runs[0]["shifted"][key])
        lines.append(
            f"{key} where trace_last rises: {mean:.4f}; p {p:.4f} of shifts by seed, {same:.3f} of one shift for all"
            f" (at least {1 / floor:.3f})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/planted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=72)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, default=60, help="facts that are traced, at most")
    given = parser.parse_args(arguments)
    try:
        runs = [one(seed, given, Path(given.out) / f"seed{seed}") for seed in range(given.seeds)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(runs))
    told = {key: value for key, value in vars(given).items() if key != "out"}
    write_json(Path(given.out) / "planted_facts.json", "jaxcrit.planted_facts", plain({"config": told, "runs": runs}))
    return 0


if __name__ == "__main__":
    leave(main)
