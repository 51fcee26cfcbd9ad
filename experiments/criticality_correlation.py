"""Does low δ before training predict where training mattered? The paper's Table 2, on any model and data.

    python experiments/criticality_correlation.py --out=runs/criticality           (embedded model and families)
    python experiments/criticality_correlation.py --model=DIR --data=dolly:FILE --test_data=dolly:FILE --out=runs/dolly

For every dataset: δ of the test prompts, fine-tuning of everything on the training rows, test loss with windows of
layers taken back from the base, and Spearman's correlation of the two over the layers. The paper prints ρ and no
control. Beside it stand here what it takes to believe it: ρ of each curve with depth alone, ρ given depth, and the p
of circular shifts. Runs are kept in OUT/<dataset>, so an interrupted experiment goes on. Writes
OUT/criticality_correlation.json and a figure per dataset.
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

from entry import leave

from jaxcrit.commands.correlate import plain
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.substitute import SubstituteOptions, run_substitute
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json, write_text
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.layers import read_scores
from jaxcrit.data.demo import generate
from jaxcrit.reporting.plots import stacked_curves
from jaxcrit.reporting.report import Figure
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection.correlation import Correlation, correlate
from jaxcrit.studies.analysis import run_analysis

# PAPER, Table 2: Spearman's correlation of δ and substitution loss.
DATASETS = ("alpaca", "dolly", "gsm8k", "boolq", "openbookqa")
TABLE_2 = {
    "Llama-2-7B-Chat": (-0.880, -0.849, -0.835, -0.839, -0.861),
    "Llama-2-13B-Chat": (-0.825, -0.806, -0.899, -0.817, -0.904),
    "Llama-3.1-8B-Instruct": (-0.873, -0.834, -0.971, -0.947, -0.717),
    "Llama-3.2-3B-Instruct": (-0.833, -0.743, -0.955, -0.858, -0.509),
    "Phi-3-mini-128k": (-0.732, -0.533, -0.702, -0.538, -0.797),
    "Llama-2-7B base": (-0.311, -0.278, -0.114, -0.246, 0.147),
}
# Families of the embedded model, by the dataset of the paper each is shaped like; ``order`` it has never seen.
FAMILIES = {
    "order": "",
    "open": "alpaca",
    "closed": "dolly",
    "arithmetic": "gsm8k",
    "yesno": "boolq",
    "choice": "openbookqa",
}
_LEARNT = 0.1  # nats; less, and a substitution has nothing to undo


@dataclasses.dataclass(frozen=True)
class Row:
    """One dataset.

    Attributes:
        dataset: its name.
        base_loss: on the test rows before training, mean of per-sample means, nats.
        tuned_loss: after it.
        found: the paper's quantity: biased δ against substitution loss.
        debiased: the same with debiased δ.
        published: of Table 2, the dataset's or that of the one it is shaped like; None where there is none.
    """

    dataset: str
    base_loss: float
    tuned_loss: float
    found: Correlation
    debiased: Correlation
    published: float | None


def generated(out: Path, family: str, rows: int, tests: int) -> tuple[str, str]:
    """Training and test rows of a family; no prompt is in both."""
    folder = out / family
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, count in (("train", rows), ("test", tests)):
        path = folder / f"{family}_{split}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in generate(family, count, split=split)))
        paths.append(str(path))
    return paths[0], paths[1]


def measure(given: argparse.Namespace, name: str, data: str, tests: str) -> Row:
    """Analyses, tunes, substitutes, correlates; steps that are done already are read."""
    out = Path(given.out) / name
    rendering = {"edition": given.edition, "truncate": given.truncate}
    analysis = run_analysis(
        AnalyzeOptions(
            model=given.model,
            data=tests,
            limit=given.tests,
            window=given.window,
            out=str(out / "analysis"),
            **rendering,
        )
    )
    run_finetune(
        FinetuneOptions(
            model=given.model,
            data=data,
            eval_data=tests,
            out=str(out / "tuned"),
            layers="all",
            train_embeddings=True,
            train_norms=True,
            train_head=True,
            steps=given.steps,
            batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            eval_every=given.steps,
            checkpoint_every=given.steps,
            seed=given.seed,
            **rendering,
        )
    )
    substituted = run_substitute(
        SubstituteOptions(
            base=given.model,
            tuned=str(out / "tuned"),
            data=tests,
            limit=given.tests,
            window=given.window,
            out=str(out / "substitution"),
            **rendering,
        )
    )
    kept = read_scores(analysis.out / "scores.json", deletions=True)
    loss = read_scores(substituted.out / "scores.json", deletions=True)["substitution"]
    found = {key: correlate(kept[key], loss) for key in ("delta", "delta_debiased")}
    names = ["δ (biased)", f"loss with {given.window} layers of the base"]
    figure = Figure(
        "curves.png",
        lambda canvas: stacked_curves(analysis.scores["delta"], loss, names, canvas),
        "δ and substitution loss of every layer.",
    )
    figure.write(out)
    like = name if name in DATASETS else FAMILIES.get(name, "")
    published = TABLE_2[given.published][DATASETS.index(like)] if like else None
    return Row(name, substituted.base_loss, substituted.tuned_loss, found["delta"], found["delta_debiased"], published)


def shown(value: float) -> str:
    """Two digits; a dash where there is nothing, as of a curve that is all depth."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def table(rows: Sequence[Row], published: str) -> str:
    """One line per dataset, at most 100 columns wide."""
    header = ["ρ", "95 %", "p naive", "p shift", "ρ debiased", "δ~depth", "loss~depth", "given depth", "p", "paper", ""]
    body = []
    for row in rows:
        one = row.found
        interval = "-" if one.interval is None else "{:.2f},{:.2f}".format(*one.interval)
        paper = "-" if row.published is None else f"{row.published:.3f}"
        body.append(
            [
                f"{one.rho:.2f}",
                interval,
                f"{one.p_naive:.3f}",
                f"{one.p_shift:.2f}",
                f"{row.debiased.rho:.2f}",
                f"{one.depth[0]:.2f}",
                f"{one.depth[1]:.2f}",
                shown(one.partial),
                shown(one.p_partial),
                paper,
                row.dataset,
            ]
        )
    losses = [
        f"{row.dataset}: test loss {row.base_loss:.3f} before, {row.tuned_loss:.3f} after"
        + ("" if row.base_loss - row.tuned_loss > _LEARNT else "; nothing was learnt, so ρ is of noise")
        for row in rows
    ]
    first = rows[0].found
    notes = [
        f"ρ of δ and substitution loss over layers {first.first} to {first.last}",
        f"p shift and p: circular shifts, of {first.num_layers} layers never below {1 / first.num_layers:.3f}",
        f"paper: {published}, on the dataset or the one it is shaped like",
    ]
    return "\n".join([*aligned(header, body), "", *losses, *notes])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every dataset, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory (default: embedded)")
    parser.add_argument("--data", default="", help="training rows, with commas (default: families of the demo)")
    parser.add_argument("--test_data", default="", help="test rows, as many (default: the same; test split of dolly:…)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="where no data is given")
    parser.add_argument("--out", default="runs/criticality")
    parser.add_argument("--published", default="Llama-2-7B-Chat", choices=TABLE_2)
    parser.add_argument("--edition", default="clean")
    parser.add_argument("--truncate", default="")
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1600, help="training rows of a family")
    parser.add_argument("--tests", type=int, default=100, help="test rows")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    out = Path(given.out)
    try:
        pairs: dict[str, tuple[str, str]] = {}
        if given.data:
            train, test = given.data.split(","), (given.test_data or given.data).split(",")
            if len(train) != len(test):
                raise UserError(f"--test_data: expected {len(train)} files as in --data, got {len(test)}")
            for data, tests in zip(train, test, strict=True):
                pairs[data.partition(":")[0] if ":" in data else Path(data).stem] = (data, tests)
        rows = []
        for name in pairs or given.families.split(","):
            data, tests = pairs.get(name) or generated(out, name, given.rows, given.tests)
            rows.append(measure(given, name, data, tests))
            print(f"{name}: ρ {rows[-1].found.rho:.3f}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings: dict[str, Any] = {key: value for key, value in vars(given).items() if key != "out"}
    write_json(
        out / "criticality_correlation.json",
        "jaxcrit.criticality_correlation",
        {"config": settings, "rows": plain([dataclasses.asdict(row) for row in rows])},
    )
    print(table(rows, given.published))
    return 0


if __name__ == "__main__":
    leave(main)
