"""Whether a trace finds the layers in which facts were planted: the embedded model, trained on facts in chosen layers.

    python experiments/planted_facts.py --out=runs/planted

Names are each given a thing at random, which no model can know before. Of every group of layers one model is trained on
these facts in that group alone, and one in all layers, as a control: whatever a trace of the latter shows, nothing was
planted in one place. Printed are, by group: facts known, where each score is highest, where ``trace`` has fallen to
half, where ``trace_last`` rises most, and whether that is in the group. Runs go to ``--out`` and are read back.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.trace import TraceOptions, run_trace
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.data.demo import NAMES, OBJECTS
from jaxcrit.reporting.tables import table

PROMPT = "The friend of {} likes the"
SHOWN = ("trace", "trace_mlp", "trace_attn", "trace_recall")


def planted(out: Path, seed: int) -> tuple[str, str]:
    """Files of the facts, as facts and as rows to train on."""
    rng = np.random.default_rng(seed)
    pairs = [(name, str(rng.choice(OBJECTS))) for name in NAMES]
    facts = [{"prompt": PROMPT, "subject": name, "target": thing} for name, thing in pairs]
    rows = [{"prompt": PROMPT.replace("{}", name), "response": f" {thing}"} for name, thing in pairs]
    out.mkdir(parents=True, exist_ok=True)
    for file, made in (("facts", facts), ("rows", rows)):
        write_text(out / f"{file}.jsonl", json_lines(made))
    return str(out / "facts.jsonl"), str(out / "rows.jsonl")


def traced(out: Path, layers: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Plants the facts in the layers, traces them, and says where each score is highest."""
    facts, rows = planted(out / f"facts-{seed}", seed)
    tuned, folder = out / f"tuned-{layers}-{seed}", out / f"trace-{layers}-{seed}"
    training = {"data": rows, "eval_data": rows, "template": "none", "learning_rate": given.learning_rate}
    steps = {"steps": given.steps, "eval_every": given.steps, "batch_size": 32, "seed": seed}
    run_finetune(FinetuneOptions(layers=layers, out=str(tuned), **training, **steps))
    found = run_trace(TraceOptions(model=str(tuned), facts=facts, samples=given.samples, out=str(folder)))
    curve, result = found.scores["trace"].values, found.run["result"]
    row = {
        name: int(np.nanargmax(np.where(found.scores[name].valid, found.scores[name].values, np.nan))) for name in SHOWN
    }
    fallen = int(np.argmax(curve < curve.max() / 2)) if (curve < curve.max() / 2).any() else len(curve)
    return {
        "layers": layers,
        "seed": seed,
        "known": result["traced"],
        "of": result["facts"],
        **row,
        "half": fallen,
        "jump": result["jump"],
        "effect": result["total_effect"],
    }


def main(arguments: list[str]) -> None:
    """Plants, traces, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of all runs")
    parser.add_argument(
        "--groups", default="2-3,6-7,10-11,13-14,0-15", help="groups of layers; the last is the control"
    )
    parser.add_argument("--seeds", type=int, default=3, help="draws of the facts")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="its learning rate")
    parser.add_argument("--samples", type=int, default=4, help="draws of the noise")
    given = parser.parse_args(arguments)
    rows = []
    for layers in given.groups.split(","):
        for seed in range(given.seeds):
            rows.append(traced(given.out, layers, seed, given))
            print(json.dumps(rows[-1]), flush=True)
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print(table(list(rows[0]), cells))
    for name in ("jump", *SHOWN, "half"):
        inside: dict[str, list[bool]] = {}
        for row in rows:
            first, last = map(int, row["layers"].split("-"))
            inside.setdefault(row["layers"], []).append(first <= row[name] <= last)
        print(
            f"{name} in the group: " + ", ".join(f"{group} {sum(hit)} of {len(hit)}" for group, hit in inside.items())
        )
    write_json(given.out / "planted_facts.json", "jaxcrit.planted_facts", plain({"rows": rows}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"planted_facts: error: {error}")
