"""The paper's Table 2 on a model given: which score, before training, predicts where training mattered, beyond depth?

    python experiments/evidence_table2.py --model=DIR --data=gsm8k:TRAIN,dolly:TRAIN --test_data=gsm8k:TEST,dolly:TEST \
        --out=runs/table2 [--minutes=55] [--quick]

For every dataset, of the model as it is: every score of ``jaxcrit analyze`` (the prompts of the test rows), ``score``
(the first training rows: some of them read responses) and ``ablate`` (the same). For every dataset and seed: training
of everything, and test loss with windows of layers taken back from the base. The pooled test is that of pooled_test.py,
which was fixed before the first run. On one dataset training goes on to ``--long_steps``, for what the steps are of it.

A cell is OUT/cells/NAME.json; the runs behind it stand in OUT/runs without the tuned weights. An interrupted experiment
goes on; with ``--minutes`` no cell is begun after so many, and the tables are of what there is. Prints, and writes
OUT/evidence_table2.json, of which ``--read=FILE`` prints the tables again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells, fitting, minutes, whole
from criticality_correlation import TABLE_2
from entry import leave, told
from pooled_test import DATASETS, PRIMARY, SEEDS, WINDOW, Pooled, pooled, turned, verdict

from jaxcrit.commands.ablate import AblateOptions, run_ablate
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.commands.substitute import SubstituteOptions, run_substitute
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.hashing import sha256_text
from jaxcrit.core.layers import LayerScores
from jaxcrit.evaluation.intervals import holm
from jaxcrit.models.model import open_model
from jaxcrit.reporting.finetuned import evaluations
from jaxcrit.reporting.tables import aligned, number, p_value
from jaxcrit.selection.correlation import correlate
from jaxcrit.studies.analysis import run_analysis

KEYS = ("delta", "delta_debiased", "step")  # shown cell by cell
CURVES = (*KEYS, "step_debiased")
FORMAT = "jaxcrit.evidence_table2"
QUICK = {"seeds": "1", "steps": 3, "rows": 16, "tests": 4, "prompts": 24, "scored": 4, "windows": "5", "long_steps": 0}
FREE = ("out", "minutes", "read", "quick", "mesh", "model", "data", "test_data")


def base_scores(given: argparse.Namespace, rows: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Every score of the model as it is, on one dataset; ``scores.json`` entries by key."""
    analysis = run_analysis(
        AnalyzeOptions(
            model=given.model, mesh=given.mesh, data=rows["prompts"], limit=given.prompts, out=str(out / "analysis")
        )
    )
    data = {
        "model": given.model,
        "mesh": given.mesh,
        "data": rows["train"],
        "split": whole(rows["train"]),
        "limit": given.scored,
    }
    scored = run_score(ScoreOptions(**data, batch_size=given.batch_size, out=str(out / "score")))
    ablated = run_ablate(AblateOptions(**data, batch_size=given.batch_size, out=str(out / "ablate")))
    skipped = {key: score for key, score in ablated.scores.items() if not key.endswith("_per_token")}
    scores = {**{key: analysis.scores[key] for key in CURVES}, **scored.scores, **skipped}
    kept = {key: score.to_json() | {"meta": {"window": score.meta.get("window")}} for key, score in scores.items()}
    return {"scores": kept, "left_out": scored.warnings}


def training(
    given: argparse.Namespace, rows: Mapping[str, str], seed: int, steps: int, out: Path | str, mesh: str = ""
) -> FinetuneOptions:
    """Training of everything."""
    return FinetuneOptions(
        model=given.model,
        mesh=mesh,
        data=rows["train"],
        split=whole(rows["train"]),
        eval_data=rows["test"],
        eval_split=whole(rows["test"]),
        layers="all",
        train_embeddings=True,
        train_norms=True,
        train_head=True,
        steps=steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        eval_every=min(steps, given.steps),
        checkpoint_every=steps,
        keep=1,
        remat=False,
        seed=seed,
        out=str(out),
    )


def cell(given: argparse.Namespace, rows: Mapping[str, str], seed: int, out: Path) -> dict[str, Any]:
    """Trains with one seed, and substitutes by every width of window."""
    began, spent = time.perf_counter(), {}
    options = training(given, rows, seed, given.steps, out / "tuned", given.mesh)
    tests = evaluations(run_finetune(options).metrics)
    spent["train"] = time.perf_counter() - began
    found = {}
    for window in map(int, given.windows.split(",")):
        began = time.perf_counter()
        swept = run_substitute(
            SubstituteOptions(
                base=given.model,
                mesh=given.mesh,
                tuned=str(out / "tuned"),
                data=rows["test"],
                split=whole(rows["test"]),
                window=window,
                batch_size=given.batch_size,
                out=str(out / f"window{window}"),
            )
        )
        found[str(window)] = swept.scores["substitution"].to_json() | {
            "passes": swept.block_evaluations["forward_passes"],
            "meta": {"window": window},
        }
        spent[f"window {window}"] = time.perf_counter() - began
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items()), file=sys.stderr, flush=True)
    curve = [[row["step"], row["loss_per_sample"]] for row in tests]
    return {"seed": seed, "base_loss": curve[0][1], "tuned_loss": curve[-1][1], "substitution": found}


def long(given: argparse.Namespace, rows: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Test loss every ``--steps`` steps of a training of ``--long_steps``."""
    seed = min(map(int, given.seeds.split(",")))
    tests = evaluations(run_finetune(training(given, rows, seed, given.long_steps, out, given.mesh)).metrics)
    return {"curve": [[row["step"], row["loss_per_sample"]] for row in tests]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Makes the cells that are not there yet, one seed of every dataset after the other."""
    out, began = Path(given.out), time.perf_counter()
    train, test = given.data.split(","), given.test_data.split(",")
    names = [spec.partition(":")[0] if ":" in spec else Path(spec).stem for spec in train]
    theirs = [spec.partition(":")[0] if ":" in spec else name for spec, name in zip(test, names, strict=False)]
    if len(train) != len(test) or names != theirs:
        raise UserError(
            f"--data={given.data} --test_data={given.test_data}: expected as many test files, of the same datasets in"
            " the same order"
        )
    model, rows, hashes = open_model(given.model, mesh=given.mesh), {}, {}
    for name, data, tests in zip(names, train, test, strict=True):
        (folder := out / "rows").mkdir(parents=True, exist_ok=True)
        learn, learn_hash = fitting(model, data, given.rows, given.length, folder)
        check, check_hash = fitting(model, tests, given.tests, given.length, folder / "tests")
        prompts_hash = sha256_text(Path(tests.rpartition(":")[2]).read_text(encoding="utf-8"))
        rows[name] = {"train": learn, "test": check, "prompts": tests}
        hashes[name] = [learn_hash, check_hash, prompts_hash]
    settings = {key: value for key, value in vars(given).items() if key not in FREE}
    settings |= {"model_hash": model.model_hash, "rows_hash": hashes}
    cells = Cells.open(out, settings)
    facts, seeds = model.describe(), [int(seed) for seed in given.seeds.split(",")]
    del model
    runs, jobs, scratch = out / "runs", {}, {}
    for seed in seeds:
        for name in names:
            jobs[f"base-{name}"] = functools.partial(base_scores, given, rows[name], runs / f"base-{name}")
            scratch[f"cell-{name}-{seed}"] = folder = runs / f"{name}-{seed}"
            jobs[f"cell-{name}-{seed}"] = functools.partial(cell, given, rows[name], seed, folder)
    if given.long_steps:
        scratch[f"long-{names[0]}"] = folder = runs / "long"
        jobs[f"long-{names[0]}"] = functools.partial(long, given, rows[names[0]], folder)
    found = {}
    for key, make in jobs.items():
        late = bool(given.minutes) and time.perf_counter() - began > 60 * given.minutes
        if not late or (out / "cells" / f"{key}.json").exists():
            found[key] = cells(key, make, scratch.get(key))
    return plain(
        {
            "settings": settings,
            "model": {key: facts.get(key) for key in ("hash", "num_layers", "width", "dequantised_from")},
            "planned": list(jobs),
            "cells": found,
            "time": cells.spent(),
        }
    )


def read(content: Mapping[str, Any]) -> tuple[dict[str, dict[str, LayerScores]], dict[str, list[dict[str, Any]]]]:
    """By dataset, the scores of the model by key; and the cells that there are, by seed."""

    def scores(found: Mapping[str, Any]) -> dict[str, LayerScores]:
        return {key: LayerScores.from_json(key, entry) for key, entry in found.items()}

    cells = content["cells"]
    base = {name.removeprefix("base-"): scores(one["scores"]) for name, one in cells.items() if name[:5] == "base-"}
    tuned: dict[str, list[dict[str, Any]]] = {}
    for name, one in cells.items():
        if name.startswith("cell-") and (dataset := name[5:].rpartition("-")[0]) in base:
            tuned.setdefault(dataset, []).append(one | {"substitution": scores(one["substitution"])})
    return base, tuned


def tests(content: Mapping[str, Any], window: str) -> tuple[dict[str, Pooled], np.ndarray]:
    """The pooled test of every score, and the layers it is over: those that the primary one and its windows have."""
    base, tuned = read(content)
    names = list(tuned)
    valid = np.logical_and.reduce(
        [base[name][PRIMARY].valid for name in names]
        + [one["substitution"][kind].valid for name in names for one in tuned[name] for kind in one["substitution"]]
    )
    layers = np.flatnonzero(valid)
    losses = [np.array([one["substitution"][window].values[layers] for one in tuned[name]]) for name in names]
    found = {}
    for key in base[names[0]]:
        x = np.array([turned(base[name][key])[layers] if key in base[name] else np.nan * layers for name in names])
        if np.isfinite(x).all():
            found[key] = pooled(x, losses, layers)
    return found, layers


def cells_table(content: Mapping[str, Any]) -> str:
    """Of every dataset and seed: what was learnt, and the correlation of three scores with windows of `WINDOW`."""
    base, tuned = read(content)
    header = ["seed", "loss", "after", "ρ", "p shift", "block", "given depth", "p shift", "paper", ""]
    rows = []
    for key in KEYS:
        for name, cells in tuned.items():
            for one in cells:
                pair = correlate(base[name][key], one["substitution"][str(WINDOW)])
                paper = (
                    TABLE_2["Llama-2-7B-Chat"][DATASETS.index(name)] if name in DATASETS and key == PRIMARY else None
                )
                rows.append(
                    [
                        str(one["seed"]),
                        *(f"{one[when]:.3f}" for when in ("base_loss", "tuned_loss")),
                        f"{pair.rho:+.2f}",
                        *(p_value(value) for value in (pair.p_shift, pair.p_block)),
                        f"{pair.partial:+.2f}",
                        p_value(pair.p_partial),
                        "" if paper is None else f"{paper:+.3f}",
                        f"{key}, {name}",
                    ]
                )
    return "\n".join(aligned(header, rows))


def criteria_table(content: Mapping[str, Any], window: str) -> str:
    """Every score by its pooled T; p of all but the primary is Holm's too."""
    found, layers = tests(content, window)
    others = [key for key, one in found.items() if key != PRIMARY and np.isfinite(one.p)]
    adjusted = dict(zip(others, holm([found[key].p for key in others]), strict=True))
    names = list(read(content)[1])
    rows = []
    for key, one in sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].statistic, nan=-2)):
        rows.append(
            [
                number(one.statistic, 2),
                "{} {}".format(*(number(end, 2) for end in one.interval)),
                p_value(one.p),
                "primary" if key == PRIMARY else p_value(adjusted.get(key, float("nan"))),
                number(one.raw, 2),
                *(number(value, 2) for value in one.by_dataset),
                key,
            ]
        )
    head = ["T", "95 %", "p", "Holm", "raw", *(name[:6] for name in names), ""]
    floor = next(iter(found.values())).floor
    told = (
        f"windows of {window}, layers {layers[0]} to {layers[-1]}; p never below {floor:.3f}, Holm's of"
        f" {len(others)} scores never below {min(1, len(others) * floor):.2f}"
    )
    return "\n".join([told, *aligned(head, rows)])


def costs(content: Mapping[str, Any]) -> str:
    """Minutes by part, from the cells that there are; passes of the model that a window's sweep takes a batch."""
    starts = {"scores of the model": "base-", "train and substitute": "cell-", "long training": "long-"}
    planned = {part: sum(name.startswith(start) for name in content["planned"]) for part, start in starts.items()}
    parts = {part: (start, planned[part]) for part, start in starts.items() if planned[part]}
    first = next(one for name, one in content["cells"].items() if name.startswith("cell-"))
    passes = ", ".join(f"{one['passes']:.1f} (windows of {window})" for window, one in first["substitution"].items())
    return f"{minutes(content['time']['seconds'], parts)}\nforward passes of a substitution, a batch: {passes}"


def published_table(content: Mapping[str, Any]) -> str:
    """Table 2 of the paper, and under it what this is: mean of seeds with biased δ, as it is and given depth."""
    base, tuned = read(content)
    pairs = {
        name: [correlate(base[name][PRIMARY], one["substitution"][str(WINDOW)]) for one in cells]
        for name, cells in tuned.items()
    }
    rows = [[*(f"{value:+.3f}" for value in values), f"{name}, published"] for name, values in TABLE_2.items()]
    for what, field in (("here", "rho"), ("here, given depth", "partial")):
        means = {name: np.mean([getattr(pair, field) for pair in found]) for name, found in pairs.items()}
        rows.append([*(f"{means[name]:+.3f}" if name in means else "-" for name in DATASETS), what])
    return "\n".join(aligned([*DATASETS, ""], rows))


def report(content: Mapping[str, Any]) -> str:
    """All tables, and what the pooled test says where all of it is there."""
    settings, tuned = content["settings"], read(content)[1]
    if not tuned:
        return "no cell is complete yet"
    windows = settings["windows"].split(",")
    parts = [criteria_table(content, window) for window in windows]
    parts += [cells_table(content), published_table(content)] if str(WINDOW) in windows else []
    lacking = [name for name in content["planned"] if name not in content["cells"]]
    grid = {(name, one["seed"]) for name, cells in tuned.items() for one in cells}
    if {(name, seed) for name in DATASETS for seed in SEEDS} <= grid:
        parts.append(f"{PRIMARY}, windows of {WINDOW}: {verdict(tests(content, str(WINDOW))[0][PRIMARY])}")
    else:
        parts.append(f"the registered test is not made: it takes {len(DATASETS)} datasets x {len(SEEDS)} seeds")
    for name, one in content["cells"].items():
        if name.startswith("long-"):
            (_, start), *steps = one["curve"]
            share = (start - steps[0][1]) / (start - steps[-1][1])
            parts.append(f"{name[5:]}: {steps[0][0]} steps reach {share:.0%} of the drop of {steps[-1][0]}")
    if lacking:
        parts.append("not run: " + ", ".join(lacking))
    parts.append(costs(content))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory, hub id or GGUF file (default: embedded)")
    parser.add_argument("--data", default="", help="training rows: NAME:FILE of JSON lines, with commas")
    parser.add_argument("--test_data", default="", help="test rows, by the same names")
    parser.add_argument("--out", default="runs/table2")
    parser.add_argument("--read", default="", help="print the tables of this file; nothing is run")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--windows", default="5,3,1")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--long_steps", type=int, default=300, help="on the first dataset; 0 for none")
    parser.add_argument("--rows", type=int, default=400, help="training rows of a dataset")
    parser.add_argument("--tests", type=int, default=32, help="test rows that losses are of")
    parser.add_argument("--prompts", type=int, default=300, help="test prompts that delta and step are of")
    parser.add_argument("--scored", type=int, default=32, help="training rows that all other scores are of")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row; longer ones are left out")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--mesh", default="", help="devices by axis, such as data=2,fsdp=4 (default: by model size)")
    parser.add_argument("--minutes", type=float, default=0, help="begin no cell after so many; 0 for no end")
    parser.add_argument("--quick", action="store_true", help=f"the same in little: {QUICK}")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    return told(given, FORMAT, measure, report)


if __name__ == "__main__":
    leave(main)
