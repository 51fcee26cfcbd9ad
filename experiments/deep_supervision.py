"""Does supervising inner layers help a model with a new language? A renamed one, with plain training and a control.

    python experiments/deep_supervision.py --out=runs/supervision --minutes=50

The embedded model is trained on a language in which every token is renamed (`experiments/renamed_language.py`), all
weights, by several ways: ``plain``; ``logits``: a low layer is to say the prompt, and a middle one the answer, in the
known language (early exits under the frozen head); ``features``: pooled states of these layers are to be those of the
known language's row; ``exchanged``: as ``logits``, at layers where it should not help. What an exchanged pair gains too
is no merit of the layers: part of it is more gradient, and more of the known language, at each step. Rows beside a row
are tokens as well, so ``plain`` is also trained for as many steps as take the tokens of ``logits``.

Each cell is one way and one seed (rows, their order, the new embedding). After some of its steps both languages are
tested: loss per response token, and the share of answers that greedy decoding gets exactly right. Cells are kept in OUT
and never made again; with ``--minutes`` it stops after the cell in which these are over, and says what is left. The
table gives means over seeds with Student's 95 %, and differences from ``plain`` seed by seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells
from entry import leave
from renamed_language import SCALE, answered, english, extended, language

from jaxcrit.commands.finetune import read_examples, run_finetune
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.evaluation.intervals import t_interval
from jaxcrit.models.model import open_model
from jaxcrit.reporting.tables import aligned

WAYS = ("plain", "logits", "features", "exchanged")
LANGUAGES = ("new", "known")
EQUAL = "plain, equal tokens"  # with logits


def supervised(way: str, given: argparse.Namespace) -> str:
    """``--supervise`` of a way."""
    low, high = (int(layer) for layer in given.layers.split(","))
    wrong_low, wrong_high = (int(layer) for layer in given.exchanged.split(","))
    return {
        "plain": "",
        "logits": f"{low}:logits:english_prompt,{high}:logits:english_response",
        "features": f"{low}:feature:english_prompt,{high}:feature:english_prompt+english_response",
        "exchanged": f"{wrong_low}:logits:english_prompt,{wrong_high}:logits:english_response",
    }[way]


def asked(way: str, seed: int, steps: int, given: argparse.Namespace) -> FinetuneOptions:
    """Options of a cell's training."""
    out = Path(given.out)
    return FinetuneOptions(
        model=extended(out / f"model-{seed}", SCALE, seed),
        data=str(out / f"train-{seed}.jsonl"),
        eval_data=str(out / "test.jsonl"),
        out=str(out / "runs" / f"{way}-{seed}"),
        layers="all",
        train_embeddings=True,
        train_norms=True,
        train_head=True,
        supervise=supervised(way, given),
        steps=steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        seed=seed,
        eval_every=given.every,
        checkpoint_every=given.every,
        keep=steps // given.every + 1,
        remat=False,
    )


def write_rows(given: argparse.Namespace) -> dict[str, Any]:
    """Files of rows to train on by seed, and to test on, which all seeds share; gives the latter by language."""
    out = Path(given.out)
    tokenizer = open_model(extended(out / "model-0", SCALE, 0)).tokenizer
    for seed in range(given.seeds):
        write_text(out / f"train-{seed}.jsonl", json_lines(language(tokenizer, given.rows, seed, "train")))
    tests = language(tokenizer, given.tests, 0, "test")
    write_text(out / "test.jsonl", json_lines(tests))
    return {"new": tests, "known": english(tests)}


def cell(way: str, seed: int, tests: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Trains by one way; both languages after some of the steps, what the auxiliaries lost, tokens of a step."""
    steps = given.steps * (given.longer if way == "plain" else 1)
    options = asked(way, seed, steps, given)
    found = run_finetune(options)
    by_step = {}
    for step in range(given.every, steps + 1, given.every):
        model = open_model(options.out, step=str(step))
        by_step[step] = {name: answered(model, rows) for name, rows in tests.items()}
    ends = [row for row in found.metrics if row["kind"] == "eval"][-1]
    return {
        "by_step": by_step,
        "auxiliaries": [ends[key] for key in sorted(ends) if key.startswith("aux_") and not key.endswith("tokens")],
        "tokens": tokens_of_a_step(options),
        "seconds": found.run["time"]["training_seconds"],
    }


def tokens_of_a_step(options: FinetuneOptions) -> float:
    """Mean tokens that a step runs on, rows beside among them, up to whatever layer."""
    from jaxcrit.core.auxiliaries import names_of, parse_supervise

    model = open_model(options.model)
    names = names_of(parse_supervise(options.supervise, 1.0, model.config.num_layers))
    examples = read_examples(options, model, None, names)[0].examples
    each = [len(row.token_ids) + sum(len(row.beside[name].token_ids) for name in names) for row in examples]
    return options.batch_size * float(np.mean(each))


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean and half of Student's 95 %; the mean alone of one value."""
    low, high = t_interval(list(values))
    half = f" ± {(high - low) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{half}"


def value(found: Mapping[str, Any], step: int, name: str, kind: str) -> float:
    """A figure of a cell after a step."""
    return float(found["by_step"][str(step)][name][kind])


def equal_step(cells: Mapping[tuple[str, int], Mapping[str, Any]], seed: int, step: int, given: Any) -> int:
    """The step of ``plain`` that has seen the tokens of ``logits`` after a step, to the nearest one that was tested."""
    ratio = cells["logits", seed]["tokens"] / cells["plain", seed]["tokens"]
    return min(given.every * round(step * ratio / given.every), given.steps * given.longer)


def text(cells: Mapping[tuple[str, int], Mapping[str, Any]], given: argparse.Namespace) -> str:
    """Both languages early and late, by way; and differences from plain training at equal steps, seed by seed."""
    header = ["step", "seeds", *(f"{name}: {kind}" for name in LANGUAGES for kind in ("loss", "exact")), "way"]
    body, apart = [], []
    for step in (given.every, given.steps):
        for way in (*WAYS, EQUAL):
            plain_seeds = {seed for one, seed in cells if one == "plain"}
            of = {"plain, equal tokens": "plain"}.get(way, way)
            seeds = sorted(seed for one, seed in cells if one == ("logits" if way == EQUAL else of))
            seeds = [seed for seed in seeds if seed in plain_seeds or way != EQUAL]
            if not seeds:
                continue
            at = {seed: equal_step(cells, seed, step, given) if way == EQUAL else step for seed in seeds}
            row, less = [], []
            for name in LANGUAGES:
                for kind in ("loss", "exact"):
                    mine = {seed: value(cells[of, seed], at[seed], name, kind) for seed in seeds}
                    row.append(spread(list(mine.values())))
                    both = [
                        one - value(cells["plain", seed], step, name, kind)
                        for seed, one in mine.items()
                        if seed in plain_seeds
                    ]
                    less.append(spread(both, sign="+") if both else "-")
            steps = "-".join(map(str, sorted(set(at.values()))))
            body.append([steps, str(len(seeds)), *row, way])
            if way != "plain" and plain_seeds & set(seeds):
                apart.append([steps, str(len(plain_seeds & set(seeds))), *less, f"{way}, less plain at {step}"])
    cost = [
        [f"{np.mean([one['tokens'] for one in mine]):.0f}", *_means(mine), way]
        for way in WAYS
        if (mine := [found for (one, _), found in cells.items() if one == way])
    ]
    told = ["\n".join(aligned(header, body)), "\n".join(aligned(header, apart))]
    return "\n\n".join([*told, "\n".join(aligned(["tokens a step", "auxiliaries at the end", "way"], cost))])


def _means(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    each = np.array([one["auxiliaries"] for one in cells], float)
    return [", ".join(f"{mean:.2f}" for mean in each.mean(axis=0)) or "-"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes cells, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/supervision")
    parser.add_argument("--layers", default="2,8", help="which say the prompt and the answer")
    parser.add_argument("--exchanged", default="13,4", help="the same for the control")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between tests; the first is early")
    parser.add_argument("--longer", type=int, default=3, help="times the steps that plain goes on, for equal tokens")
    parser.add_argument("--rows", type=int, default=400, help="rows of each family of tasks to train on")
    parser.add_argument("--tests", type=int, default=16, help="rows of each family to test on")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop after the cell in which these are over; 0: never"
    )
    given = parser.parse_args(arguments)
    free = ("out", "ways", "seeds", "minutes")
    settings = {key: value for key, value in vars(given).items() if key not in free}
    began, left = time.monotonic(), []
    try:
        cells, tests, found = Cells.open(Path(given.out), settings), write_rows(given), {}
        for seed in range(given.seeds):
            for way in given.ways.split(","):
                name, over = f"{way}-{seed}", given.minutes and time.monotonic() - began > 60 * given.minutes
                if over and not (cells.out / "cells" / f"{name}.json").exists():
                    left.append(name)
                    continue
                found[way, seed] = cells(name, lambda way=way, seed=seed: cell(way, seed, tests, given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(found, given))
    if left:
        print(f"{len(left)} cells are not made yet; the same command goes on")
    kept = {"config": settings, "cells": {f"{way}-{seed}": one for (way, seed), one in found.items()}, "left": left}
    write_json(Path(given.out) / "deep_supervision.json", "jaxcrit.deep_supervision", plain(kept))
    return 0


if __name__ == "__main__":
    leave(main)
