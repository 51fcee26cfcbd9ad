"""Re-mixing the experts of three small mixtures at word problems that they half fail: does it help, and where?

    python experiments/remix_mixture.py --out=runs/remix

Makes the mixtures where they are not there yet (``train_demo_mixture.py``, a seed each), and runs ``jaxcrit remix`` on
each in OUT/seedS/NAME, so that an interrupted experiment goes on: all methods on the last five layers, from the last
prompt token on and there alone; from it on also all layers, and the last five with two experts that move, by the mean
alone (the oracle is in every run); last descent with random references and at random layers. Intervals are over
mixtures and rows: each mixture answers the same rows, and learns from 200 of its own.
Prints a table; writes OUT/remix_mixture.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import train_demo_mixture
from entry import leave

from jaxcrit.commands.remix import Remixed, RemixOptions, run_remix
from jaxcrit.core.files import write_json
from jaxcrit.core.progress import bars
from jaxcrit.data import demo
from jaxcrit.evaluation.intervals import mcnemar, two_level_bootstrap
from jaxcrit.reporting.tables import aligned, p_value

ALL = "mean,kernel,mode,descent"
# Name of a run, and what it asks. 20 of 64 experts are 1.25 of 4; one alone has nothing to share its mass with.
RUNS: dict[str, dict[str, Any]] = {
    "last5-all": {"layers": "last:5", "at": "all", "method": ALL, "controls": "few"},
    "last5-last": {"layers": "last:5", "at": "last", "method": ALL, "controls": "few"},
    "every-all": {"layers": "all", "at": "all", "method": "mean", "controls": "few"},
    "experts2-all": {"layers": "last:5", "at": "all", "experts": 2, "method": "mean", "controls": "few"},
    "controls-all": {"layers": "last:5", "at": "all", "method": "descent", "controls": "all"},
}


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    """Word problems: ``test`` rows are the same for all seeds, ``train`` rows are a seed's own."""
    return demo.generate(train_demo_mixture.FAMILY, count, seed=50 + seed, split=kind)


def pooled(runs: Sequence[Remixed], name: str) -> dict[str, Any]:
    """A variant over all mixtures, beside each as it is."""
    before, after = ([[row["before"] for row in run.rows] for run in runs], [])
    after = [[row["before" if not name else "after"] for row in run.rows] for run in runs]
    after = after if not name else [[row[name] for row in rows] for rows in after]
    exact, loss = (
        np.array([[row[key] for row in rows] for rows in after], float)
        - np.array([[row[key] for row in rows] for rows in before], float)
        for key in ("exact", "loss")
    )
    won, lost = int((exact > 0).sum()), int((exact < 0).sum())
    return {
        "name": name or "model as it is",
        "exact": float(np.mean([[row["exact"] for row in rows] for rows in after])),
        "loss": float(np.mean([[row["loss"] for row in rows] for rows in after])),
        "won": won,
        "lost": lost,
        "p": mcnemar(won, lost),
        "exact_change": [float(exact.mean()), *two_level_bootstrap(exact)],
        "loss_change": [float(loss.mean()), *two_level_bootstrap(loss)],
        "exact_by_seed": [float(np.mean([row["exact"] for row in rows])) for rows in after],
    }


def beside(runs: Sequence[Remixed], name: str, control: str) -> dict[str, Any]:
    """A variant less its control, over the same rows of all mixtures."""
    exact = np.array(
        [[float(row["after"][name]["exact"]) - row["after"][control]["exact"] for row in run.rows] for run in runs]
    )
    won, lost = int((exact > 0).sum()), int((exact < 0).sum())
    return {
        "name": name,
        "control": control,
        "change": [float(exact.mean()), *two_level_bootstrap(exact)],
        "won": won,
        "lost": lost,
        "p": mcnemar(won, lost),
    }


def line(one: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    exact, loss = (
        f"{change:+.3f} [{low:+.3f}, {high:+.3f}]" for change, low, high in (one["exact_change"], one["loss_change"])
    )
    counts = [str(one["won"]), str(one["lost"]), p_value(one["p"])]
    return [one["name"], f"{one['exact']:.3f}", exact, *counts, f"{one['loss']:.3f}", loss]


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the mixtures, runs all, prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--training_steps", type=int, default=300)
    parser.add_argument("--runs", default=",".join(RUNS))
    asked = parser.parse_args(arguments)
    runs: dict[str, list[Remixed]] = {}
    for name in asked.runs.split(","):  # what matters most first, should it be stopped
        for seed in range(asked.seeds):
            model = asked.out / f"mixture{seed}"
            if not (model / "model.safetensors").exists():
                train_demo_mixture.main([f"--out={model}", f"--seed={seed}", f"--steps={asked.training_steps}"])
            options = RemixOptions(
                **RUNS[name],
                seed=seed,
                steps=asked.steps,
                batch_size=asked.batch_size,
                out=str(asked.out / f"seed{seed}" / name),
            )
            given = {"rows": rows_of("test", asked.rows, 0), "reference": rows_of("train", asked.references, seed)}
            runs.setdefault(name, []).append(run_remix(options, model=str(model), **given, progress=bars))
            print(f"{name}, seed {seed}: done", flush=True)
    content: dict[str, Any] = {"rows": asked.rows, "seeds": asked.seeds, "runs": {}}
    for name, made in runs.items():
        found = [pooled(made, variant) for variant in ("", *(one["name"] for one in made[0].found["variants"]))]
        names = [one["name"] for one in found[1:]]
        kinds = ("own shares", "{}, random references", "{}, random layers")
        controls = [(one, kind.format(one)) for one in names for kind in kinds]
        pairs = [
            beside(made, one, other) for one, other in controls if other in names and other != one and "," not in one
        ]
        content["runs"][name] = {
            "asked": RUNS[name],
            "references": [run.found["references"] for run in made],
            "random_layers": [run.found["random_layers"] for run in made],
            "blends": [run.found["blends"] for run in made],
            "variants": found,
            "pairs": pairs,
        }
        header = [name, "exact", "change [95 %]", "won", "lost", "p", "loss", "change [95 %]"]
        print("\n".join([*aligned(header, [line(one) for one in found]), ""]))
        body = [
            [
                one["name"],
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one["change"]),
                str(one["won"]),
                str(one["lost"]),
                p_value(one["p"]),
                one["control"],
            ]
            for one in pairs
        ]
        print("\n".join([*aligned(["variant", "less [95 %]", "won", "lost", "p", "control"], body), ""]))
    write_json(asked.out / "remix_mixture.json", "jaxcrit.experiment", content)
    return 0


if __name__ == "__main__":
    leave(main)
