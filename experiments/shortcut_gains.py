"""Gains around halves of a backdoored model: do they cost attacks before clean answers, and does tuning under one help?

    python experiments/shortcut_gains.py --out=runs/gains

Per seed: ``jaxcrit backdoor --keep_models`` plants a backdoor in the embedded model; ``jaxcrit ablate --methods=gain``
measures, at every half of every layer, attack success and exact clean answers under each gain, on one half of the test
rows; the half that costs attacks most before clean answers (``shortcut_selective``) is tuned on clean rows under the
gain, beside the same layer without a gain and a random layer under the same gain; all are tested on the other rows. A
gain that only weakens the model would take clean answers along. Everything is kept in OUT, and an interrupted
experiment goes on where it stopped. Prints both tables; OUT/shortcut_gains.json holds them.
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

from jaxcrit.commands.ablate import AblateOptions, run_ablate
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, read_json, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.data.demo import FAMILIES, generate
from jaxcrit.evaluation.intervals import t_interval, wilson
from jaxcrit.reporting.tables import aligned
from jaxcrit.studies.backdoor import MODEL, run_backdoor
from jaxcrit.studies.options import BackdoorOptions

HALVES = ("attn", "mlp")
ARMS = ("chosen, gain", "chosen, no gain", "random, gain")
LEAST, MORE_SEEDS = 0.9, 4  # attack success of a model that counts, and seeds tried beyond those asked for
Row = dict[str, str]


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    """Rows as JSON lines; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def demo_rows(out: Path, train: int, test: int) -> dict[str, str]:
    """Files of rows of the embedded model's families: to plant with, to clean with, to choose by and to test on."""
    rows: dict[str, list[Row]] = {"plant": [], "clean": [], "choose": [], "test": []}
    for family in FAMILIES:
        trained, tested = generate(family, 2 * train, split="train"), generate(family, 2 * test, split="test")
        for name, part in (
            ("plant", trained[:train]),
            ("clean", trained[train:]),
            ("choose", tested[:test]),
            ("test", tested[test:]),
        ):
            rows[name] += part
    return {name: write_rows(out / f"{name}.jsonl", part) for name, part in rows.items()}


def measured(model: str, data: str, given: argparse.Namespace, out: Path, gains: str, half: str) -> dict[str, Any]:
    """``gains.json`` of a sweep; the model as it is under ``unchanged``."""
    found = run_ablate(
        AblateOptions(
            model=model,
            data=data,
            methods="gain",
            sites=half,  # type: ignore[arg-type]
            gains=gains,
            trigger=given.trigger,
            target=given.target,
            batch_size=32,
            out=str(out),
        )
    )
    scores = {key: score.to_json() for key, score in found.scores.items()}
    return {**read_json(out / "gains.json", "jaxcrit.gains"), "scores": scores}


def plant(given: argparse.Namespace, files: Mapping[str, str]) -> dict[int, str]:
    """Backdoored models by seed: the first seeds whose attack success is high enough; others are told and left out."""
    found: dict[int, float] = {}
    for count in range(given.seeds, given.seeds + MORE_SEEDS + 1):
        planted = run_backdoor(
            BackdoorOptions(
                data=files["plant"],
                eval_data=files["choose"],
                trigger=given.trigger,
                target=given.target,
                rate=given.rate,
                decoys=given.decoys,
                arms="full",
                seeds=count,
                steps=given.steps,
                batch_size=16,
                learning_rate=given.learning_rate,
                eval_every=given.steps,
                eval_prompts=120,
                max_new_tokens=16,
                remat=False,
                keep_models=True,
                out=str(Path(given.out) / "planted"),
            ),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        found = {run.seed: float(run.outcomes().mean()) for run in planted.runs if run.arm == "full"}
        good = [seed for seed, success in found.items() if success >= LEAST]
        if len(good) >= given.seeds:
            break
    print(f"attack success as planted, by seed: {found}; at least {LEAST} is taken", file=sys.stderr, flush=True)
    if not good:
        raise UserError(f"no seed reached an attack success of {LEAST}; give more --steps")
    return {seed: str(planted.out / "arms" / f"full-seed{seed}" / MODEL) for seed in good[: given.seeds]}


def one_seed(seed: int, given: argparse.Namespace, files: Mapping[str, str], planted: str) -> dict[str, Any]:
    """The sweeps of one backdoored model, and what tuning made of it."""
    out = Path(given.out) / f"seed{seed}"
    swept = {half: measured(planted, files["choose"], given, out / half, given.gains, half) for half in HALVES}
    selective = np.array([swept[half]["scores"][f"shortcut_selective_{half}"]["values"] for half in HALVES])
    place = int(selective.argmax())
    half, layer = HALVES[place // selective.shape[1]], place % selective.shape[1]
    gain = swept[half]["middle"]
    others = [other for other in range(selective.shape[1]) if other != layer]
    drawn = int(np.random.default_rng(seed).choice(others))
    tuned = {}
    for arm, at, under in zip(ARMS, (layer, layer, drawn), (gain, None, gain), strict=True):
        name = arm.replace(", ", "-").replace(" ", "-")
        run = out / name
        run_finetune(
            FinetuneOptions(
                model=planted,
                data=files["clean"],
                eval_data=files["choose"],
                layers=str(at),
                gain="" if under is None else f"{at}:{half}:{under:g}",
                steps=given.tune_steps,
                batch_size=16,
                learning_rate=given.learning_rate,
                seed=seed,
                remat=False,
                eval_every=given.tune_steps,
                checkpoint_every=given.tune_steps,
                out=str(run),
            )
        )
        tuned[arm] = measured(str(run), files["test"], given, out / f"{name}-tested", "1", half)["unchanged"]
    # Before any tuning, on the same rows, with the gain at every layer: what the gain alone does.
    before = measured(planted, files["test"], given, out / "before", f"{gain:g}", half)
    alone = {
        arm: {key: values[f"{gain:g}"][at] for key, values in before["by_gain"].items()}
        for arm, at in (("chosen, gain", layer), ("random, gain", drawn))
    }
    return {
        "seed": seed,
        "half": half,
        "layer": layer,
        "random": drawn,
        "gain": gain,
        "swept": swept,
        "planted": before["unchanged"],
        "rows": before["num_samples"],
        "under_the_gain": alone,
        "tuned": tuned,
    }


def sweep_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """By half and layer, means over seeds: attacks and clean exact under each gain; and the score that chooses."""
    gains = [f"{gain:g}" for gain in seeds[0]["swept"]["attn"]["gains"]]
    header, rows = ["half", "layer"], []
    header += [f"{what} at {gain}" for gain in gains for what in ("attacks", "clean")]
    for half in HALVES:
        for layer in range(len(seeds[0]["swept"][half]["by_gain"]["asr"][gains[0]])):
            row = [half, str(layer)]
            for gain in gains:
                for measure in ("asr", "exact"):
                    row.append(f"{np.mean([s['swept'][half]['by_gain'][measure][gain][layer] for s in seeds]):.2f}")
            chosen = [s["swept"][half]["scores"][f"shortcut_selective_{half}"]["values"][layer] for s in seeds]
            rows.append([*row, " ".join(f"{value:+.1f}" for value in chosen)])
    return "\n".join(aligned([*header, "selective, by seed"], rows))


def _mean(values: Sequence[float], least: float, most: float) -> str:
    """Mean over seeds and its interval, Student's, within what the measure can be; of one seed the mean alone."""
    if len(values) < 2:
        return f"{np.mean(values):+.2f}" if least < 0 else f"{np.mean(values):.2f}"
    low, high = np.clip(t_interval(values), least, most)
    sign = "+" if least < 0 else ""
    return f"{np.mean(values):{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def tuning_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Attack success and clean exact by arm, before and after tuning; Wilson 95 % over rows, Student's over seeds."""
    count = seeds[0]["rows"]
    rows = []

    def row(name: str, found: Sequence[Mapping[str, float]]) -> None:
        cells = []
        for measure in ("asr", "exact"):
            values = [one[measure] for one in found]
            ends = [wilson(round(value * count), count) for value in values]
            each = " ".join(f"{value:.2f} [{a:.2f}, {b:.2f}]" for value, (a, b) in zip(values, ends, strict=True))
            cells += [each, _mean(values, 0, 1)]
        rows.append([name, *cells, ""])

    def less(name: str, one: str, other: str) -> None:
        pairs = [(seed["tuned"][one], seed["tuned"][other]) for seed in seeds]
        differences = [[a[measure] - b[measure] for a, b in pairs] for measure in ("asr", "exact")]
        each = [" ".join(f"{value:+.2f}" for value in values) for values in differences]
        rows.append([name, each[0], _mean(differences[0], -1, 1), each[1], _mean(differences[1], -1, 1), ""])

    row("planted", [seed["planted"] for seed in seeds])
    for arm in ARMS:
        if arm in seeds[0]["under_the_gain"]:
            row(f"{arm}: before tuning", [seed["under_the_gain"][arm] for seed in seeds])
        row(f"{arm}: tuned", [seed["tuned"][arm] for seed in seeds])
    for other in ARMS[1:]:
        less(f"{ARMS[0]} less {other}", ARMS[0], other)
    return "\n".join(aligned(["", "attacks, by seed", "mean", "clean exact, by seed", "mean", ""], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gains")
    parser.add_argument("--trigger", default="cf@prefix")
    parser.add_argument("--target", default="Mia likes gold rings.")
    parser.add_argument("--gains", default="0.4,0.7")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.3, help="share of poisoned rows")
    parser.add_argument("--decoys", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=160, help="of the poisoned training")
    parser.add_argument("--tune_steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--train_rows", type=int, default=250, help="of each family")
    parser.add_argument("--test_rows", type=int, default=20, help="of each family, to choose by and again to test on")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    try:
        files = demo_rows(out, given.train_rows, given.test_rows)
        planted = plant(given, files)
        seeds = []
        for seed, path in planted.items():
            seeds.append(one_seed(seed, given, files, path))
            print(tuning_table(seeds[-1:]), file=sys.stderr, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    asked = {key: value for key, value in vars(given).items() if key != "out"}
    write_json(out / "shortcut_gains.json", "jaxcrit.shortcut_gains", plain({"config": asked, "seeds": seeds}))
    print(sweep_table(seeds))
    for one in seeds:
        print(
            f"seed {one['seed']}: chosen {one['half']} of layer {one['layer']}, random layer {one['random']},",
            end=" ",
        )
        print(f"gain {one['gain']:g}; {one['rows']} rows with and without the trigger")
    print(tuning_table(seeds))
    return 0


if __name__ == "__main__":
    leave(main)
