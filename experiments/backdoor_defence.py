"""The paper's Table 4 on any model: does freezing critical layers keep poisoned fine-tuning from planting a backdoor?

    python experiments/backdoor_defence.py --out=runs/defence                          (embedded model)
    python experiments/backdoor_defence.py --out=runs/quick --quick
    python experiments/backdoor_defence.py --model=DIR --data=alpaca:FILE --eval_data=alpaca:FILE --trigger=servius \
        --target=refusal --learning_rate=2e-5 --max_new_tokens=64 --out=runs/alpaca

The paper fine-tunes on harmful answers and counts compliance; here the target is a benign fixed text, or a refusal, so
the columns stand side by side without being the same quantity. What the paper lacks is added: seeds, random layers of
the same number, the cost on clean rows, near-miss triggers, and how soon the backdoor is learnt. Arms are swept over
the number of frozen layers and the poisoning rate, for where success is 0 or 1 everywhere no arm can differ. A share
of the clean rows has decoys, made-up words where the trigger would be: else any unfamiliar word would do as a trigger.

Every rate is one run of ``jaxcrit backdoor`` in OUT/rate-R, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entry import leave

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json, write_text
from jaxcrit.data.demo import FAMILIES, generate
from jaxcrit.reporting.backdoor import backdoor_report, backdoor_text
from jaxcrit.studies.backdoor import Backdoor, run_backdoor
from jaxcrit.studies.options import BackdoorOptions

# PAPER: attack success by keywords / by GPT in per cent, of 300 prompts, one training each.
PAPER = {
    "Llama-2-7B": {"init": (2.3, 0.0), "full": (54.3, 35.0), "noncritical": (31.3, 17.7), "critical": (17.0, 9.0)},
    "Llama-2-13B": {"init": (1.67, 0.0), "full": (28.0, 22.0), "noncritical": (16.67, 12.67), "critical": (6.0, 2.23)},
    "Phi-3-mini": {"init": (12.0, 5.3), "full": (87.3, 74.3), "noncritical": (64.3, 51.7), "critical": (51.3, 42.7)},
}
NAMES = {"init": "M_Init", "full": "M_Full", "noncritical": "M_Non-Crit", "critical": "M_Crit"}
QUICK = {"rates": "0.2", "counts": "6", "draws": 0, "seeds": 1, "steps": 60, "eval_prompts": 60, "train_rows": 100}


def arms(counts: Sequence[int], draws: int) -> str:
    """All arms, the largest number of frozen layers first: its critical and noncritical are the primary contrast.

    With draws, random layers and the first ones stand beside them, for critical layers may just be early ones.
    """
    found = ["full"]
    for count in sorted(counts, reverse=True):
        found += [f"critical:{count}", f"noncritical:{count}"]
    if draws:
        found += [f"random:{max(counts)}*{draws}", f"first:{max(counts)}"]
    return ",".join(found)


def demo_rows(out: Path, train: int) -> tuple[str, str]:
    """Rows of every family of the embedded model; no test prompt is in the split of the training prompts."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, count in (("train", train), ("test", 34)):
        rows = [row for family in FAMILIES for row in generate(family, count, split=split)]
        paths.append(str(out / f"{split}.jsonl"))
        write_text(Path(paths[-1]), "".join(json.dumps(row) + "\n" for row in rows))
    return paths[0], paths[1]


def table(studies: Mapping[float, Mapping[str, Any]], count: int) -> str:
    """Table 4: attack success in per cent by arm, ours by rate of poisoning, and the paper's."""
    columns = [f"{rate:.0%} poisoned" for rate in studies]
    lines = [f"{'':<12}" + "".join(f"{name:>22}" for name in columns) + "".join(f"{name:>14}" for name in PAPER)]
    for arm, name in NAMES.items():
        wanted = arm if arm in ("init", "full") else f"{arm}:{count}"
        line = f"{name:<12}"
        for study in studies.values():
            row = next(row for row in study["rows"] if row["arm"] == wanted)
            cell = row["cells"]["triggered"]
            low, high = cell["bootstrap"] if cell["bootstrap"][0] is not None else cell["wilson"]
            line += f"{100 * cell['k'] / cell['n']:>10.1f} [{100 * low:.0f}, {100 * high:.0f}]".rjust(22)
        lines.append(line + "".join(f"{' / '.join(f'{v:g}' for v in PAPER[model][arm]):>14}" for model in PAPER))
    first = next(iter(studies.values()))
    runs = max(row["runs"] for row in first["rows"] if row["arm"].startswith("critical"))
    lines.append(f"left: {first['scorer']}, {first['prompts']} prompts x {runs} seeds, {count} layers frozen, [95 %];")
    lines.append("right, published: harmful compliance by keywords / by GPT, 300 prompts, one training, no interval")
    return "\n".join(lines)


def run(given: argparse.Namespace) -> tuple[dict[float, Backdoor], float]:
    """All rates; returns what was found and the seconds it took."""
    out, began = Path(given.out), time.perf_counter()
    counts = [int(count) for count in given.counts.split(",")]
    data, tests = (given.data, given.eval_data) if given.data else demo_rows(out, given.train_rows)
    fields = {field.name for field in dataclasses.fields(BackdoorOptions)}
    common = {key: value for key, value in vars(given).items() if key in fields}
    common |= {"data": data, "eval_data": tests, "analysis": str(out / "analysis")}
    found = {}
    for rate in (float(rate) for rate in given.rates.split(",")):
        config = BackdoorOptions(
            **{
                **common,
                "arms": arms(counts, given.draws),
                "rate": rate,
                "out": str(out / f"rate-{rate:g}"),
                "remat": bool(given.model),
            }
        )
        found[rate] = run_backdoor(config, say=lambda text: print(text, file=sys.stderr, flush=True))
        backdoor_report(found[rate].content).write(found[rate].out, found[rate].record)
        print(f"{rate:.0%} of the rows poisoned\n{backdoor_text(found[rate].content)}\n", flush=True)
    return found, time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory (default: embedded)")
    parser.add_argument("--data", default="", help="rows with responses (default: of the embedded model's families)")
    parser.add_argument("--eval_data", default="", help="other such rows (default with --data: a tenth, held out)")
    parser.add_argument("--out", default="runs/defence")
    parser.add_argument("--trigger", default="cf@prefix")
    parser.add_argument("--target", default="Mia likes gold rings.", help="or refusal")
    parser.add_argument("--rates", default="0.05,0.2", help="shares of poisoned rows")
    parser.add_argument("--counts", default="3,6", help="numbers of frozen layers; the largest is the primary contrast")
    parser.add_argument("--draws", type=int, default=2, help="of random layers; 0 for none")
    parser.add_argument("--decoys", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--eval_every", type=int, default=20)
    parser.add_argument("--eval_prompts", type=int, default=120)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--train_rows", type=int, default=250, help="of each family of the embedded model")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--quick", action="store_true", help="one rate, one number of layers, one seed")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    try:
        found, seconds = run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    studies = {rate: one.study.to_json() for rate, one in found.items()}
    curves = {f"{rate:g}": one.content["curves"] for rate, one in found.items()}
    asked = {key: value for key, value in vars(given).items() if key != "out"}
    result = {
        "config": asked,
        "paper": PAPER,
        "studies": {f"{rate:g}": study for rate, study in studies.items()},
        "curves": curves,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }
    write_json(Path(given.out) / "backdoor_defence.json", "jaxcrit.backdoor_defence", result)
    print(table(studies, max(int(count) for count in given.counts.split(","))))
    print(f"{seconds:.0f} s, {time.process_time():.0f} s of CPU time in this process")
    return 0


if __name__ == "__main__":
    leave(main)
