"""What edits of facts do to the facts, their paraphrases, their neighbours and other text; by way, layers and number.

    python experiments/fact_edits.py --model=DIR --covariance_data=FILE.jsonl --layers=5-9 --out=runs/facts --quick

Facts that the model knows are drawn anew for each seed; each is given a target of its relation that is not true.
Neighbours are known facts of the same relations that are not edited. ``--part=edits`` compares ways: spread over the
layers, full at their ends, the last layer alone, ends of what δ chooses, random pairs. ``--part=sequence`` edits batch
after batch, each on the run before, by spread and by full, and asks for all facts so far every few. Runs go to
``--out`` and are read back when the same command is given again. ``--part=covariance`` says what the covariance of all
layers costs.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.edit import EditOptions, parted, run_edit, texts_of
from jaxcrit.core import flags, options
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, read_json, write_json, write_text
from jaxcrit.core.groups import BY_HASH, FactOptions, MeshOptions, ModelOptions, OutOptions
from jaxcrit.core.options import option
from jaxcrit.core.progress import bars
from jaxcrit.data.facts import Fact, placed, read_facts
from jaxcrit.evaluation.intervals import t_interval
from jaxcrit.evidence.completions import completions
from jaxcrit.models.model import Model, open_model
from jaxcrit.reporting.tables import number, table
from jaxcrit.studies.covariance import covariances
from jaxcrit.studies.fact_scores import answered, questions, summary

KINDS = ("own", "paraphrase", "neighbour")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactEditOptions(ModelOptions, FactOptions, OutOptions, MeshOptions, title="edits"):
    """What is asked."""

    covariance_data: str = option("", "rows of any text", word="FILE", free=BY_HASH)
    layers: str = option("", "layers by trace, such as 5-9")
    scores: str = option("", "scores.json of jaxcrit analyze, for the layers that δ chooses", word="FILE", free=BY_HASH)
    part: str = option("edits", "which part", ("edits", "sequence", "covariance"))
    ways: str = option("spread,full,last,delta,random", "ways to compare", word="LIST")
    counts: str = option("1,10,50", "numbers of facts", word="LIST")
    seeds: int = option(3, "draws of the facts", lowest=1)
    neighbours: int = option(50, "neighbours, at most", lowest=1)
    batches: int = option(20, "edits in sequence", lowest=1)
    batch: int = option(5, "facts of each", lowest=1)
    every: int = option(5, "after so many of them, all facts so far are asked for", lowest=1)
    contexts: int = option(5, "openings in front of prompts", lowest=0)
    steps: int = option(25, "steps of the search for a vector", lowest=1)
    batch_size: int = option(64, "rows per pass", lowest=1)
    covariance_tokens: int = option(0, "tokens of the covariance; 0 for ten times the feed-forward width", lowest=0)
    quick: bool = option(False, "one seed, one number of facts, no openings: minutes on two cores")

    def check(self) -> None:
        """Refuses a comparison without layers or text."""
        super().check()
        for name in ("layers", "covariance_data", "out"):
            if not getattr(self, name):
                raise UserError(f"fact_edits: expected --{name}")


def known_facts(model: Model, facts: Sequence[Fact]) -> list[Fact]:
    """The facts that the model says by itself, word for word, and that can be edited: none of the first position."""
    found = placed(facts, model.tokenizer, truth=True)
    right = completions(model, model.decoder(), [one.example for one in found], 32).right
    return [fact for fact, one, knows in zip(facts, found, right, strict=True) if knows and one.subject[-1] > 0]


def drawn(known: Sequence[Fact], count: int, neighbours: int, seed: int) -> list[Fact]:
    """So many facts to edit, each with another target of its relation and its share of neighbours.

    Raises:
        UserError: too few are known.
    """
    rng = np.random.default_rng(seed)
    order = [known[place] for place in rng.permutation(len(known))]
    edits, rest = order[:count], order[count:]
    if len(edits) < count or not rest:
        raise UserError(f"--counts={count}: the model knows {len(known)} facts; take fewer")
    each, found = -(-neighbours // count), []
    for fact in edits:
        targets = sorted({one.truth for one in known if one.relation == fact.relation and one.truth != fact.truth})
        near = [one for one in rest if one.relation == fact.relation][:each]
        rest = [one for one in rest if one not in near]
        beside = tuple((one.text, one.truth) for one in near)
        new = str(rng.choice(targets)) if targets else known[0].truth
        found.append(dataclasses.replace(fact, target=new, old=fact.truth, neighbours=beside))
    return found


def file_of(facts: Sequence[Fact], path: Path) -> str:
    """Writes facts as rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            **dataclasses.asdict(fact),
            "neighbours": [{"prompt": text, "target": target} for text, target in fact.neighbours],
        }
        for fact in facts
    ]
    write_text(path, json_lines(rows))
    return str(path)


def asked(config: FactEditOptions, facts: str, out: Path, **changes: Any) -> EditOptions:
    """Options of one edit."""
    given = {
        name: getattr(config, name)
        for name in (
            "model",
            "covariance_data",
            "contexts",
            "steps",
            "batch_size",
            "covariance_tokens",
            "mesh",
            "dtype",
        )
    }
    return EditOptions(**{**given, "facts": facts, "out": str(out), **changes})


def way_of(config: FactEditOptions, way: str, seed: int) -> dict[str, Any]:
    """Options of a way."""
    last = config.layers.replace("-", ",").split(",")[-1]
    return {
        "spread": {"residual": "spread", "layers": config.layers},
        "full": {"residual": "full", "layers": config.layers},
        "last": {"residual": "full", "layers": last},
        "delta": {"residual": "full", "layers": "boundary(critical)", "scores": config.scores},
        "random": {"residual": "full", "layers": f"random:2:{seed}"},
    }[way]


def compared(config: FactEditOptions, known: Sequence[Fact]) -> list[dict[str, Any]]:
    """A row for each way, number of facts and seed."""
    out, rows = Path(config.out), []
    for count in map(int, config.counts.split(",")):
        for seed in range(config.seeds):
            facts = file_of(drawn(known, count, config.neighbours, seed), out / f"facts-{count}-{seed}.jsonl")
            for way in config.ways.split(","):
                if way == "delta" and not config.scores:
                    continue
                folder = out / f"{way}-{count}-{seed}"
                run = run_edit(asked(config, facts, folder, **way_of(config, way, seed)), progress=bars).run
                rows.append({"way": way, "facts": count, "seed": seed, **cell(run), "of_facts": of_facts(folder)})
                print(json.dumps({**rows[-1], "of_facts": None}), flush=True)
    return rows


def cell(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a run."""
    after, before = run["result"]["after"], run["result"]["before"]
    found: dict[str, Any] = {"layers": run["layers"]["layers"], "seconds": run["time"]["seconds"]}
    return found | said(after) | {"text_loss": after["text_loss"], "text_loss_before": before["text_loss"]}


def said(told: Mapping[str, Any]) -> dict[str, Any]:
    """Shares by kind, flat."""
    names = ("greedy", "preferred", "p", "questions")
    return {f"{kind}_{name}": told[kind][name] for kind in KINDS if kind in told for name in names}


def of_facts(folder: Path) -> dict[str, list[float | None]]:
    """By kind, the share of each fact's questions that are answered greedily after the edit; None where it has none."""
    told = read_json(folder / "edits.json", "jaxcrit.edits")
    found = {}
    for kind in KINDS:
        right: list[list[bool]] = [[] for _ in told["facts"]]
        for one in told["questions"]:
            if one["kind"] == kind:
                right[one["fact"]].append(one["right"][1])
        found[kind] = [float(np.mean(mine)) if mine else None for mine in right]
    return found


def in_sequence(config: FactEditOptions, known: Sequence[Fact]) -> list[dict[str, Any]]:
    """Batches of facts one after the other, by both ways: what is said of all facts so far, after every few."""
    out, rows = Path(config.out), []
    facts = drawn(known, config.batches * config.batch, config.neighbours, 0)
    parts = [facts[start : start + config.batch] for start in range(0, len(facts), config.batch)]
    for way in ("spread", "full"):
        below = ""
        for index, part in enumerate(parts, 1):
            folder, file = out / f"sequence-{way}-{index}", file_of(part, out / f"batch-{index}.jsonl")
            given = {**way_of(config, way, 0), **({"model": "", "on": below} if below else {})}
            found = cell(run_edit(asked(config, file, folder, **given), progress=bars).run)
            below = str(folder)
            if index % config.every and index < len(parts):
                print(json.dumps({"way": way, "batch": index, **found}), flush=True)
                continue
            model = open_model(below, mesh=config.mesh, dtype=config.dtype)
            every = questions(facts[: index * config.batch])
            answers = answered(model, model.decoder(), every, config.batch_size)
            rows.append({"way": way, "batch": index, "of_batch": found, **found, **said(summary(every, answers))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def covered(config: FactEditOptions) -> str:
    """What the covariance of all layers costs where none is kept: seconds, and the peak of this process's memory."""
    model = open_model(config.model, mesh=config.mesh, dtype=config.dtype)
    texts = texts_of(EditOptions(covariance_data=config.covariance_data), model)
    texts, _ = parted(texts, config.covariance_tokens or 10 * model.config.ff_width)
    model.decoder()
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = covariances(model, texts, range(model.config.num_layers), config.batch_size, bars)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"{model.config.num_layers} layers, {len(found.cached)} of them kept; {found.tokens} tokens: {seconds:.0f} s;"
        f" peak {peak / 2**20:.2f} GiB, {before / 2**20:.2f} before"
    )


def spread_of(values: Sequence[float]) -> str:
    """Mean, with Student's 95 % where there are several."""
    kept = [value for value in values if np.isfinite(value)]
    low, high = t_interval(kept)
    half = (high - low) / 2
    return number(float(np.mean(kept)) if kept else float("nan"), 3) + (f" ± {half:.3f}" if np.isfinite(half) else "")


def pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By kind, `of_facts` of the facts of all seeds, one behind the other."""
    return {kind: np.concatenate([np.array(row["of_facts"][kind], float) for row in rows]) for kind in KINDS}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the facts of all seeds, and their differences from ``full``; of what is of a run, over seeds."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["way"], row.get("facts") or row["batch"]), []).append(row)
    whole = [f"{kind}_preferred" for kind in KINDS] + ["text_loss", "seconds"]
    made, apart = [], []
    for (way, count), mine in groups.items():
        layers = " ".join(dict.fromkeys(",".join(map(str, row["layers"])) for row in mine))
        over_seeds = [spread_of([row[key] for row in mine if row.get(key) is not None]) for key in whole]
        if "of_facts" not in mine[0]:
            shares = [number(mine[0].get(f"{kind}_greedy", float("nan")), 3) for kind in KINDS]
            made.append([way, str(count), layers, *shares, *over_seeds])
            continue
        values = pooled(mine)
        made.append([way, str(count), layers, *map(spread_of, values.values()), *over_seeds])
        full = groups.get(("full", count), [])
        if way != "full" and [row["seed"] for row in full] == [row["seed"] for row in mine]:
            apart.append([way, str(count), *(spread_of(values[kind] - one) for kind, one in pooled(full).items())])
    greedy = [f"{kind} greedy" for kind in KINDS]
    told = table(["way", "facts", "layers", *greedy, *(key.replace("_", " ") for key in whole)], made)
    return told if not apart else told + "\n\nless full, fact by fact\n" + table(["way", "facts", *greedy], apart)


def main(arguments: Sequence[str]) -> None:
    """Edits, prints, writes."""
    if "--help" in arguments:
        print(options.usage(FactEditOptions, "fact_edits", "what edits of facts do"))
        return
    (config,) = flags.read([FactEditOptions], "fact_edits", arguments)
    if config.quick:
        config = dataclasses.replace(config, seeds=1, counts=config.counts.split(",")[0], contexts=0, batches=2)
    if config.part == "covariance":
        print(covered(config))
        return
    known = known_facts(open_model(config.model, mesh=config.mesh, dtype=config.dtype), read_facts(config.facts))
    print(f"{len(known)} facts are known word for word")
    rows = compared(config, known) if config.part == "edits" else in_sequence(config, known)
    print(text(rows))
    file = Path(config.out) / f"{config.part}.json"
    write_json(file, "jaxcrit.fact_edits", {"config": options.as_json(config), "known": len(known), "rows": rows})
    print(f"edits: {file}")


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
