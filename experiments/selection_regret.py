"""Does choosing layers pay? Loss after training K layers that scores choose, among random sets of K layers.

    python experiments/selection_regret.py --model=DIR --data=gsm8k:TRAIN --test_data=gsm8k:TEST \
        --scores=AN/scores.json,SCORE/scores.json --arms=delta_debiased,step_debiased,rgn --out=runs/regret
    python experiments/selection_regret.py --known --out=runs/known      (a model with a known answer)

Every set trains for as many steps on as many tokens. A set's *percentile* is the share of the random sets that reached
a higher test loss; 30 sets resolve about 9 points. *Regret* is its loss less the lowest that any set reached.
``--arms`` names scores of any scores.json of this model; first, last and middle layers are always there. ``--held``
further random sets are ranked among the others: their percentiles must be spread evenly, else the ranking itself is
biased. ``--again_steps`` trains some sets again for longer: does the order hold?

``--known`` plants an answer that is exact: a model in which all layers but two are dead. Their gradients are zero, so a
set without one of the two ends where it began, bit for bit; the two together must beat all other sets, and scores that
look at gradients must choose them. It is an error (exit 1) if one of these fails.

A cell is one set with one order of rows, OUT/cells/NAME.json; an interrupted experiment goes on. Prints, and writes
OUT/selection_regret.json, of which ``--read=FILE`` prints the tables again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells, fitting, minutes, whole
from entry import leave, told
from safetensors.numpy import load_file, save_file
from scipy import stats

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores, write_scores
from jaxcrit.core.selections import LayerSpec, resolve, span
from jaxcrit.data.demo import generate
from jaxcrit.evaluation.intervals import wilson
from jaxcrit.models.model import Model, open_model
from jaxcrit.reporting.finetuned import evaluations
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection.correlation import spearman

FORMAT = "jaxcrit.selection_regret"
PLACES = ("first", "last", "middle")
QUICK = {"random": 3, "held": 1, "seeds": 1, "steps": 3, "rows": 16, "tests": 8, "again_steps": 6, "again_sets": 2}
FREE = ("out", "minutes", "read", "quick", "known", "mesh", "model", "data", "test_data", "scores")
# The known answer: layers of the embedded model that are kept, the two among them that live, what is trained.
KEPT, ALIVE, FAMILY = 8, (2, 5), "closed"
KNOWN = {"count": 2, "random": 2, "held": 0, "seeds": 1, "steps": 8, "rows": 64, "tests": 8, "length": 512}
KNOWN |= {"batch_size": 8, "learning_rate": 2e-3, "again_steps": 0, "lora_rank": 0, "minutes": 0}
# What enters a block and what leaves it; with both at zero neither has a gradient, and the block adds nothing.
INNER = ("v_proj", "o_proj", "up_proj", "down_proj")


def named(given: argparse.Namespace, model: Model) -> dict[str, LayerSet]:
    """Layers by arm: chosen by scores, first, last and middle.

    Raises:
        UserError: no such score, or one of another depth or model.
    """
    depth, scores = model.config.num_layers, {}
    for path in given.scores.split(",") if given.scores else []:
        scores |= read_scores(path)
    keys = given.arms.split(",") if given.arms else []
    for key in keys:
        made = scores[key].meta.get("model_hash") if key in scores else None
        if made and made != model.model_hash:
            raise UserError(
                f"--scores={given.scores}: {key} is of model {made[:12]}, this one is {model.model_hash[:12]}; score it"
            )
    sets = {
        key: resolve(LayerSpec.parse(f"{key}:{given.count}", "arms"), depth, scores=scores, flag="arms") for key in keys
    }
    start = (depth - given.count) // 2
    for place in PLACES:
        text = f"{place}:{given.count}" if place != "middle" else f"{start}-{start + given.count - 1}"
        sets[place] = resolve(LayerSpec.parse(text), depth)
    return sets


def reached(
    given: argparse.Namespace, model: Model, rows: Mapping[str, str], layers: Sequence[int], seed: int, steps: int
) -> dict[str, Any]:
    """Trains one set of layers; test losses by step."""
    options = FinetuneOptions(
        data=rows["train"],
        split=whole(rows["train"]),
        eval_data=rows["test"],
        eval_split=whole(rows["test"]),
        layers=span(layers),
        steps=steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        lora_rank=given.lora_rank,
        eval_every=steps,
        remat=False,
        seed=seed,
    )
    tests = evaluations(run_finetune(options, model=model, keep=False).metrics)
    curve = [[row["step"], row["loss_per_sample"]] for row in tests]
    return {"layers": list(layers), "seed": seed, "steps": steps, "before": curve[0][1], "loss": curve[-1][1]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Trains the sets that are not there yet: random ones first, for everything is told by them."""
    out, began = Path(given.out), time.perf_counter()
    model = open_model(given.model, mesh=given.mesh)
    depth, arms = model.config.num_layers, named(given, model)
    out.mkdir(parents=True, exist_ok=True)
    train, train_hash = fitting(model, given.data, given.rows, given.length, out / "rows")
    test, test_hash = fitting(model, given.test_data, given.tests, given.length, out / "rows" / "tests")
    settings = {key: value for key, value in vars(given).items() if key not in FREE}
    sets = {arm: list(one.layers) for arm, one in arms.items()}
    settings |= {"sets": sets, "model_hash": model.model_hash, "rows_hash": [train_hash, test_hash]}
    cells = Cells.open(out, settings)
    drawn = {
        f"random {draw}": list(resolve(LayerSpec.parse(f"random:{given.count}:{draw}"), depth).layers)
        for draw in range(given.random + given.held)
    }
    jobs = [(arm, layers, 0, given.steps) for arm, layers in drawn.items()]
    jobs += [(arm, layers, seed, given.steps) for seed in range(given.seeds) for arm, layers in sets.items()]
    found: list[dict[str, Any]] = []

    def take(arm: str, layers: list[int], seed: int, steps: int) -> None:
        name = f"{steps}-seed{seed}-{'_'.join(map(str, layers))}"
        late = bool(given.minutes) and time.perf_counter() - began > 60 * given.minutes
        if late and not (out / "cells" / f"{name}.json").exists():
            return
        rows = {"train": train, "test": test}
        found.append({"arm": arm, **cells(name, lambda: reached(given, model, rows, layers, seed, steps))})

    for job in jobs:
        take(*job)
    planned = len(jobs)
    if given.again_steps and len(found) == planned:
        ranked = sorted((one for one in found if one["seed"] == 0), key=lambda one: one["loss"])
        for place in np.unique(np.linspace(0, len(ranked) - 1, given.again_sets).astype(int)):
            take(ranked[place]["arm"], ranked[place]["layers"], 0, given.again_steps)
    facts = model.describe()
    return plain(
        {
            "settings": settings,
            "model": {key: facts.get(key) for key in ("hash", "num_layers", "width", "dequantised_from")},
            "planned": planned + (given.again_sets if given.again_steps else 0),
            "cells": found,
            "time": cells.spent(),
        }
    )


def percentile(loss: float, others: Sequence[float]) -> float:
    """Share of the others that are higher; equal ones count half. NaN where there are none."""
    other = np.array(others)
    return float(np.mean(other > loss) + np.mean(other == loss) / 2) if len(other) else float("nan")


def report(content: Mapping[str, Any]) -> str:
    """A line per arm and order of rows; what held-out random sets say of the ranking; whether the order holds."""
    settings = content["settings"]
    done = [one for one in content["cells"] if one["steps"] == settings["steps"]]
    draws = [one for one in done if one["arm"].startswith("random ")]
    numbers = [int(one["arm"].split()[1]) for one in draws]
    random = [one["loss"] for one, draw in zip(draws, numbers, strict=True) if draw < settings["random"]]
    held = [one["loss"] for one, draw in zip(draws, numbers, strict=True) if draw >= settings["random"]]
    if len(random) < 2:
        return "no random sets are complete yet"
    best, middle = min(one["loss"] for one in done), float(np.median(random))
    rows = []
    for one in sorted((one for one in done if one not in draws), key=lambda one: one["loss"]):
        share = percentile(one["loss"], random)
        low, high = wilson(round(share * len(random)), len(random))
        rows.append(
            [
                f"{one['loss']:.4f}",
                f"{100 * share:.0f}",
                f"{100 * low:.0f} to {100 * high:.0f}",
                f"{(1 + sum(other <= one['loss'] for other in random)) / (1 + len(random)):.3f}",
                f"{one['loss'] - best:.4f}",
                str(one["seed"]),
                span(one["layers"]),
                one["arm"],
            ]
        )
    lines = aligned(["loss", "percentile", "95 %", "p", "regret", "order", "layers", ""], rows)
    lines.append(
        f"{len(random)} random sets of {settings['count']} layers: loss {min(random):.4f} to {max(random):.4f}, median"
        f" {middle:.4f}; before training {done[0]['before']:.4f}; best seen {best:.4f}"
        f" ({span(min(done, key=lambda one: one['loss'])['layers'])})"
    )
    lines.append(
        f"a percentile is resolved to ± {50 / np.sqrt(len(random)):.0f} points; p: random sets that reach as low a loss"
    )
    if held:
        shares = [percentile(loss, random) for loss in held]
        p = stats.kstest(shares, "uniform").pvalue
        lines.append(
            f"{len(held)} held-out random sets: percentiles {', '.join(f'{100 * one:.0f}' for one in sorted(shares))};"
            f" mean {100 * np.mean(shares):.0f} (50 expected), spread evenly p {p:.2f}"
        )
    pairs: dict[str, list[float]] = {}
    for one in done:
        pairs.setdefault(span(one["layers"]), []).append(one["loss"])
    apart = [np.ptp(losses) for losses in pairs.values() if len(losses) > 1]
    if apart and settings["seeds"] > 1:
        lines.append(f"same layers, another order of rows: losses {np.mean(apart):.4f} apart (mean of {len(apart)})")
    longer = [one for one in content["cells"] if one["steps"] != settings["steps"]]
    if len(longer) > 2:
        before = {span(one["layers"]): one["loss"] for one in done if one["seed"] == 0}
        pair = np.array([[before[span(one["layers"])], one["loss"]] for one in longer])
        rho = spearman(pair[:, 0], pair[:, 1])
        lines.append(
            f"order of {len(longer)} sets after {settings['steps']} and {settings['again_steps']} steps: ρ {rho:.2f};"
            + " losses "
            + ", ".join(f"{a:.3f} > {b:.3f} ({one['arm']})" for (a, b), one in zip(pair, longer, strict=True))
        )
    if len(content["cells"]) < content["planned"]:
        lines.append(f"not run: {content['planned'] - len(content['cells'])} of {content['planned']} cells")
    again = settings["again_sets"] if settings["again_steps"] else 0
    parts = {f"{settings['steps']} steps": (f"{settings['steps']}-", content["planned"] - again)}
    parts |= {f"{settings['again_steps']} steps": (f"{settings['again_steps']}-", again)} if again else {}
    lines.append(minutes(content["time"]["seconds"], parts))
    return "\n".join(lines)


def plant(folder: Path) -> Path:
    """The first `KEPT` layers of the embedded model as a checkpoint, all but those `ALIVE` dead."""
    source = open_model("").checkpoint.path
    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = {}
    for name, values in load_file(path).items():
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else ALIVE[0]
        if layer < KEPT:
            dead = layer not in ALIVE and any(f".{part}." in name for part in INNER)
            tensors[name] = np.zeros_like(values) if dead else values
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps({**config, "num_hidden_layers": KEPT}))
    return folder


def known(given: argparse.Namespace) -> bool:
    """Runs the planted model and prints; whether the answer was found."""
    out = Path(given.out)
    if not (model := out / "model").exists():
        out.mkdir(parents=True, exist_ok=True)
        plant(model)
    for split in ("train", "test"):
        write_text(out / f"{split}.jsonl", json_lines(generate(FAMILY, KNOWN["rows"], split=split)))
    asked = ScoreOptions(model=str(model), data=str(out / "train.jsonl"), limit=16, out=str(out / "score"))
    scores = run_score(dataclasses.replace(asked, criteria="gradient_norm,rgn,fisher")).scores
    elsewhere = LayerScores("elsewhere", scores["rgn"].values, scores["rgn"].valid, "low")
    write_scores(out / "scores.json", {**scores, "elsewhere": elsewhere})
    files = {"model": str(model), "data": str(out / "train.jsonl"), "test_data": str(out / "test.jsonl")}
    chosen = {"scores": str(out / "scores.json"), "arms": ",".join([*scores, "elsewhere"]), "out": str(out / "sets")}
    content = measure(argparse.Namespace(**{**vars(given), **KNOWN, **files, **chosen}))
    print(report(content))
    found = {tuple(one["layers"]): one for one in content["cells"]}
    best = min(found, key=lambda layers: found[layers]["loss"])
    told = {
        f"layers {span(ALIVE)} beat all others": best == ALIVE,
        "sets without them do not move": all(
            one["loss"] == one["before"] for layers, one in found.items() if not set(layers) & set(ALIVE)
        ),
        **{f"{key} chooses them": tuple(content["settings"]["sets"][key]) == ALIVE for key in scores},
    }
    print("known answer: " + "; ".join(f"{what}: {'yes' if right else 'NO'}" for what, right in told.items()))
    return all(told.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory, hub id or GGUF file (default: embedded)")
    parser.add_argument("--data", default="", help="training rows: NAME:FILE of JSON lines")
    parser.add_argument("--test_data", default="", help="test rows")
    parser.add_argument("--scores", default="", help="scores.json files, with commas; of one key the last counts")
    parser.add_argument("--arms", default="", help="keys of scores, with commas")
    parser.add_argument("--out", default="runs/regret")
    parser.add_argument("--read", default="", help="print the tables of this file; nothing is run")
    parser.add_argument("--known", action="store_true", help="a model with a known answer instead")
    parser.add_argument("--count", type=int, default=5, help="K, layers of a set")
    parser.add_argument("--random", type=int, default=30, help="random sets that all others are ranked among")
    parser.add_argument("--held", type=int, default=10, help="further random sets, ranked among these")
    parser.add_argument("--seeds", type=int, default=2, help="orders of rows of the named sets")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--again_steps", type=int, default=200, help="of some sets again; 0 for none")
    parser.add_argument("--again_sets", type=int, default=6, help="from the best to the worst")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tests", type=int, default=48)
    parser.add_argument("--length", type=int, default=192, help="tokens of a row; longer ones are left out")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--lora_rank", type=int, default=0, help="adapters of this rank; 0 trains the layers whole")
    parser.add_argument("--mesh", default="", help="devices by axis, such as data=2,fsdp=4 (default: by model size)")
    parser.add_argument("--minutes", type=float, default=0, help="begin no cell after so many; 0 for no end")
    parser.add_argument("--quick", action="store_true", help=f"the same in little: {QUICK}")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    if given.known:
        return 0 if known(given) else 1
    return told(given, FORMAT, measure, report)


if __name__ == "__main__":
    leave(main)
