"""Does the gain of a perturbation say anything of a model's layers? Its stability, and what noise of its size says.

    python experiments/perturbation_gains.py --model=DIR --data=dolly:FILE,gsm8k:FILE --out=runs/gains

``perturbation_gain``, at both radii, and ``perturbation_gain_local`` are computed on a few prompts of each dataset: of
the first dataset with several random starts, and on as many other prompts. Printed are the gains by layer; the rank
correlation over layers between starts, between prompts and between datasets, over all layers and without the first and
the last; and of each search with random noise of the same size. Cells are kept in OUT, and never made again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells, whole
from entry import leave

from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, write_json
from jaxcrit.core.groups import RowOptions
from jaxcrit.criteria.perturbation_gain import PerturbationOptions
from jaxcrit.data.dataset import Dataset
from jaxcrit.models.model import Model, open_model
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection.correlation import spearman

KEYS = ("perturbation_gain", "perturbation_gain_wide", "perturbation_gain_local")
Found = Mapping[str, Mapping[str, Any]]


def prompts(model: Model, data: str, rows: int, longest: int) -> dict[str, Dataset]:
    """By dataset, twice as many rows as asked for, the first whose prompts fit.

    Raises:
        UserError: too few do.
    """
    found = {}
    for part in data.split(","):
        (one,) = model.read(
            RowOptions(data=part, split="" if part.startswith("demo:") else whole(part), duplicates="drop")
        )
        fit = [example for example in one.examples if 2 <= example.prompt_length <= longest][: 2 * rows]
        if len(fit) < 2 * rows:
            raise UserError(f"--longest={longest}: {2 * rows} prompts of {part} should fit, {len(fit)} do")
        found[one.name] = Dataset(one.name, one.source, fit)
    return found


def half(one: Dataset, which: int) -> Dataset:
    """The first half of the rows, or the second."""
    middle = len(one.examples) // 2
    return Dataset(one.name, one.source, one.examples[which * middle : (which + 1) * middle])


def cell(model: Model, rows: Dataset, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Scores by key: values, errors, gains of noise, changes."""
    options = ScoreOptions(criteria=",".join(KEYS), batch_size=given.rows)
    own = PerturbationOptions(seed=seed, eps=given.eps, wide=given.wide)
    scores = run_score(options, [own], model=model, rows=rows, keep=False).scores
    kept = ("noise_gain", "change", "noise_change")
    return {
        key: {
            "values": one.values.tolist(),
            "stderr": one.stderr.tolist(),
            **{name: one.meta[name] for name in kept if name in one.meta},
        }
        for key, one in scores.items()
    }


def likeness(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[str]:
    """Mean rank correlation of pairs of curves, over all layers and without the first and the last; the top five."""
    whole = [spearman(np.array(a), np.array(b)) for a, b in pairs]
    inner = [spearman(np.array(a)[1:-1], np.array(b)[1:-1]) for a, b in pairs]
    top = [len(set(np.argsort(a)[-5:]) & set(np.argsort(b)[-5:])) for a, b in pairs]
    return [f"{np.mean(whole):.2f}", f"{np.mean(inner):.2f}", f"{np.mean(top):.1f}", str(len(pairs))]


def text(found: Found, given: argparse.Namespace) -> str:
    """Curves of the first cell, and how alike curves are."""
    first = found["first, start 0"]
    layers = range(len(first[KEYS[0]]["values"]))
    columns = {key: first[key]["values"] for key in KEYS}
    columns |= {
        f"noise, {radius:g}": first[key]["noise_gain"]
        for key, radius in zip(KEYS, (given.eps, given.wide), strict=False)
    }
    curves = aligned(
        ["layer", *columns, ""], [[str(n), *(f"{one[n]:.2f}" for one in columns.values()), ""] for n in layers]
    )
    body = []
    for key in KEYS:

        def curve(name: str, key: str = key) -> Sequence[float]:
            return found[name][key]["values"]

        starts = [name for name in found if name.startswith("first, start")]
        others = [name for name in found if name.startswith("dataset")]
        pairs = {
            "other starts": list(itertools.combinations(starts, 2)),
            "other prompts": [("first, start 0", "other prompts")],
            "other datasets": list(itertools.combinations(["first, start 0", *others], 2)),
        }
        for what, names in pairs.items():
            if kept := [pair for pair in names if all(name in found for name in pair)]:
                body.append([*likeness([(curve(a), curve(b)) for a, b in kept]), f"{key}: {what}"])
        if "noise_gain" in first[key]:
            body.append([*likeness([(curve(name), found[name][key]["noise_gain"]) for name in found]), f"{key}: noise"])
            ratio = [np.array(found[name][key]["change"])[-1] / found[name][key]["noise_change"][-1] for name in found]
            body[-1][-1] += f", behind the last layer {np.mean(ratio):.1f} times smaller"
    header = ["ρ", "ρ inside", "of top 5", "pairs", ""]
    return "\n".join([*curves, "", *aligned(header, body)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes cells, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory (default: embedded)")
    parser.add_argument("--data", default="demo:closed,demo:arithmetic", help="datasets with commas")
    parser.add_argument("--out", default="runs/gains")
    parser.add_argument("--rows", type=int, default=6, help="prompts of a cell")
    parser.add_argument("--longest", type=int, default=24, help="tokens of a prompt, at most")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--wide", type=float, default=0.5)
    given = parser.parse_args(arguments)
    try:
        model = open_model(given.model)
        datasets = prompts(model, given.data, given.rows, given.longest)
        first, *others = datasets
        settings = {key: value for key, value in vars(given).items() if key not in ("out", "model", "data", "starts")}
        settings |= {
            "model": model.model_hash,
            "rows": {name: one.describe()["hash"] for name, one in datasets.items()},
        }
        cells = Cells.open(Path(given.out), settings)
        plan = {f"first, start {seed}": (half(datasets[first], 0), seed) for seed in range(given.starts)}
        plan |= {"other prompts": (half(datasets[first], 1), 0)}
        plan |= {f"dataset {name}": (half(datasets[name], 0), 0) for name in others}
        found = {}
        for name, (rows, seed) in plan.items():
            found[name] = cells(name, lambda rows=rows, seed=seed: cell(model, rows, seed, given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(found, given))
    write_json(
        Path(given.out) / "perturbation_gains.json",
        "jaxcrit.perturbation_gains",
        plain({"config": settings, "cells": found}),
    )
    return 0


if __name__ == "__main__":
    leave(main)
