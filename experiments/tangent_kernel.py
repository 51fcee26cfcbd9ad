"""Does low δ before training go with layers whose tangent kernel changes? (The paper's first open question.)

    python experiments/tangent_kernel.py --model=DIR --data=gsm8k:TRAIN --test_data=gsm8k:TEST \
        --scores=AN/scores.json --out=runs/tangent

A layer's empirical tangent kernel is K[i, j], the inner product of the gradients of log p(response | prompt) of rows i
and j by the layer's weights (Jacot et al. 2018). Its change over a training of everything is ||K' - K|| / ||K||, in the
Frobenius norm. It nears one where a kernel just shrinks, so beside it stands its turn, 1 - <K', K> / ||K'|| ||K||,
which does not see size. Prints both by layer, and how they go with δ: ρ, given depth, circular shifts. A cell is one
seed; an interrupted experiment goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cells import Cells, fitting, minutes, whole
from entry import leave, told
from evidence_table2 import training

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import LayerScores, read_scores, score_of
from jaxcrit.models.model import Model, open_model
from jaxcrit.models.partition import FROZEN, TRAIN, partition
from jaxcrit.reporting.tables import aligned, number, p_value
from jaxcrit.selection.correlation import correlate
from jaxcrit.training.objectives import TokenBatch, batch_loss

FORMAT = "jaxcrit.tangent_kernel"
QUICK = {"seeds": "1", "steps": 3, "rows": 16, "tests": 4, "kernel_rows": 4}
FREE = ("out", "read", "quick", "model", "data", "test_data", "scores", "block")
Stacked = Mapping[str, jax.Array]  # gradients by weight, each [L, ...]


def kernels(gradient: Callable[[int], Stacked], count: int, block: int) -> np.ndarray:
    """Kernel of every layer.

    Args:
        gradient: gradient of one row by the stacked weights of all layers.
        count: N rows.
        block: gradients held at a time; the rows behind them are taken again for every block.

    Returns:
        ``[L, N, N]`` float64, symmetric.
    """
    found: dict[tuple[int, int], np.ndarray] = {}
    for start in range(0, count, block):
        held = [gradient(row) for row in range(start, min(start + block, count))]
        for other in range(start, count):
            that = held[other - start] if other < start + block else gradient(other)
            for row, this in enumerate(held, start):
                found[row, other] = found[other, row] = np.asarray(inner(this, that), np.float64)
    return np.array([[found[i, j] for j in range(count)] for i in range(count)]).transpose(2, 0, 1)


@jax.jit
def inner(this: Stacked, that: Stacked) -> jax.Array:
    """``[L]`` inner products over the weights of each layer."""
    each = [jnp.sum(value * that[name], axis=range(1, value.ndim)) for name, value in this.items()]
    return jnp.sum(jnp.stack(each), axis=0)


def change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """``[L]`` relative change of kernels ``[L, N, N]``, in Frobenius norm."""
    return np.linalg.norm(after - before, axis=(1, 2)) / np.linalg.norm(before, axis=(1, 2))


def turn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """``[L]`` one less the cosine between kernels ``[L, N, N]``: 0 where only their size changed."""
    lengths = np.linalg.norm(before, axis=(1, 2)) * np.linalg.norm(after, axis=(1, 2))
    return 1 - np.sum(before * after, axis=(1, 2)) / lengths


def of_model(model: Model, data: str, count: int, block: int) -> np.ndarray:
    """Kernels of a model on the first rows of some data, ``[L, N, N]``."""
    (dataset,) = model.read(FinetuneOptions(data=data, split=whole(data)), responses=True)
    examples = dataset.examples[:count]
    weights = model.weights()
    blocks = {path: value for path, value in weights.items() if path.startswith("blocks.")}
    rest = {path: value for path, value in weights.items() if path not in blocks}
    parts = partition(model.config, range(model.config.num_layers))

    @jax.jit
    def gradient(blocks: Stacked, rest: Stacked, rows: TokenBatch) -> Stacked:
        def loss(blocks: Stacked) -> jax.Array:
            given = {TRAIN: blocks, FROZEN: rest}
            return batch_loss(parts, given, rows, dtype=rest["embed"].dtype, mesh=None).loss

        return jax.grad(loss)(blocks)

    width = max(len(example.token_ids) for example in examples)  # one for all: a single compile
    at = np.arange(width)

    def of_row(row: int) -> Stacked:
        example = examples[row]
        count = len(example.token_ids)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, :count] = example.token_ids
        learn = ((at >= example.prompt_length) & (at < count))[None]
        return gradient(blocks, rest, TokenBatch(tokens, np.array([count], np.int32), learn))

    return kernels(of_row, len(examples), block)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Trains with every seed, and compares kernels before and after."""
    out, seeds = Path(given.out), [int(seed) for seed in given.seeds.split(",")]
    model, kept = open_model(given.model), read_scores(given.scores)
    scores = {key: score_of(kept, key, given.scores) for key in ("delta", "delta_debiased", "step")}
    if (depth := scores["delta"].num_layers) != model.config.num_layers:
        raise UserError(
            f"--scores={given.scores}: of {depth} layers, but the model has {model.config.num_layers}; analyze it"
        )
    out.mkdir(parents=True, exist_ok=True)
    train, train_hash = fitting(model, given.data, given.rows, given.length, out / "rows")
    test, test_hash = fitting(model, given.test_data, given.tests, given.length, out / "rows" / "tests")
    settings = {key: value for key, value in vars(given).items() if key not in FREE}
    settings |= {"model_hash": model.model_hash, "rows_hash": [train_hash, test_hash]}
    cells = Cells.open(out, settings)

    def base() -> dict[str, Any]:
        return {"kernels": of_model(model, test, given.kernel_rows, given.block).tolist()}

    def seed_of(seed: int) -> dict[str, Any]:
        options = training(given, {"train": train, "test": test}, seed, given.steps, "")
        tuned = run_finetune(options, model=model, keep=False).model
        assert tuned is not None  # nothing is read back where nothing is kept
        after = of_model(tuned, test, given.kernel_rows, given.block)
        first = np.array(before["kernels"])
        return {"change": change(first, after).tolist(), "turn": turn(first, after).tolist()}

    before = cells("base", base)
    found = {str(seed): cells(f"seed-{seed}", lambda seed=seed: seed_of(seed)) for seed in seeds}
    entries = {key: score.to_json() | {"meta": {"window": score.meta.get("window")}} for key, score in scores.items()}
    return plain({"settings": settings, "scores": entries, "cells": found, "time": cells.spent()})


def report(content: Mapping[str, Any]) -> str:
    """Change and turn by layer and seed; their correlation with δ and step."""
    scores = {key: LayerScores.from_json(key, entry) for key, entry in content["scores"].items()}
    found = {
        f"{measure}, seed {seed}": np.array(one[measure])
        for measure in ("change", "turn")
        for seed, one in content["cells"].items()
    }
    depth = len(next(iter(found.values())))
    rows = [
        [*(f"{values[layer]:.3f}" for values in found.values()), number(scores["delta"].values[layer]), str(layer)]
        for layer in range(depth)
    ]
    lines = aligned([*found, "delta", "layer"], rows)
    body = []
    for key, score in scores.items():
        for name, values in found.items():
            pair = correlate(score, LayerScores("kernel_change", values, np.full(depth, True), "high"))
            numbers = [number(one, 2) for one in (pair.rho, pair.partial)]
            body.append([*numbers, p_value(pair.p_shift), p_value(pair.p_partial), f"{key}, {name}"])
    lines += ["", *aligned(["ρ", "given depth", "p shift", "p given depth", ""], body)]
    parts = {"kernels before": ("base", 1), "train, kernels after": ("seed-", len(content["cells"]))}
    return "\n".join([*lines, "", minutes(content["time"]["seconds"], parts)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint directory, hub id or GGUF file (default: embedded)")
    parser.add_argument("--data", default="", help="training rows: NAME:FILE of JSON lines")
    parser.add_argument("--test_data", default="", help="test rows; kernels are of the first of them")
    parser.add_argument("--scores", default="", help="scores.json of jaxcrit analyze")
    parser.add_argument("--out", default="runs/tangent")
    parser.add_argument("--read", default="", help="print the tables of this file; nothing is run")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tests", type=int, default=32)
    parser.add_argument("--kernel_rows", type=int, default=32)
    parser.add_argument("--block", type=int, default=8, help="gradients held at a time; one is as large as all blocks")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row; longer ones are left out")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--quick", action="store_true", help=f"the same in little: {QUICK}")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    return told(given, FORMAT, measure, report)


if __name__ == "__main__":
    leave(main)
