"""What edits of facts do to the facts, their paraphrases, their neighbours and other text; by way, layers and number.

    python experiments/fact_edits.py --model=DIR --covariance_data=FILE.jsonl --layers=5-9 --out=runs/facts --quick

Facts that the model knows are drawn anew for each seed; each is given a target of its relation that is not true.
Neighbours are known facts of the same relations that are not edited. ``--part=edits`` compares ways: spread over the
layers, full at their ends, the last layer alone, ends of what δ chooses, random pairs. ``--part=sequence`` edits batch
after batch, each on the run before, by spread and by full, and asks for all facts so far. Runs go to ``--out`` and are
read back when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.commands.edit import EditOptions, run_edit
from jaxcrit.core import flags, options
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, write_json, write_text
from jaxcrit.core.groups import BY_HASH, FactOptions, MeshOptions, ModelOptions, OutOptions
from jaxcrit.core.options import option
from jaxcrit.core.progress import bars
from jaxcrit.data.facts import Fact, placed, read_facts
from jaxcrit.evaluation.intervals import t_interval
from jaxcrit.evidence.completions import completions
from jaxcrit.models.model import Model, open_model
from jaxcrit.reporting.tables import number, table

KINDS = ("own", "paraphrase", "neighbour")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactEditOptions(ModelOptions, FactOptions, OutOptions, MeshOptions, title="edits"):
    """What is asked."""

    covariance_data: str = option("", "rows of any text", word="FILE", free=BY_HASH)
    layers: str = option("", "layers by trace, such as 5-9")
    scores: str = option("", "scores.json of jaxcrit analyze, for the layers that δ chooses", word="FILE", free=BY_HASH)
    part: str = option("edits", "which part", ("edits", "sequence"))
    ways: str = option("spread,full,last,delta,random", "ways to compare", word="LIST")
    counts: str = option("1,10,50", "numbers of facts", word="LIST")
    seeds: int = option(3, "draws of the facts", lowest=1)
    neighbours: int = option(50, "neighbours, at most", lowest=1)
    batches: int = option(20, "edits in sequence", lowest=1)
    batch: int = option(5, "facts of each", lowest=1)
    contexts: int = option(5, "openings in front of prompts", lowest=0)
    steps: int = option(25, "steps of the search for a vector", lowest=1)
    covariance_tokens: int = option(0, "tokens of the covariance; 0 for ten times the feed-forward width", lowest=0)
    quick: bool = option(False, "one seed, one number of facts, no openings: minutes on two cores")

    def check(self) -> None:
        """Refuses a comparison without layers or text."""
        super().check()
        for name in ("layers", "covariance_data", "out"):
            if not getattr(self, name):
                raise UserError(f"fact_edits: expected --{name}")


def known_facts(model: Model, facts: Sequence[Fact]) -> list[Fact]:
    """The facts that the model says by itself, word for word."""
    examples = [one.example for one in placed(facts, model.tokenizer, truth=True)]
    right = completions(model, model.decoder(), examples, 32).right
    return [fact for fact, knows in zip(facts, right, strict=True) if knows]


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
        for name in ("model", "covariance_data", "contexts", "steps", "covariance_tokens", "mesh", "dtype")
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
                rows.append({"way": way, "facts": count, "seed": seed, **cell(run)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def cell(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a run."""
    after, before = run["result"]["after"], run["result"]["before"]
    found: dict[str, Any] = {"layers": run["layers"]["layers"], "seconds": run["time"]["seconds"]}
    for kind in KINDS:
        if kind in after:
            found |= {f"{kind}_{name}": after[kind][name] for name in ("greedy", "preferred", "p", "questions")}
    return found | {"text_loss": after["text_loss"], "text_loss_before": before["text_loss"]}


def in_sequence(config: FactEditOptions, known: Sequence[Fact]) -> list[dict[str, Any]]:
    """Batches of facts one after the other: what of all facts so far is said after each, by both ways."""
    out, rows = Path(config.out), []
    facts = drawn(known, config.batches * config.batch, config.neighbours, 0)
    parts = [facts[start : start + config.batch] for start in range(0, len(facts), config.batch)]
    for way in ("spread", "full"):
        below = ""
        for index, part in enumerate(parts, 1):
            folder = out / f"sequence-{way}-{index}"
            given = {**way_of(config, way, 0), **({"model": "", "on": below} if below else {})}
            run = run_edit(
                asked(config, file_of(part, out / f"batch-{index}.jsonl"), folder, **given), progress=bars
            ).run
            below = str(folder)
            model = open_model(below, mesh=config.mesh, dtype=config.dtype)
            sofar = facts[: index * config.batch]
            right = completions(
                model, model.decoder(), [one.example for one in placed(sofar, model.tokenizer)], 32
            ).right
            rows.append({"way": way, "batch": index, "all_greedy": float(right.mean()), **cell(run)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, with Student's 95 % where there are several."""
    keys = [*(f"{kind}_{name}" for kind in KINDS for name in ("greedy", "preferred")), "text_loss", "seconds"]
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["way"], row.get("facts") or row["batch"]), []).append(row)
    made = []
    for (way, count), mine in groups.items():
        cells = []
        for key in keys:
            values = [float(row[key]) for row in mine if row.get(key) is not None]
            low, high = t_interval(values)
            mean = float(np.mean(values)) if values else float("nan")
            half = (high - low) / 2
            cells.append(number(mean, 3) + (f" ± {half:.3f}" if np.isfinite(half) else ""))
        made.append([way, str(count), str(mine[0]["layers"]), *cells])
    return table(["way", "facts", "layers", *(key.replace("_", " ") for key in keys)], made)


def main(arguments: Sequence[str]) -> None:
    """Edits, prints, writes."""
    if "--help" in arguments:
        print(options.usage(FactEditOptions, "fact_edits", "what edits of facts do"))
        return
    (config,) = flags.read([FactEditOptions], "fact_edits", arguments)
    if config.quick:
        config = dataclasses.replace(config, seeds=1, counts=config.counts.split(",")[0], contexts=0, batches=2)
    known = known_facts(open_model(config.model, mesh=config.mesh, dtype=config.dtype), read_facts(config.facts))
    print(f"{len(known)} facts are known word for word")
    rows = compared(config, known) if config.part == "edits" else in_sequence(config, known)
    print(text(rows))
    file = Path(config.out) / f"{config.part}.json"
    write_json(file, "jaxcrit.fact_edits", {"config": options.as_json(config), "known": len(known), "rows": rows})
    print(f"edits: {file}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"fact_edits: error: {error}")
