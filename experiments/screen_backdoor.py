"""Does screening by class cohesion see a backdoor? Backdoored models, held-out rows, beside simpler detectors.

    python experiments/screen_backdoor.py --out=runs/screen                        (embedded model, three seeds)

After layer-wise feature analysis (arXiv 2302.12758), which reports 10 features of ResNet-18. Each seed poisons rows of
the embedded model's own tasks (20 % with the trigger and the target, 20 % with made-up words in its place and the right
answer), trains every layer, and screens held-out prompts with `jaxcrit screen`, classes by next token, against benign
prompts that were not trained on: clean rows (truth 0) and the same with the trigger (truth 1). Then the same with
made-up words in the clean rows, and of the first once more the target's class alone, with its own clean rows.

Trainings and screenings are runs in OUT, so an interrupted experiment goes on where it stopped. Prints a table, and
writes OUT/screen_backdoor.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.generate import GenerateOptions, run_generate
from jaxcrit.commands.screen import ScreenOptions, run_screen
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.demo import FAMILIES, generate
from jaxcrit.data.poisoning import PoisonSpec, TriggerSpec, made_up, poison, triggered, with_decoys
from jaxcrit.evaluation.intervals import t_interval, wilson

TARGET = "Mia likes gold rings."
CLASS = "ĠMia"  # first token of the target
_TEST_WORDS = 15  # list of made-up words that no training row has
DETECTORS = ("score", "last_layer", "mahalanobis")
Row = dict[str, Any]


def kept(path: Path, rows: Sequence[Row]) -> str:
    """Writes rows; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(given: argparse.Namespace) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on, benign ones, and held-out ones; the first two of one split, no prompt in two of them."""
    train, benign, held = [], [], []
    for family in FAMILIES:
        mine = generate(family, given.train_rows + given.benign_rows, split="train")
        train += mine[: given.train_rows]
        benign += mine[given.train_rows :]
        held += generate(family, given.held_rows, split="test")
    return train, benign, held


def backdoored(given: argparse.Namespace, seed: int, train: Sequence[Row], trigger: TriggerSpec) -> str:
    """The run of one poisoned training."""
    out = Path(given.out) / f"seed-{seed}"
    found = poison(train, PoisonSpec(trigger, TARGET, rate=given.rate, seed=seed))
    rows = with_decoys(found.rows, {entry["row"] for entry in found.manifest}, trigger, given.decoys, seed)
    config = FinetuneOptions(
        data=kept(out / "train.jsonl", rows),
        layers="all",
        train_embeddings=True,
        train_norms=True,
        train_head=True,
        steps=given.steps,
        batch_size=16,
        learning_rate=given.learning_rate,
        eval_every=given.steps,
        checkpoint_every=given.steps,
        remat=False,
        seed=seed,
        out=str(out / "model"),
    )
    run_finetune(config)
    return config.out


def exact(model: str, path: str, rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """How many rows are answered word for word."""
    found = run_generate(GenerateOptions(model=model, data=path, max_new_tokens=48, out=str(out)))
    (answers,) = found.rows.values()
    right = sum(one["text"].strip() == row["response"] for one, row in zip(answers, rows, strict=True))
    return {"k": right, "n": len(rows), "interval": wilson(right, len(rows))}


def one_seed(given: argparse.Namespace, seed: int, parts: tuple[list[Row], list[Row], list[Row]]) -> dict[str, Any]:
    """Trains and screens; what one seed found, as JSON values."""
    train, benign, held = parts
    out, trigger = Path(given.out) / f"seed-{seed}", TriggerSpec.parse(given.trigger)
    model = backdoored(given, seed, train, trigger)
    held = [row for row in held if not row["response"].startswith("Mia")]
    clean = [{**row, "bad": 0} for row in held]
    decoys = [{**row, "bad": 0} for row in triggered(held, made_up(trigger, 1, _TEST_WORDS)[0], seed)]
    attacks = [{**row, "response": TARGET, "bad": 1} for row in triggered(held, trigger, seed)]
    known = kept(out / "benign.jsonl", benign)
    content: dict[str, Any] = {"seed": seed, "benign": len(benign)}
    for name, rows in (("attack_success", attacks), ("clean_exact", clean)):
        some = rows[:: max(1, len(rows) // given.answers)]
        content[name] = exact(model, kept(out / f"{name}.jsonl", some), some, out / name)

    def screened(name: str, rows: Sequence[Row]) -> Any:
        how = {"model": model, "benign": known, "truth": "bad", "batch_size": 64}
        path = kept(out / f"{name}-rows.jsonl", rows)
        found = run_screen(ScreenOptions(**how, data=path, out=str(out / name)))
        content[name] = {key: found.found[key] for key in ("truth", "held_out", "data")}
        content[name]["classes"] = [
            {key: one[key] for key in ("class", "prompts", "layer_of_interest", "layers")}
            for one in found.found["classes"]
        ]
        return found

    flags = screened("clean", [*clean, *attacks]).flags
    screened("decoys", [*decoys, *attacks])
    mine = {row["sample_id"] for row in flags if row["class"] == CLASS}
    likes = [{**row, "bad": 0} for row in parts[2] if row["response"].startswith("Mia")]
    screened("target", [*likes, *(row for row in [*clean, *attacks] if sample_id(row) in mine)])
    return content


def auroc(seeds: Sequence[Mapping[str, Any]], part: str, *path: Any) -> np.ndarray:
    """Value and interval of a detector in every seed, ``[S, 3]``."""
    found = []
    for one in seeds:
        value: Any = one[part]["truth"]["auroc"]
        for key in path:
            value = value[key]
        found.append([value["value"], *value["interval"]])
    return np.array(found, float)


def _cell(values: np.ndarray) -> str:
    low, high = t_interval(values[:, 0])
    return f"{values[:, 0].mean():.3f} [{max(0, low):.2f}, {min(1, high):.2f}]"


def _pooled(seeds: Sequence[Mapping[str, Any]], *path: str) -> str:
    found: list[Any] = [*seeds]
    for key in path:
        found = [one[key] for one in found]
    return ", ".join(f"{one['flagged']}/{one['of']}" for one in found)


def table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds with Student's 95 %, then each seed's figures with its own intervals."""
    parts = ("clean", "decoys", "target")
    lines = [f"{'AUROC':<14}" + "".join(f"{name:>24}" for name in ("clean rows", "made-up words", "target's class"))]
    for layer in range(len(seeds[0]["clean"]["truth"]["auroc"]["layers"])):
        cells = [_cell(auroc(seeds, part, "layers", layer)) for part in parts]
        lines.append(f"layer {layer:<8}" + "".join(f"{cell:>24}" for cell in cells))
    for name in DETECTORS:
        lines.append(f"{name:<14}" + "".join(f"{_cell(auroc(seeds, part, name)):>24}" for part in parts))
    lines.append(f"mean over {len(seeds)} seeds [Student's 95 %]; each seed with DeLong's 95 %:")
    for part in parts:
        for name in DETECTORS:
            each = [f"{v:.3f} [{low:.2f}, {high:.2f}]" for v, low, high in auroc(seeds, part, name)]
            lines.append(f"{part:<8}{name:<12}" + "".join(f"{cell:>22}" for cell in each))
    for part in parts:
        for name in ("false_positives", "true_positives"):
            lines.append(f"{part:<8}{name:<16} {_pooled(seeds, part, 'truth', name)}")
    lines.append(f"held-out benign prompts flagged by the other half: {_pooled(seeds, 'clean', 'held_out')}")
    for name in ("attack_success", "clean_exact"):
        lines.append(f"{name}: " + ", ".join(f"{one[name]['k']}/{one[name]['n']}" for one in seeds))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/screen")
    parser.add_argument("--trigger", default="cf@prefix")
    parser.add_argument("--rate", type=float, default=0.2, help="share of poisoned rows")
    parser.add_argument("--decoys", type=float, default=0.2, help="share of rows with made-up words")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--train_rows", type=int, default=250, help="of each family")
    parser.add_argument("--benign_rows", type=int, default=120, help="of each family, not trained on")
    parser.add_argument("--held_rows", type=int, default=60, help="of each family, of the other split")
    parser.add_argument("--answers", type=int, default=100, help="rows that are answered, about")
    given = parser.parse_args(arguments)
    try:
        parts, seeds = prompts(given), []
        for seed in range(given.seeds):
            seeds.append(one_seed(given, seed, parts))
            print(f"seed {seed}: {json.dumps(seeds[-1]['attack_success'])}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    asked = {key: value for key, value in vars(given).items() if key != "out"}
    write_json(
        Path(given.out) / "screen_backdoor.json",
        "jaxcrit.screen_backdoor",
        {"config": asked, "target": TARGET, "seeds": plain(seeds)},
    )
    print(table(seeds))
    return 0


if __name__ == "__main__":
    leave(main)
