"""Which layers does a model need for facts, and which for sums? Greedy accuracy without each layer, both tasks at once.

    python experiments/layer_accuracy.py --model=DIR_OR_GGUF --out=runs/accuracy

Facts are true ones of four kinds, of which those count that the model knows (its greedy answer begins with them); sums
are one-digit sums and differences behind five examples. A row is right where greedy decoding gives its response, read
off one forward pass a layer (``jaxcrit ablate --score=greedy``): half a pass, for what lies below the layer is shared.
Everything is kept in OUT, and an interrupted experiment goes on where it stopped. Prints accuracy by layer with paired
errors, and how alike the two tasks rank the layers; OUT/layer_accuracy.json holds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.ablate import AblateOptions, report, run_ablate
from jaxcrit.commands.generate import GenerateOptions, run_generate
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, write_json, write_text
from jaxcrit.models.model import open_model
from jaxcrit.reporting.tables import aligned, p_value

CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo"},
    **{"China": "Beijing", "Russia": "Moscow", "England": "London", "Portugal": "Lisbon", "Greece": "Athens"},
    **{"Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo"},
    **{"Denmark": "Copenhagen", "Finland": "Helsinki", "Ireland": "Dublin", "Belgium": "Brussels", "Egypt": "Cairo"},
    **{"Kenya": "Nairobi", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa"},
    **{"Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut"},
    **{"Thailand": "Bangkok", "Vietnam": "Hanoi", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia"},
    **{"Serbia": "Belgrade", "Croatia": "Zagreb", "Iceland": "Reykjavik", "Nepal": "Kathmandu", "Libya": "Tripoli"},
}
LANGUAGES = {
    **{"France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Portugal": "Portuguese"},
    **{"Japan": "Japanese", "China": "Chinese", "Russia": "Russian", "Poland": "Polish", "Greece": "Greek"},
    **{"Sweden": "Swedish", "Norway": "Norwegian", "Denmark": "Danish", "Finland": "Finnish", "Hungary": "Hungarian"},
    **{"Turkey": "Turkish", "Brazil": "Portuguese", "Mexico": "Spanish", "Egypt": "Arabic", "Thailand": "Thai"},
}
LANDMARKS = {
    "Eiffel Tower": "Paris",
    "Colosseum": "Rome",
    "Brandenburg Gate": "Berlin",
    "Big Ben clock tower": "London",
    "Acropolis": "Athens",
    "Kremlin": "Moscow",
    "Louvre museum": "Paris",
    "Statue of Liberty": "New York",
    "Sagrada Familia": "Barcelona",
    "Forbidden City": "Beijing",
    "Prado museum": "Madrid",
    "Hagia Sophia": "Istanbul",
}
CONTINENTS = {
    **{"Kenya": "Africa", "Nigeria": "Africa", "Brazil": "South America", "Peru": "South America", "Japan": "Asia"},
    **{"India": "Asia", "Germany": "Europe", "Poland": "Europe", "Ghana": "Africa", "Thailand": "Asia"},
    **{"Sweden": "Europe", "Chile": "South America"},
}
KINDS = (
    ("The capital of {} is", CAPITALS),
    ("The official language of {} is", LANGUAGES),
    ("The {} is in the city of", LANDMARKS),
    ("{} is a country on the continent of", CONTINENTS),
)
SHOTS = "5 + 2 = 7\n3 + 1 = 4\n8 - 3 = 5\n6 + 3 = 9\n9 - 4 = 5\n"
# SYSTEMS_B 7.4, the prototype on SmolLM2-135M-Instruct: accuracy lost without each of 30 layers, 50 facts and 60 sums.
BEFORE = {
    "facts": "1.00 1.00 .76 .08 .44 .04 .44 .50 .78 .04 .06 1.00 .62 .28 .24 .24 .26 .10 .36 .14 .20 .84 .56 .96 .82"
    " .20 .14 .46 .14 .90",
    "sums": ".63 .57 .33 .02 -.05 -.03 -.03 .22 .22 .08 .45 .47 .15 .45 .47 .08 .18 .12 .30 .33 .50 .40 .23 .28 .43 .15"
    " .15 .02 .03 .08",
}


def facts() -> list[dict[str, str]]:
    """All facts as rows."""
    return [
        {"prompt": prompt.format(subject), "response": f" {answer}"}
        for prompt, pairs in KINDS
        for subject, answer in pairs.items()
    ]


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """One-digit sums and differences of one digit, drawn; none of the examples in front is among them."""
    every = [(a, "+", b, a + b) for a in range(1, 9) for b in range(1, 10 - a)]
    every += [(a, "-", b, a - b) for a in range(2, 10) for b in range(1, a)]
    every = [one for one in every if f"{one[0]} {one[1]} {one[2]} = {one[3]}\n" not in SHOTS]
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    return [{"prompt": f"{SHOTS}{a} {sign} {b} =", "response": f" {c}"} for a, sign, b, c in (every[i] for i in chosen)]


def known(model: str, out: Path, most: int) -> list[dict[str, str]]:
    """Facts whose answer is how the model goes on greedily."""
    rows = facts()
    write_rows(out / "all_facts.jsonl", rows)
    asked = GenerateOptions(
        model=model, data=str(out / "all_facts.jsonl"), template="none", max_new_tokens=6, out=str(out / "asked")
    )
    texts = run_generate(asked).texts
    found = [row for row, text in zip(rows, texts, strict=True) if text.startswith(row["response"])]
    if not found:
        raise UserError(f"--model={model}: knows none of the {len(rows)} facts; there is nothing to lose")
    print(f"{len(found)} of {len(rows)} facts are known, {min(most, len(found))} taken", file=sys.stderr, flush=True)
    return found[:most] if len(found) <= most else [found[i] for i in np.linspace(0, len(found) - 1, most).astype(int)]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, hub id or GGUF file")
    parser.add_argument("--out", default="runs/accuracy")
    parser.add_argument("--facts", type=int, default=50, help="known facts at most")
    parser.add_argument("--sums", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=20)
    given = parser.parse_args(arguments)
    out = Path(given.out)
    try:
        open_model(given.model)  # one that is not there is refused before anything is written
        tasks = {"facts": known(given.model, out, given.facts), "sums": sums(given.sums, given.seed)}
        for name, rows in tasks.items():
            write_rows(out / f"{name}.jsonl", rows)
        found = run_ablate(
            AblateOptions(
                model=given.model,
                data=",".join(str(out / f"{name}.jsonl") for name in tasks),
                template="none",
                methods="skip",
                score="greedy",
                batch_size=given.batch_size,
                out=str(out / "ablate"),
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = {name: found.tasks[name]["ablation_skip_greedy"] for name in tasks}
    depth = next(iter(scores.values())).num_layers
    before = {name: [float(value) for value in text.split()] for name, text in BEFORE.items()}
    header, rows = ["layer"], [[str(layer)] for layer in range(depth)]
    for name, score in scores.items():
        header += [f"{name} lost ± s.e.", "p (Holm)", *(["prototype"] if depth == len(before[name]) else [])]
        for layer, row in enumerate(rows):
            lost = score.meta["unchanged"] - score.values[layer]
            row += [f"{lost:.2f} ± {score.stderr[layer]:.2f}", p_value(score.meta["p_holm"][layer])]
            row += [f"{before[name][layer]:.2f}"] if depth == len(before[name]) else []
    print("\n".join(aligned([*header, ""], [[*row, ""] for row in rows])))
    print(next(section.text() for section in report(found).sections if section.title == "Tasks"))
    content = {
        "config": {key: value for key, value in vars(given).items() if key not in ("model", "out")},
        "model": {key: found.run["model"].get(key) for key in ("hash", "num_layers", "width", "dequantised_from")},
        "tasks": {name: score.to_json() for name, score in scores.items()},
        "likeness": found.run["result"]["tasks"],
        "block_evaluations": found.run["result"]["block_evaluations"],
        "seconds": found.run["time"]["seconds"],
    }
    write_json(out / "layer_accuracy.json", "jaxcrit.layer_accuracy", plain(content))
    return 0


if __name__ == "__main__":
    leave(main)
