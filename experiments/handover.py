"""Do dips of δ lie where interventions say that something happens, or would other layers fit as well?

    python experiments/handover.py --table2=runs/table2/evidence_table2.json --out=runs/handover \
        --interventions=runs/trace:trace_last,runs/accuracy/ablate/facts:ablation_skip_greedy

Scores of the model as it is come from what evidence_table2.py wrote: of every dataset δ, `step`, and the loss without
each layer. ``--interventions`` are scores of the same model that are not of these datasets: causal tracing,
greedy accuracy on facts or sums without each layer (layer_accuracy.py).

Two statistics, both means over datasets. T: Spearman's correlation given depth between a score and an intervention. D:
the rank, given depth, that the intervention has in the ``--dips`` lowest interior minima of the score (0: as in any
layer; in standard deviations over layers). High is critical in both. The null moves interventions together against all
scores by every circular shift, turned end to end too, as in pooled_test.py; p is two-sided and never below 1/(2V).
Prints, and writes OUT/handover.json, of which ``--read=FILE`` prints the table again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_table2
import numpy as np
from entry import leave, told
from pooled_test import moved, pooled, turned

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, read_json
from jaxcrit.core.layers import read_scores, score_of
from jaxcrit.core.pages import peak_gib
from jaxcrit.reporting.tables import aligned, number, p_value
from jaxcrit.selection.correlation import given_depth

FORMAT = "jaxcrit.handover"
KEYS = ("delta", "delta_debiased", "step", "step_debiased")
LOSS = "ablation_skip"  # of each dataset itself


def minima(values: np.ndarray, count: int) -> np.ndarray:
    """Places ``[<= count]`` of the highest interior maxima of ``values`` ``[V]``, in which high is critical.

    A curve without any has none: its ends say where it leads, not where it turns.
    """
    inside = np.flatnonzero((values[1:-1] > values[:-2]) & (values[1:-1] >= values[2:])) + 1
    return np.sort(inside[np.argsort(-values[inside], kind="stable")][:count])


def at_dips(scores: np.ndarray, curves: np.ndarray, layers: np.ndarray, count: int) -> tuple[float, float]:
    """D and its p.

    Args:
        scores: ``[D, V]`` of every dataset, high values critical.
        curves: ``[D, V]`` of the intervention beside each.
        layers: ``[V]`` index of each layer.
        count: dips of each dataset.
    """
    ranks = given_depth(curves, layers) * np.sqrt(len(layers))  # of length 1 before, so of deviation 1
    places = [minima(row, count) for row in scores]
    if not all(len(row) for row in places):
        return float("nan"), float("nan")
    null = np.mean([moved(row)[:, chosen].mean(axis=1) for row, chosen in zip(ranks, places, strict=True)], axis=0)
    return float(null[0]), float(np.mean(np.abs(null) >= abs(null[0]) - 1e-12))


def beside(content: Mapping[str, Any], given: Sequence[str], count: int) -> dict[str, Any]:
    """Both statistics of every score with every intervention.

    Args:
        content: of evidence_table2.json.
        given: ``RUN:KEY`` of further interventions.
        count: dips of each dataset.

    Raises:
        UserError: no scores of the model in it, or an intervention of another model.
    """
    base, _ = evidence_table2.read(content)
    if not base:
        raise UserError("evidence_table2.json: expected scores of the model on one dataset at least; none is complete")
    curves = {LOSS: [one[LOSS] for one in base.values()]}
    for spec in given:
        run, _, key = spec.rpartition(":")
        if not run:
            raise UserError(f"--interventions={spec}: expected RUN:KEY, such as runs/trace:trace_last")
        score = score_of(read_scores(run), key, run)
        theirs, ours = score.meta.get("model_hash"), content["settings"]["model_hash"]
        if theirs != ours:
            raise UserError(f"{run}: is of model {str(theirs)[:12]}, and --table2 of {ours[:12]}; give one of the same")
        curves[f"{Path(run).name}:{key}"] = [score] * len(base)
    rows = []
    for name, scores in curves.items():
        for key in KEYS:
            valid = np.logical_and.reduce([one[key].valid for one in base.values()] + [one.valid for one in scores])
            layers = np.flatnonzero(valid)
            x = np.array([turned(one[key])[layers] for one in base.values()])
            y = np.array([turned(one)[layers] for one in scores])
            found = pooled(x, [row[None] for row in y], layers)
            d, p_d = at_dips(x, y, layers, count)
            dips = [layers[minima(row, count)].tolist() for row in x]
            rows.append(
                {
                    "intervention": name,
                    "score": key,
                    "t": found.statistic,
                    "p": found.p,
                    "floor": found.floor,
                    "raw": found.raw,
                    "by_dataset": found.by_dataset,
                    "d": d,
                    "p_d": p_d,
                    "dips": dips,
                    "layers": [int(layers[0]), int(layers[-1])],
                }
            )
    return {"datasets": list(base), "count": count, "rows": rows, "model_hash": content["settings"]["model_hash"]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What `main` is asked to reckon."""
    if not given.table2 or given.dips < 1:
        raise UserError("expected --table2=FILE, evidence_table2.json, and --dips of 1 or more")
    began = time.perf_counter()
    table, interventions = read_json(Path(given.table2), evidence_table2.FORMAT), names(given.interventions)
    content = beside(table, interventions, given.dips)
    spent = dict(took(Path(one.rpartition(":")[0])) for one in interventions)
    spent["handover"] = {"seconds": time.perf_counter() - began, "peak_gib": peak_gib()}
    content["time"] = {"seconds": {name: one["seconds"] for name, one in spent.items()}}
    content["time"]["peak_gib"] = max(one.get("peak_gib", 0) for one in spent.values())
    Path(given.out).mkdir(parents=True, exist_ok=True)
    return plain(content)


def names(text: str) -> list[str]:
    """Parts of a list with commas."""
    return [one for one in text.split(",") if one]


def took(run: Path) -> tuple[str, Mapping[str, Any]]:
    """Folder of the run that left these scores (of a part, a folder up), and its time: `seconds`, `peak_gib`."""
    folder = run if (run / "run.json").exists() else run.parent
    if not (folder / "run.json").exists():
        return str(folder), {"seconds": 0.0}
    return str(folder), json.loads((folder / "run.json").read_text(encoding="utf-8"))["time"]


def report(content: Mapping[str, Any]) -> str:
    """The table, and the dips that it is about."""
    head = ["T", "p", "raw", *(name[:6] for name in content["datasets"]), "D", "p", ""]
    body = [
        [
            number(row["t"], 2),
            p_value(row["p"]),
            number(row["raw"], 2),
            *(number(value, 2) for value in row["by_dataset"]),
            number(row["d"], 2),
            p_value(row["p_d"]),
            f"{row['score']}, {row['intervention']}",
        ]
        for row in content["rows"]
    ]
    first = [row for row in content["rows"] if row["intervention"] == LOSS]
    dips = [[*(",".join(map(str, one)) for one in row["dips"]), row["score"]] for row in first]
    floor = content["rows"][0]["floor"]
    told = f"{len(content['datasets'])} datasets, {content['count']} dips each; p never below {floor:.3f}"
    return "\n".join([told, *aligned(head, body), "", *aligned([*content["datasets"], "dips of"], dips)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Reckons, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table2", default="", help="evidence_table2.json of the same model")
    parser.add_argument("--interventions", default="", help="RUN:KEY, with commas, scores.json of the same model")
    parser.add_argument("--dips", type=int, default=3, help="of each dataset")
    parser.add_argument("--out", default="runs/handover")
    parser.add_argument("--read", default="", help="print the table of this file; nothing is read beside it")
    given = parser.parse_args(arguments)
    return told(given, FORMAT, measure, report)


if __name__ == "__main__":
    leave(main)
