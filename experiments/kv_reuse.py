"""One model over another's keys and values, on two kinds of prefixes: do both name the same layers, and which help?

    python experiments/kv_reuse.py --receiver=DIR --sender=RUN --boolq=FILE --dolly=FILE --delta=ANALYSIS --out=runs/kv

Prefixes are BoolQ's passages and Dolly's contexts, the question behind; the receiver's own answers are scored. Each
kind is a run of ``jaxcrit reuse`` in OUT/<kind>, so that an interrupted experiment goes on. Beside the front of both
kinds together (chosen on one half of the rows, shown on the other) stand its controls; of the curves of single layers
their correlation with each other, with the distances of the caches and with δ. Prints tables; writes OUT/kv_reuse.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.reuse import Reused, ReuseOptions, run_reuse
from jaxcrit.core.files import write_json
from jaxcrit.core.layers import LayerScores, read_scores
from jaxcrit.core.progress import bars
from jaxcrit.core.selections import span
from jaxcrit.models.model import open_model
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection.correlation import correlate

COUNTS = (0, 4, 6, 9, 12, 15, 20)
Entry = Mapping[str, Any]


def rows_of(kind: str, file: str) -> Iterator[dict[str, str]]:
    """Rows with a context in front and a question behind, as ``jaxcrit reuse --prefix=context`` takes them."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        context = row["passage"] if kind == "boolq" else row["context"]
        asked = f"{row['question']}? Answer yes or no." if kind == "boolq" else row["instruction"]
        if context:
            yield {"prefix": context, "prompt": f"{context}\n\n{asked}"}


def chosen_rows(kind: str, file: str, tokenizer: Any, count: int, prefix: tuple[int, int], rest: int) -> list[Any]:
    """The first rows whose context and question have so many tokens.

    Args:
        kind: ``boolq`` or ``dolly``.
        file: its rows.
        tokenizer: tokenizer of both models.
        count: number of rows.
        prefix: least and most tokens of a context.
        rest: most tokens of a question.
    """
    found = []
    for row in rows_of(kind, file):
        head, tail = (len(tokenizer(text)["input_ids"]) for text in (row["prefix"], row["prompt"]))
        if prefix[0] <= head <= prefix[1] and tail - head <= rest:
            found.append(row)
    return found[:count]


def pooled(runs: Sequence[Reused], half: str) -> dict[tuple[int, ...], tuple[float, float]]:
    """By set of layers, its mean damage over all kinds and the error of that; groups, none and random sets."""
    found: dict[tuple[int, ...], list[Entry]] = {}
    for run in runs:
        for one in (run.found["reused"], *run.found["groups"], *run.found["random"]):
            found.setdefault(tuple(one["layers"]), []).append(one[half])
    return {
        layers: (
            float(np.mean([one["kl"] for one in many])),
            float(np.sqrt(sum(one["stderr"] ** 2 for one in many)) / len(many)),
        )
        for layers, many in found.items()
        if len(many) == len(runs)
    }


def front(runs: Sequence[Reused], counts: Sequence[int]) -> list[dict[str, Any]]:
    """By count, the group that does least damage on the rows that choose, and its controls, on the others."""
    choose, test = pooled(runs, "choose"), pooled(runs, "test")
    depth, found = runs[0].found["num_layers"], []
    drawn = {tuple(one["layers"]) for one in runs[0].found["random"]}
    for count in counts:
        groups = [one for one in choose if len(one) == count and (not one or one[-1] - one[0] == count - 1)]
        later = [one for one in groups if one and one[0]]
        best = min(groups, key=lambda one: choose[one][0])
        best_later = min(later, key=lambda one: choose[one][0], default=None)
        controls = {"first": tuple(range(count)), "last": tuple(range(depth - count, depth)), "later": best_later}
        near = [test[one][0] for one in drawn if one in test and abs(len(one) - count) <= 1]
        found.append(
            {
                "count": count,
                "best": {"layers": list(best), "kl": test[best][0], "stderr": test[best][1]},
                **{
                    name: None if one is None else {"layers": list(one), "kl": test[one][0], "stderr": test[one][1]}
                    for name, one in controls.items()
                },
                "random": near,
            }
        )
    return found


def pairs(scores: Mapping[str, LayerScores]) -> list[dict[str, Any]]:
    """Correlation of damage with everything else."""
    names = [name for name in scores if name.endswith("kv_reuse")]
    told = []
    for first in names:
        for second, score in scores.items():
            if second != first and (second not in names or names.index(second) > names.index(first)):
                pair = correlate(scores[first], score)
                facts = {"rho": pair.rho, "p_shift": pair.p_shift, "given_depth": pair.partial}
                told.append({"first": first, "second": second, **facts, "p_given_depth": pair.p_partial})
    return told


def shown(line: Entry | None) -> str:
    return "-" if line is None else f"{line['kl']:.4f} ± {line['stderr']:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both kinds and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("receiver", "sender", "boolq", "dolly", "delta"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--prefix", type=int, nargs=2, default=(50, 90))
    parser.add_argument("--rest", type=int, default=22)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--random", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=4)
    asked = parser.parse_args(arguments)
    tokenizer, runs = open_model(asked.receiver).tokenizer, {}
    for kind in ("boolq", "dolly"):
        rows = chosen_rows(kind, getattr(asked, kind), tokenizer, asked.count, tuple(asked.prefix), asked.rest)
        options = ReuseOptions(
            receiver=asked.receiver,
            sender=asked.sender,
            prefix="context",
            max_new_tokens=asked.max_new_tokens,
            random=asked.random,
            batch_size=asked.batch_size,
            out=str(asked.out / kind),
        )
        runs[kind] = run_reuse(options, rows=rows, progress=bars)
        print(f"{kind}: {len(rows)} rows", flush=True)
    made = list(runs.values())
    lines = front(made, sorted({*(c for c in COUNTS if c < made[0].found["num_layers"])}))
    scores = {f"{kind}:{key}": score for kind, run in runs.items() for key, score in run.scores.items()}
    if asked.delta:
        found = read_scores(Path(asked.delta) / "scores.json", deletions=True)
        scores |= {key: found[key] for key in ("delta", "delta_debiased", "step") if key in found}
    related = pairs(scores)
    table = [
        [
            str(line["count"]),
            span(line["best"]["layers"]) or "none",
            *(shown(line[name]) for name in ("best", "first", "later", "last")),
            f"{np.mean(line['random']):.4f} ({min(line['random']):.4f})" if line["random"] else "-",
        ]
        for line in lines
    ]
    print(
        "\n".join(
            aligned(["n", "best group", "KL", "first:n", "from above 0", "last:n", "random, mean (least)"], table)
        )
    )
    rows = [
        [one["first"], one["second"], *(f"{one[key]:+.2f}" for key in ("rho", "p_shift", "given_depth"))]
        for one in related
    ]
    print("\n".join(aligned(["damage", "against", "rho", "p (shifts)", "given depth"], rows)))
    alone = {kind: run.scores["kv_reuse"] for kind, run in runs.items()}
    for kind, score in alone.items():
        top, run = [int(layer) for layer in score.ranking()[:3]], runs[kind].found
        share = score.values[top].sum() / score.values.sum()
        print(f"{kind}: layers {span(sorted(top))} hold {share:.0%}; choice {span(run['choice']['layers'])}")
    content = {
        "counts": {kind: run.found["rows"] for kind, run in runs.items()},
        "identical": {kind: run.found["identical"] for kind, run in runs.items()},
        "reused": {kind: run.found["reused"] for kind, run in runs.items()},
        "choice": {kind: run.found["choice"] for kind, run in runs.items()},
        "most_damaging": {kind: run.found["most_damaging"] for kind, run in runs.items()},
        "alone": {kind: {"values": s.values.tolist(), "stderr": s.stderr.tolist()} for kind, s in alone.items()},
        "front": lines,
        "correlation": related,
    }
    write_json(asked.out / "kv_reuse.json", "jaxcrit.experiment", content)
    return 0


if __name__ == "__main__":
    leave(main)
