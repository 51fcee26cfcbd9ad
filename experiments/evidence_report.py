"""Writes what the kept results say into docs/evidence.md: ``python experiments/evidence_report.py docs/evidence.md``.

Every block of that page stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``, and is what a command printed. A
part whose results are not kept in experiments/results is named as not run, with its command. ``--keep`` first keeps
there what the commands left in runs/, with the seconds that it took; ``--little=DIR`` first runs the long ones in
little, where the model and the data are, and keeps what that took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
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

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, write_json, write_text
from jaxcrit.reporting.backdoor import backdoor_text
from jaxcrit.reporting.tables import aligned
from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.plan import run_plan

HOME = Path(__file__).parent
RESULTS = HOME / "results"
LITTLE = "jaxcrit.evidence_little"
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
        "--steps=24 --again_steps=120 --again_sets=4 --length=80 --tests=24",
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


def minutes_table(_: Mapping[str, Any]) -> str:
    """Minutes of every part on two cores, expected before the first run and spent, the most memory, and in little."""
    rows, sums = [], [0.0, 0.0, 0.0]
    made = RESULTS / "evidence_little.json"
    little = read_json(made, LITTLE)["spent"] if made.exists() else {}
    for name, part in PARTS.items():
        if not part.minutes:
            continue
        content = part.content()
        seconds = None if content is None else _seconds(content)
        spent = None if seconds is None else seconds / 60
        peak = (content or {}).get("time", {}).get("peak_gib")
        short = little[name]["seconds"] / 60 if name in little else None
        cells = ["-" if spent is None else f"{spent:.0f}", f"{peak:.1f}" if peak else "-"]
        cells += ["" if short is None else f"{short:.1f}", f"{name}, {part.little}" if part.little else name]
        rows.append([f"{part.minutes}", *cells])
        sums = [a + b for a, b in zip(sums, [part.minutes, spent or 0, short or 0], strict=True)]
    head = ["expected", "spent", "GiB", "in little", ""]
    return "\n".join(aligned(head, [*rows, [f"{sums[0]:.0f}", f"{sums[1]:.0f}", "", f"{sums[2]:.1f}", "in all"]]))


def _seconds(content: Mapping[str, Any]) -> float | None:
    """What a part took, from its results: the sum of its cells, or of its one run."""
    spent = content.get("time", {}).get("seconds")
    return float(sum(spent.values())) if isinstance(spent, Mapping) else spent


Printer = Callable[[Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of the page.

    Attributes:
        file: name of its results in experiments/results, without .json; empty for none.
        kind: format of its results.
        printer: text of its results.
        made_by: command that makes its results.
        minutes: expected on two cores, before the first run; 0 for what takes none to speak of.
        made: path of its results below runs/, where that command writes; empty where nothing is kept.
        little: flags that in place of its own make of the command the same in little; empty for what is short or alike.
    """

    file: str
    kind: str
    printer: Printer
    made_by: str
    minutes: int = 0
    made: str = ""
    little: str = ""

    def content(self) -> Mapping[str, Any] | None:
        """What was kept; None where nothing was."""
        path = RESULTS / f"{self.file}.json"
        return {} if not self.file else read_json(path, self.kind) if path.exists() else None

    def keep(self, runs: Path) -> bool:
        """Keeps what was made, with what it took, without the directory it was made in; whether there was anything."""
        made = runs / self.made
        if not self.made or not made.exists():
            return False
        content = json.loads(made.read_text(encoding="utf-8").replace(f"{runs.resolve().parent}/", ""))
        record = made.parent / "run.json"
        if "time" not in content and record.exists():
            spent = json.loads(record.read_text(encoding="utf-8"))["time"]
            content["time"] = {key: spent[key] for key in ("seconds", "peak_gib") if key in spent}
        fields = {key: value for key, value in content.items() if key not in ("format", "format_version")}
        write_json(RESULTS / f"{self.file}.json", self.kind, fields)
        return True


def run_in_little(out: Path) -> None:
    """Runs the long parts in little, one after the other, from nothing; keeps seconds and memory (GiB) of each.

    Raises:
        UserError: a command that fails.
    """
    spent = {}
    for name, part in PARTS.items():
        if not part.little:
            continue
        program, *arguments = shlex.split(part.made_by.replace(NEXT, " "))
        added = [*shlex.split(part.little), f"--out={out / name.replace(' ', '-')}"]
        others = {flag.partition("=")[0] for flag in added}
        arguments = [flag for flag in arguments if flag.partition("=")[0] not in others] + added
        start = ["-m", "jaxcrit"] if program == "jaxcrit" else [str(HOME.parent / arguments.pop(0))]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *start, *arguments], stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"{name}, in little: expected exit 0, got {process.returncode}")
        spent[name] = {"seconds": round(time.perf_counter() - began, 3), "peak_gib": round(usage.ru_maxrss / 2**20, 4)}
        write_json(RESULTS / "evidence_little.json", LITTLE, {"spent": spent})


def regret_part(name: str, *more: str, out: str = "", minutes: int, little: str = "") -> Part:
    """The part of one dataset; that of the first has no name of its own."""
    made = f"regret-{out or name}/selection_regret.json"
    file = f"selection_regret_{out or name}" if more else "selection_regret"
    made_by = regret(name, *more, out=out)
    return Part(file, selection_regret.FORMAT, selection_regret.report, made_by, minutes, made, little)


LARGER = (("llama3.2-1b", "h100:1"), ("smollm3-3b", "h100:2"), ("llama3.1-8b", "h100:8"))
HERE = "python experiments/evidence_report.py docs/evidence.md"
FEWER = "--random=10 --held=0 --seeds=1 --again_steps=0"
PARTS: dict[str, Part] = {
    "size and power": Part(
        "pooled_test",
        "jaxcrit.pooled_test",
        lambda content: pooled_test.table(content["rates"]),
        "python experiments/pooled_test.py --draws=100 --out=experiments/results",
    ),
    "table 2": Part(
        "evidence_table2",
        evidence_table2.FORMAT,
        evidence_table2.report,
        command(
            "evidence_table2",
            "--data=" + ",".join(f"{name}:{name}_train.jsonl" for name in NAMES),
            "--test_data=" + ",".join(f"{name}:{name}_test.jsonl" for name in NAMES),
            "--minutes=55 --out=runs/table2",
        ),
        160,
        "table2/evidence_table2.json",
        "--quick --data=gsm8k:gsm8k_train.jsonl --test_data=gsm8k:gsm8k_test.jsonl",
    ),
    "larger models": Part("", "", plans, HERE),
    "regret": regret_part("openbookqa", minutes=75, little="--quick --arms=delta_debiased,rgn"),
    "regret on dolly": regret_part("dolly", FEWER, minutes=22),
    "regret on alpaca": regret_part("alpaca", FEWER, minutes=22),
    "regret with adapters": regret_part("openbookqa", f"--lora_rank=8 {FEWER}", out="lora", minutes=20),
    "hand-over": Part(
        "handover",
        handover.FORMAT,
        handover.report,
        "\n$ ".join(
            [
                "jaxcrit trace --model=SmolLM2.gguf --limit=40 --samples=2 --out=runs/trace",
                "python experiments/layer_accuracy.py --model=SmolLM2.gguf --out=runs/accuracy",
                f"python experiments/handover.py --table2=runs/table2/evidence_table2.json --out=runs/handover{NEXT}"
                "--interventions=runs/trace:trace_last,runs/trace:trace,runs/accuracy/ablate/facts:ablation_skip_greedy,"
                "runs/accuracy/ablate/sums:ablation_skip_greedy",
            ]
        ),
        5,
        "handover/handover.json",
    ),
    "base and instruct": Part(
        "base_and_instruct",
        base_and_instruct.FORMAT,
        base_and_instruct.report,
        "python experiments/base_and_instruct.py --steps=800 --minutes=55 --out=runs/phases",
        35,
        "phases/base_and_instruct.json",
        "--quick",
    ),
    "tangent kernels": Part(
        "tangent_kernel",
        tangent_kernel.FORMAT,
        tangent_kernel.report,
        command(
            "tangent_kernel",
            "--data=gsm8k:gsm8k_train.jsonl --test_data=gsm8k:gsm8k_test.jsonl",
            "--scores=runs/table2/runs/base-gsm8k/analysis/scores.json --out=runs/tangent",
        ),
        12,
        "tangent/tangent_kernel.json",
        "--quick",
    ),
    "freezing": Part(
        "backdoor_real",
        "jaxcrit.backdoor",
        lambda content: backdoor_text(content, width=110),
        NEXT.join(
            [
                "jaxcrit backdoor --model=SmolLM2.gguf --data=dolly:dolly_train.jsonl --split=all --limit=400",
                "--eval_data=dolly:dolly_test.jsonl --eval_split=all --long=drop --max_length=96",
                "--trigger=cf@prefix --decoys=0.2",
                '--target="Mia likes gold rings." --learning_rate=5e-5 --steps=40 --batch_size=4 --eval_every=20',
                "--arms=full,critical:5,noncritical:5,random:5,first:5,last:5 --seeds=2 --eval_prompts=40",
                "--max_new_tokens=16 --noremat --out=runs/freezing",
            ]
        ),
        55,
        "freezing/backdoor.json",
        "--arms=full,first:5 --steps=3 --eval_every=3 --seeds=1 --eval_prompts=8",
    ),
    "spectral": Part(
        "spectral_dynamics_real",
        "jaxcrit.spectral_dynamics",
        spectral_dynamics.told,
        command("spectral_dynamics", f"--data={ALL}", "--split=all --limit=300 --k=1,3,10 --out=runs/spectral"),
        5,
        "spectral/spectral_dynamics.json",
    ),
    "components": Part(
        "pc_removal_real",
        "jaxcrit.removal",
        removal_told,
        command(
            "pc_removal",
            "--data=openbookqa:openbookqa_test.jsonl --split=all --limit=300 --max_new_tokens=16",
            "--layers=3,8,13,18,22,26 --critical=3,13,22 --out=runs/removal",
        ),
        50,
        "removal/removal.json",
        "--limit=30 --layers=3,8,13 --critical=3,13",
    ),
    "minutes": Part("", "", minutes_table, HERE),
}


def block(name: str) -> str:
    """What a part's results print, or that it was not run; and its command."""
    part = PARTS[name]
    content = part.content()
    return f"```\n$ {part.made_by}\n{'not run' if content is None else part.printer(content)}\n```"


def updated(text: str) -> str:
    """A page with every block in it brought up to date."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- begin: {match[1]} -->\n{block(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- begin: (.*?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Updates the page that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="docs/evidence.md")
    parser.add_argument("--keep", default="", help="directory in which the commands wrote: runs")
    parser.add_argument("--little", default="", help="directory to run the long parts in little in: runs/little")
    given = parser.parse_args(arguments)
    if given.little:
        run_in_little(Path(given.little))
    if given.keep:
        kept = [name for name, part in PARTS.items() if part.keep(Path(given.keep))]
        print(f"kept: {', '.join(kept) or 'nothing'}")
    path = Path(given.page)
    write_text(path, updated(path.read_text(encoding="utf-8")))
    print(path)
    return 0


if __name__ == "__main__":
    leave(main)
