"""Does adversarial tuning of the layers that enlarge perturbations make a model smoother? Random layers and a control.

    python experiments/adversarial_layers.py --out=runs/adversarial --minutes=50

Some layers are tuned on a task, by three objectives: ``plain``; ``states``: beside the loss, how far a perturbation of
the embeddings moves these layers' states, the perturbation found against that (after CLAT); ``loss``: the loss under a
perturbation found against the loss, which is plain adversarial training and the control. Layers are those of the
highest ``perturbation_gain`` on the training rows, random ones, or all. A perturbation of embeddings is no attack that
anyone could make: what is measured is smoothness.

Of each tuned model, on rows it has not seen: the loss; the loss under a perturbation found by 20 steps from 3 random
starts within EPS and half of it, found against each model itself; and under random noise of the same sizes. Cells are
kept in OUT and never made again; with ``--minutes`` it stops after the cell in which these are over, and says what is
left. The tables give means over seeds, draws of random layers being one there, and differences seed by seed, with
Student's 95 %.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cells import Cells, fitting, whole
from entry import leave

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions, RowOptions
from jaxcrit.core.hashing import sha256_json
from jaxcrit.data.batches import make_batches, response_mask
from jaxcrit.data.demo import generate
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.intervals import t_interval
from jaxcrit.evaluation.losses import nats
from jaxcrit.evaluation.perturbations import find_perturbation, perturbed_tokens, random_perturbation, row_keys
from jaxcrit.models.decoder import Decoder, embed, forward, logits
from jaxcrit.models.model import Model, open_model
from jaxcrit.reporting.tables import aligned

OBJECTIVES = ("plain", "states", "loss")
NAMES = ("clean", "found", "found_half", "noise", "noise_half")  # losses of a tuned model
STEPS, RESTARTS = 20, 3


@functools.partial(jax.jit, static_argnames=("steps", "restarts"))
def losses(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    learn: jax.Array,
    sizes: jax.Array,
    *,
    steps: int = STEPS,
    restarts: int = RESTARTS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of each row's response, in nats: clean ``[B]``; found and random ``[sizes, B]``.

    Args:
        decoder: weights.
        tokens: ``[B, T]`` int32.
        lengths: ``[B]`` int32.
        learn: ``[B, T]`` bool, tokens of responses.
        sizes: ``[S]`` radii, in norms of the embedding.
        steps: steps of the search.
        restarts: its random starts.
    """
    x, where = embed(decoder, tokens), perturbed_tokens(lengths, tokens.shape[1])
    keys = row_keys(0, jnp.arange(len(tokens)))

    def loss(offset: jax.Array | None) -> jax.Array:
        hidden = forward(decoder, tokens, lengths=lengths, offset=offset).hidden
        each = nats(logits(decoder, hidden[:, :-1]).astype(jnp.float32), tokens[:, 1:])
        return jnp.sum(jnp.where(learn[:, 1:], each, 0), axis=1)

    def under(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = find_perturbation(loss, x, where, keys, size=size, steps=steps, restarts=restarts)[1]
        return found, loss(random_perturbation(x, where, keys, size))

    return loss(None), *jax.lax.map(under, sizes)


def tested(model: Model, examples: Sequence[Example], eps: float, batch_size: int) -> dict[str, float]:
    """Loss per response token: clean, and at EPS and half of it found and random."""
    sizes, total, count = jnp.array([eps, eps / 2]), np.zeros(5), 0
    for batch in make_batches(examples, batch_size, prompt_only=False):
        learn = response_mask(batch, examples)
        real = batch.rows < len(examples)
        clean, found, noise = losses(model.decoder(), batch.tokens, batch.lengths, learn, sizes)
        each = np.concatenate([np.asarray(clean)[None], found, noise])
        total, count = total + each[:, real].sum(axis=1), count + int(learn[real, 1:].sum())
    return dict(zip(NAMES, (total / count).tolist(), strict=True))


def cell(arm: str, seed: int, data: str, examples: Sequence[Example], given: argparse.Namespace) -> dict[str, Any]:
    """Tunes and tests one arm, ``LAYERS/OBJECTIVE``."""
    layers, _, objective = arm.partition("/")
    how: dict[str, Any] = {"adversarial": given.eps, "adversarial_on": objective}
    how |= {"adversarial_steps": given.adversarial_steps, "adversarial_weight": given.weight}
    options = FinetuneOptions(
        model=given.model,
        data=data,
        split=whole(data),
        layers=layers,
        reselect=given.reselect if layers.startswith("perturbation_gain") else 0,
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        seed=seed,
        eval_every=given.steps,
        checkpoint_every=given.steps,
        max_length=given.longest,
        out=str(Path(given.out) / "runs" / named(arm, seed)),
        **({} if objective == "plain" else how),
    )
    run = run_finetune(options).run
    after = tested(open_model(options.out), examples, given.eps, given.test_batch)
    trained, seconds = run["trained"], run["time"]["training_seconds"]
    return {"layers": trained["layers"], "selections": trained.get("selections"), "seconds": seconds, **after}


def named(arm: str, seed: int) -> str:
    """Name of a cell."""
    return f"{arm}-{seed}".replace(":", "-").replace("/", "-")


def rows_of(given: argparse.Namespace, model: Model) -> tuple[str, list[Example], str]:
    """Rows to train on as ``--data`` takes them, rows to test on, and a hash of both."""
    out = Path(given.out)
    if given.data:
        data, one = fitting(model, given.data, given.rows, given.longest, out / "rows")
        tests, other = fitting(model, given.test_data, given.tests, given.longest, out / "tests")
    else:
        data, tests = str(out / "train.jsonl"), str(out / "test.jsonl")
        drawn = generate("order", given.rows, 0, "train"), generate("order", given.tests, 0, "test")
        for path, rows in zip((data, tests), drawn, strict=True):
            out.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), json_lines(rows))
        one, other = map(sha256_json, drawn)
    (found,) = model.read(RowOptions(data=tests, split=whole(tests)), responses=True)
    return data, found.examples, sha256_json([one, other])


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and half of Student's 95 %; the mean alone of one value."""
    low, high = t_interval(list(values))
    return f"{np.mean(values):{sign}.3f}" + (f" ± {(high - low) / 2:.3f}" if len(values) > 1 else "")


Found = Mapping[tuple[str, int], Mapping[str, Any]]
Groups = dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]]


def grouped(found: Found) -> Groups:
    """Cells by (layers, objective) and seed: one a seed, or one for each draw of random layers."""
    groups: Groups = {}
    for (arm, seed), one in found.items():
        layers, _, objective = arm.partition("/")
        kind = layers.rpartition(":")[0] if layers.startswith("random") else layers
        groups.setdefault((kind, objective), {}).setdefault(seed, []).append(one)
    return groups


def pairs(groups: Groups) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Groups to compare: chosen layers with random ones, and the objective on states with the two others."""
    found = [
        ((kind, objective), (other, objective))
        for kind, objective in groups
        for other in dict.fromkeys(one for one, _ in groups)
        if other.startswith("random") and kind not in (other, "all")
    ]
    found += [
        ((kind, "states"), (kind, other)) for kind, one in groups if one == "states" for other in ("plain", "loss")
    ]
    return [pair for pair in found if set(pair) <= set(groups)]


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return float(np.mean(values))


def text(found: Found, base: Mapping[str, float], given: Any) -> str:
    """Losses by layers and objective; below, differences. A seed's draws of random layers count as one, their mean."""
    groups, eps = grouped(found), given.eps
    means = {
        group: {seed: {name: mean([one[name] for one in ones]) for name in NAMES} for seed, ones in by_seed.items()}
        for group, by_seed in groups.items()
    }
    body = [["", *(f"{base[name]:.3f}" for name in NAMES), "", "as it was"]]
    for group, by_seed in groups.items():
        every = [one for ones in by_seed.values() for one in ones]
        sets = {" ".join(map(str, one["layers"])) for one in every}
        layers = next(iter(sets)) if len(sets) == 1 and group[0] != "all" else ""
        cells = [spread([one[name] for one in means[group].values()]) for name in NAMES]
        seconds = f"{mean([one['seconds'] for one in every]):.0f}"
        body.append([str(len(every)), *cells, seconds, f"{' / '.join(group)} {layers}"])
    less = []
    for one, other in pairs(groups):
        seeds = sorted(set(means[one]) & set(means[other]))
        cells = [spread([means[one][seed][name] - means[other][seed][name] for seed in seeds], "+") for name in NAMES]
        less.append([str(len(seeds)), *cells, f"{' / '.join(one)}, less {' / '.join(other)}"])
    header = ["loss", f"found, {eps:g}", f"found, {eps / 2:g}", f"noise, {eps:g}", f"noise, {eps / 2:g}"]
    tables = [aligned(["cells", *header, "s", "layers / objective"], body)]
    tables += [aligned(["seeds", *header, ""], less)] if less else []
    return "\n\n".join("\n".join(lines) for lines in tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes cells, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory (default: embedded)")
    parser.add_argument("--data", default="", help="training rows NAME:FILE (default: the task order)")
    parser.add_argument("--test_data", default="", help="rows to test on, as --data")
    parser.add_argument("--out", default="runs/adversarial")
    parser.add_argument(
        "--layers", default="perturbation_gain:3,random:3:0,random:3:1,random:3:2,all", help="layers to tune"
    )
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--weight", type=float, default=1.0, help="of the objective beside the loss")
    parser.add_argument("--adversarial_steps", type=int, default=3)
    parser.add_argument("--reselect", type=int, default=0, help="steps after which perturbation_gain chooses anew")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--longest", type=int, default=64, help="tokens of a row, at most")
    parser.add_argument("--rows", type=int, default=1920, help="rows to train on")
    parser.add_argument("--tests", type=int, default=32, help="rows to test on")
    parser.add_argument("--test_batch", type=int, default=32)
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop after the cell in which these are over; 0: never"
    )
    given = parser.parse_args(arguments)
    free = ("out", "model", "data", "test_data", "layers", "objectives", "seeds", "minutes", "test_batch")
    settings = {key: value for key, value in vars(given).items() if key not in free}
    began, left, found = time.monotonic(), [], {}
    try:
        model = open_model(given.model)
        data, tests, rows = rows_of(given, model)
        settings |= {"model": model.model_hash, "rows_hash": rows}
        cells = Cells.open(Path(given.out), settings)
        base = cells("base", lambda: tested(model, tests, given.eps, given.test_batch))
        arms = [f"{layers}/{one}" for one in given.objectives.split(",") for layers in given.layers.split(",")]
        for seed in range(given.seeds):
            for arm in arms:
                name = named(arm, seed)
                over = given.minutes and time.monotonic() - began > 60 * given.minutes
                if over and not (cells.out / "cells" / f"{name}.json").exists():
                    left.append(name)
                    continue
                found[arm, seed] = cells(name, lambda arm=arm, seed=seed: cell(arm, seed, data, tests, given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(found, base, given))
    if left:
        print(f"{len(left)} cells are not made yet; the same command goes on")
    kept = {"config": settings, "base": base, "cells": {f"{arm}-{seed}": one for (arm, seed), one in found.items()}}
    write_json(Path(given.out) / "adversarial_layers.json", "jaxcrit.adversarial_layers", plain({**kept, "left": left}))
    return 0


if __name__ == "__main__":
    leave(main)
