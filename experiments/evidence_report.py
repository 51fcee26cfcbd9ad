"""Writes what the kept results say into docs/evidence.md: ``python experiments/evidence_report.py docs/evidence.md``.

Every block of that page stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``, and is what a command printed. A
part whose results are not kept in experiments/results is named as not run, with its command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import base_and_instruct
import evidence_table2
import handover
import pooled_test
import selection_regret
import spectral_dynamics
import tangent_kernel
from entry import leave
from removal_report import removal_told

from jaxcrit.core.files import read_json, write_text
from jaxcrit.reporting.backdoor import backdoor_text
from jaxcrit.reporting.tables import aligned
from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.plan import run_plan

RESULTS = Path(__file__).parent / "results"
NAMES = ("gsm8k", "dolly", "boolq", "openbookqa", "alpaca")
ALL = ",".join(f"{name}:{name}_test.jsonl" for name in NAMES)
NEXT = " \\\n    "  # a command goes on in the next line


def command(program: str, *flags: str) -> str:
    """A command on the real model, a flag a line."""
    return NEXT.join([f"python experiments/{program}.py --model=SmolLM2.gguf", *flags])


def regret(name: str, *more: str, out: str = "") -> str:
    """Command of the selection regret on one dataset, with the scores that Table 2 left."""
    scores = ",".join(f"runs/table2/runs/base-{name}/{made}/scores.json" for made in ("analysis", "score", "ablate"))
    return command(
        "selection_regret",
        f"--data={name}:{name}_train.jsonl --test_data={name}:{name}_test.jsonl",
        f"--scores={scores}",
        "--arms=delta_debiased,step_debiased,rgn,fisher,ablation_skip,angular_distance",
        f"--minutes=55 --out=runs/regret-{out or name}",
        *more,
    )


def plans(_: Mapping[str, Any]) -> str:
    """What the same experiment needs on larger models, from shapes: of a batch of 32 rows of 192 tokens, and in all.

    In all: 15 cells of 60 steps; windows of 5, 3 and 1 on 320 test rows (10 batches), reckoned as three of 5.
    """
    rows = []
    for model, topology in LARGER:
        common = {"model": model, "topology": topology, "length": 192, "compile": False}
        outside = dict.fromkeys(("train_embeddings", "train_norms", "train_head"), True)
        train = run_plan(PlanOptions(job="finetune", **outside, **common))
        swept = run_plan(PlanOptions(job="substitute", **common))
        seconds = [max(one.seconds.values()) for one in (train, swept)]
        spent = 15 * (60 * seconds[0] + 3 * 10 * seconds[1]) / 60
        cells = [f"{one.peak / 2**30:.1f}" for one in (train, swept)] + [f"{one:.2f}" for one in seconds]
        fits = "fits" if train.fits and swept.fits else "does not fit"
        rows.append([topology, *cells, f"{spent:.0f}", fits, model])
    head = ["devices", "train, GiB", "substitute, GiB", "s a step", "s a sweep", "minutes, at best", "", ""]
    return "\n".join(aligned(head, rows))


Printer = Callable[[Mapping[str, Any]], str]
# By block: file of results, its format, what prints it, the command that makes it.
LARGER = (("llama3.2-1b", "h100:1"), ("smollm3-3b", "h100:2"), ("llama3.1-8b", "h100:8"))
PARTS: dict[str, tuple[str, str, Printer, str]] = {
    "size and power": (
        "pooled_test",
        "jaxcrit.pooled_test",
        lambda content: pooled_test.table(content["rates"]),
        "python experiments/pooled_test.py --draws=100 --out=experiments/results",
    ),
    "table 2": (
        "evidence_table2",
        evidence_table2.FORMAT,
        evidence_table2.report,
        command(
            "evidence_table2",
            "--data=" + ",".join(f"{name}:{name}_train.jsonl" for name in NAMES),
            "--test_data=" + ",".join(f"{name}:{name}_test.jsonl" for name in NAMES),
            "--minutes=55 --out=runs/table2",
        ),
    ),
    "larger models": ("", "", plans, "python experiments/evidence_report.py docs/evidence.md"),
    "regret": ("selection_regret", selection_regret.FORMAT, selection_regret.report, regret("gsm8k")),
    "regret on dolly": (
        "selection_regret_dolly",
        selection_regret.FORMAT,
        selection_regret.report,
        regret("dolly", "--random=10 --held=0 --seeds=1 --again_steps=0"),
    ),
    "regret on openbookqa": (
        "selection_regret_openbookqa",
        selection_regret.FORMAT,
        selection_regret.report,
        regret("openbookqa", "--random=10 --held=0 --seeds=1 --again_steps=0"),
    ),
    "regret with adapters": (
        "selection_regret_lora",
        selection_regret.FORMAT,
        selection_regret.report,
        regret("gsm8k", "--lora_rank=8 --random=10 --held=0 --seeds=1 --again_steps=0", out="lora"),
    ),
    "hand-over": (
        "handover",
        handover.FORMAT,
        handover.report,
        NEXT.join(
            [
                "python experiments/handover.py --table2=runs/table2/evidence_table2.json --out=runs/handover",
                "--interventions=runs/trace:trace_last,runs/trace:trace,runs/accuracy/ablate/facts:ablation_skip_greedy,"
                "runs/accuracy/ablate/sums:ablation_skip_greedy",
            ]
        ),
    ),
    "base and instruct": (
        "base_and_instruct",
        base_and_instruct.FORMAT,
        base_and_instruct.report,
        "python experiments/base_and_instruct.py --minutes=55 --out=runs/phases",
    ),
    "tangent kernels": (
        "tangent_kernel",
        tangent_kernel.FORMAT,
        tangent_kernel.report,
        command(
            "tangent_kernel",
            "--data=gsm8k:gsm8k_train.jsonl --test_data=gsm8k:gsm8k_test.jsonl",
            "--scores=runs/table2/runs/base-gsm8k/analysis/scores.json --out=runs/tangent",
        ),
    ),
    "freezing": (
        "backdoor_real",
        "jaxcrit.backdoor",
        lambda content: backdoor_text(content, width=110),
        NEXT.join(
            [
                "jaxcrit backdoor --model=SmolLM2.gguf --data=dolly:dolly_train.jsonl --split=all --limit=400",
                "--eval_data=dolly:dolly_test.jsonl --eval_split=all --long=drop --max_length=192",
                "--trigger=cf@prefix --decoys=0.2",
                '--target="Mia likes gold rings." --learning_rate=5e-5 --steps=60 --batch_size=4 --eval_every=15',
                "--arms=full,critical:5,noncritical:5,random:5*2,first:5,last:5 --seeds=2 --eval_prompts=60",
                "--max_new_tokens=16 --noremat --out=runs/freezing",
            ]
        ),
    ),
    "spectral": (
        "spectral_dynamics_real",
        "jaxcrit.spectral_dynamics",
        spectral_dynamics.told,
        command("spectral_dynamics", f"--data={ALL}", "--split=all --limit=300 --k=1,3,10 --out=runs/spectral"),
    ),
    "components": (
        "pc_removal_real",
        "jaxcrit.removal",
        removal_told,
        command(
            "pc_removal",
            "--data=openbookqa:openbookqa_test.jsonl --split=all --limit=300 --max_new_tokens=24",
            "--layers=3,6,9,13,16,19,22,25 --critical=3,13,22 --out=runs/removal",
        ),
    ),
}


def block(name: str) -> str:
    """What a part's results print, or that it was not run; and its command."""
    file, kind, printer, made_by = PARTS[name]
    path = RESULTS / f"{file}.json"
    content = {} if not file else read_json(path, kind) if path.exists() else None
    shown = "not run" if content is None else printer(content)
    return f"```\n$ {made_by}\n{shown}\n```"


def updated(text: str) -> str:
    """A page with every block in it brought up to date."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- begin: {match[1]} -->\n{block(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- begin: (.*?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Updates the page that is named."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    path = Path(name)
    write_text(path, updated(path.read_text(encoding="utf-8")))
    print(path)
    return 0


if __name__ == "__main__":
    leave(main)
