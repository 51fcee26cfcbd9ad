"""Are the critical layers of an instruct model those of its base? (The paper's second open question, in small.)

    python experiments/base_and_instruct.py --out=runs/phases

For every seed two models of the embedded one's shape: a *base*, trained from nothing on running text (every token
counts, no marks of an instruction), and the *instruct* model that comes of it by training on the same tasks as
instructions (responses count, with the chat template). δ of both on six families of prompts, as plain text and with
the template.

Two curves of one model family are alike if T is high: Spearman's correlation given depth, mean over families. What a
base hands on is T of base and instruct of one seed, beside T of different seeds, which share all but weights. p of a
pair is by circular shifts, turned end to end too, all families together (as in pooled_test.py).

A cell is one model; an interrupted experiment goes on. Prints, and writes OUT/base_and_instruct.json, of which
``--read=FILE`` prints the tables again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import demo_recipe as recipe
import demo_tokenizer
import jax
import numpy as np
import tokenizers
from cells import Cells, minutes
from entry import leave, told
from pooled_test import pooled, turned

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import LayerScores
from jaxcrit.data import demo
from jaxcrit.evaluation.intervals import t_interval
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.reporting.tables import aligned, number, p_value
from jaxcrit.studies.analysis import run_analysis

FORMAT = "jaxcrit.base_and_instruct"
QUICK = {"seeds": "0", "steps": 20, "prompts": 24}
FREE = ("out", "read", "quick", "minutes")
KEYS, TOP = ("delta_debiased", "delta"), 3
TEMPLATES = {"plain": "none", "template": "auto"}


def trained(
    weights: recipe.Weights, config: ModelConfig, batch: Callable[[int], recipe.Batch], first: int, last: int, end: int
) -> recipe.Weights:
    """Weights after the steps ``first`` to ``last`` of a schedule that settles from step ``end`` on."""
    update = jax.jit(functools.partial(recipe.update, config=config, steps=end, rate=0.02), donate_argnums=(0, 1, 2))
    momentum, moment = ({path: np.zeros(value.shape, np.float32) for path, value in weights.items()} for _ in range(2))
    began = time.perf_counter()
    for step in range(first, last):
        if step == end and first < end:
            weights = recipe.soften(weights)
        weights, momentum, moment, loss = update(weights, momentum, moment, batch(step), np.int32(step))
        if (step + 1) % 200 == 0 or step + 1 == last:
            gone = time.perf_counter() - began
            print(f"step {step + 1} of {last}, loss {float(loss):.3f}, {gone:.0f} s", file=sys.stderr, flush=True)
    return weights


def measured(given: argparse.Namespace, model: Path, encode: recipe.Encode, out: Path) -> dict[str, Any]:
    """Exact answers of a model in the form it learnt last, and its δ by form of the prompts and by family."""
    from train_demo_model import exact_match

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    families = given.families.split(",")
    right = exact_match(load(open_checkpoint(model)), tokenizer, min(given.prompts, 100), families, encode)
    found: dict[str, Any] = {"exact": {family: hits / asked for family, (hits, asked) in right.items()}}
    for name, template in TEMPLATES.items():
        analysis = run_analysis(
            AnalyzeOptions(
                model=str(model),
                data=",".join(f"demo:{family}" for family in families),
                template=template,
                limit=given.prompts,
                out=str(out / name),
            )
        )
        found[name] = {
            family: {key: one.scores[key].to_json() | {"meta": {"window": 5}} for key in KEYS}
            for family, one in analysis.datasets.items()
        }
    return found


def base(given: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    """Trains a base from nothing, exports and measures it."""
    from train_demo_model import export

    tokenizer = demo_tokenizer.build()
    hf = recipe.hf_config(tokenizer.get_vocab_size(), given.layers, given.width)
    config = ModelConfig.from_hf(hf, "base")
    settle = min(recipe.SETTLE_STEPS, given.steps)
    batch = functools.partial(
        recipe.batch_at, tokenizer, seed, steps=given.steps, encode=recipe.encode_text, prompt_weight=1.0
    )
    weights = trained(recipe.initial_weights(config, seed), config, batch, 0, given.steps + settle, given.steps)
    (out / "model").mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        export(Decoder(config, weights), hf, tokenizer, out / "model")
    return measured(given, out / "model", recipe.encode_text, out)


def instruct(given: argparse.Namespace, seed: int, before: Path, out: Path) -> dict[str, Any]:
    """Trains a base on, on instructions, as long as the base settled; exports and measures it."""
    from train_demo_model import export

    tokenizer = demo_tokenizer.build()
    hf = recipe.hf_config(tokenizer.get_vocab_size(), given.layers, given.width)
    decoder = load(open_checkpoint(before / "model"), dtype="float32")
    settle = min(recipe.SETTLE_STEPS, given.steps)
    batch = functools.partial(recipe.batch_at, tokenizer, seed + 1000, steps=given.steps)
    weights = trained(decoder.weights(), decoder.config, batch, given.steps, given.steps + settle, given.steps)
    (out / "model").mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        export(Decoder(decoder.config, weights), hf, tokenizer, out / "model")
    return measured(given, out / "model", recipe.encode, out)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Makes the cells that are not there yet.

    Raises:
        UserError: a width that heads of 32 do not fill.
    """
    if given.width < 32 or given.width % 32:
        raise UserError(f"--width={given.width}: expected a multiple of 32, which is the size of a head")
    out, began = Path(given.out), time.perf_counter()
    settings = {key: value for key, value in vars(given).items() if key not in FREE}
    cells = Cells.open(out, settings)
    jobs: dict[str, Any] = {}
    for seed in map(int, given.seeds.split(",")):
        folder = out / "runs" / f"base-{seed}"
        jobs[f"base-{seed}"] = functools.partial(base, given, seed, folder)
        jobs[f"instruct-{seed}"] = functools.partial(instruct, given, seed, folder, out / "runs" / f"instruct-{seed}")
    found = {}
    for key, make in jobs.items():
        late = bool(given.minutes) and time.perf_counter() - began > 60 * given.minutes
        if not late or (out / "cells" / f"{key}.json").exists():
            found[key] = cells(key, make)
    return plain({"settings": settings, "planned": list(jobs), "cells": found, "time": cells.spent()})


def curves(cell: Mapping[str, Any], form: str, key: str) -> dict[str, LayerScores]:
    """The score ``key`` of a model by family of prompts, each ``[L]``."""
    return {family: LayerScores.from_json(key, one[key]) for family, one in cell[form].items()}


def alike(one: Mapping[str, LayerScores], other: Mapping[str, LayerScores]) -> tuple[float, float, float]:
    """T of two models, its p, and the share of the `TOP` lowest layers that they have in common, mean over families."""
    valid = np.logical_and.reduce([score.valid for score in (*one.values(), *other.values())])
    layers = np.flatnonzero(valid)
    x, y = (np.array([turned(score)[layers] for score in found.values()]) for found in (one, other))
    found = pooled(x, [row[None] for row in y], layers)
    tops = [[set(np.argsort(-row)[:TOP].tolist()) for row in rows] for rows in (x, y)]
    shared = np.mean([len(a & b) / TOP for a, b in zip(*tops, strict=True)])
    return found.statistic, found.p, float(shared)


def pairs(cells: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str, str]]]:
    """By kind, pairs of (model, form, model, form)."""
    seeds = sorted(name[5:] for name in cells if name.startswith("base-") and f"instruct-{name[5:]}" in cells)
    found: dict[str, list[tuple[str, str, str, str]]] = {
        "base and its instruct": [(f"base-{s}", "plain", f"instruct-{s}", "template") for s in seeds],
        "the same, both as plain text": [(f"base-{s}", "plain", f"instruct-{s}", "plain") for s in seeds],
        "the same, both with the template": [(f"base-{s}", "template", f"instruct-{s}", "template") for s in seeds],
        "instruct, plain text and template": [(f"instruct-{s}", "plain", f"instruct-{s}", "template") for s in seeds],
        "base and another's instruct": [
            (f"base-{a}", "plain", f"instruct-{b}", "template") for a, b in itertools.permutations(seeds, 2)
        ],
        "bases of two seeds": [
            (f"base-{a}", "plain", f"base-{b}", "plain") for a, b in itertools.combinations(seeds, 2)
        ],
        "instruct of two seeds": [
            (f"instruct-{a}", "template", f"instruct-{b}", "template") for a, b in itertools.combinations(seeds, 2)
        ],
    }
    return {kind: some for kind, some in found.items() if some}


def report(content: Mapping[str, Any]) -> str:
    """How alike models are, by kind of pair; what each answers; minutes."""
    cells, lines = content["cells"], []
    for key in KEYS:
        body = []
        for kind, some in pairs(cells).items():
            found = [alike(curves(cells[a], f, key), curves(cells[b], g, key)) for a, f, b, g in some]
            t = np.array([one[0] for one in found])
            interval = t_interval(t) if len(t) == len({pair[0] for pair in some}) and len(t) > 2 else (np.nan, np.nan)
            body.append(
                [
                    number(float(t.mean()), 2),
                    "" if np.isnan(interval[0]) else "{} {}".format(*(number(end, 2) for end in interval)),
                    " ".join(p_value(one[1]) for one in found),
                    f"{np.mean([one[2] for one in found]):.2f}",
                    kind,
                ]
            )
        lines += [f"{key}:", *aligned(["T", "95 %, seeds", "p of each pair", f"top {TOP} shared", ""], body), ""]
    exact = [[*(f"{value:.2f}" for value in one["exact"].values()), name] for name, one in cells.items()]
    first = next(iter(cells.values()), {"exact": {}})
    lines += aligned([*first["exact"], "exact answers of"], exact)
    parts = {part: (part, sum(name.startswith(part) for name in content["planned"])) for part in ("base", "instruct")}
    lacking = [name for name in content["planned"] if name not in cells]
    return "\n".join(
        [
            *lines,
            *(["", "not run: " + ", ".join(lacking)] if lacking else []),
            "",
            minutes(content["time"]["seconds"], parts),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/phases")
    parser.add_argument("--read", default="", help="print the tables of this file; nothing is run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2000, help="of the base, before it settles")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--prompts", type=int, default=300, help="of each family")
    parser.add_argument("--families", default=",".join(demo.FAMILIES), help="of prompts, with commas")
    parser.add_argument("--minutes", type=float, default=0, help="begin no cell after so many; 0 for no end")
    parser.add_argument("--quick", action="store_true", help=f"the same in little: {QUICK}")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    return told(given, FORMAT, measure, report)


if __name__ == "__main__":
    leave(main)
