"""What objectives beside the loss cost a training step, in CPU seconds and in operations, both beside the plain step.

A real shape (SmolLM2-135M, random weights), 4 rows of 64 tokens, float32, AdamW; every other row as long. All layers
train, or five in the middle; embeddings are frozen. Operations are counted from the traced steps, so what a step spends
on memory and small products beyond them shows as the difference of the two ratios. Sides take turns in one process.
Run as ``python benchmarks/inside_cost.py``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from environment import write_result
from rows import CONFIG, take_turns

from jaxcrit.core.auxiliaries import Adversarial, Auxiliary, Objective
from jaxcrit.core.pages import keep_pages
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.partition import partition, split
from jaxcrit.models.weights import table
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import initial_state, make_step

BATCH, LENGTH = 4, 64
ANSWER, PAIR = "logits:answer", "feature:prompt"
ALL, MIDDLE = tuple(range(30)), tuple(range(12, 17))
# By name: layers that train, objectives. Beside each stands the plain step of the same layers.
SIDES: dict[str, tuple[tuple[int, ...], tuple[Objective, ...]]] = {
    "all layers": (ALL, ()),
    "exit at 14, training rows": (ALL, (Auxiliary(14, "exit", "", 1.0),)),
    "exit at 5, rows of its own": (ALL, (Auxiliary(5, "exit", ANSWER, 1.0),)),
    "exit at 14, rows of its own": (ALL, (Auxiliary(14, "exit", ANSWER, 1.0),)),
    "feature at 14": (ALL, (Auxiliary(14, "feature", PAIR, 1.0),)),
    "change of states, 3 steps": (ALL, (Adversarial("states", 0.05, 3, 0, 1.0),)),
    "change of the loss, 3 steps": (ALL, (Adversarial("loss", 0.05, 3, 0, 1.0),)),
    "layers 12-16": (MIDDLE, ()),
    "change of states, 3 steps, 12-16": (MIDDLE, (Adversarial("states", 0.05, 3, 0, 1.0),)),
}


def plain_of(name: str) -> str:
    """The plain step of the same layers."""
    layers, _ = SIDES[name]
    return next(other for other, side in SIDES.items() if side == (layers, ()))


def measured(name: str) -> dict[str, float]:
    """Operations and seconds of a step with objectives, and of the plain one of the same layers."""
    keep_pages()  # as `jaxcrit finetune` does
    config = ModelConfig.from_hf(dict(CONFIG))
    rng = np.random.default_rng(0)
    weights = {
        row.path: np.ones(row.shape(config), np.float32)
        if row.path.endswith("norm")
        else 0.02 * rng.standard_normal(row.shape(config), np.float32)
        for row in table(config)
    }
    tokens = rng.integers(0, config.vocab_size, (1, BATCH, LENGTH)).astype(np.int32)
    learn = np.broadcast_to(np.arange(LENGTH) >= LENGTH // 2, tokens.shape)
    rows = TokenBatch(tokens, np.full((1, BATCH), LENGTH, np.int32), learn)
    numbers = np.arange(BATCH, dtype=np.int32)[None]
    batch = dataclasses.replace(rows, beside={ANSWER: rows, PAIR: rows}, numbers=numbers)
    mesh = make_mesh(None, jax.devices()[:1])
    flops: dict[str, float] = {}

    def side(name: str) -> Callable[[], float]:
        layers, objectives = SIDES[name]
        parts = partition(config, layers)
        given = {path: jnp.asarray(value) for path, value in weights.items()}
        params, frozen = split(parts.gather(given, mesh, jnp.float32))
        optimizer = make_optimizer("adamw", make_schedule("constant", 1e-5, 1000), parts)
        state = [initial_state(parts, optimizer, params, mesh)]
        step = make_step(parts, optimizer, dtype=jnp.float32, remat=False, auxiliaries=objectives)
        flops[name] = product_flops(step, state[0], frozen, batch)

        def call() -> float:
            state[0], metrics = step(state[0], frozen, batch)
            return float(metrics.sums.per_token)

        return call

    plain = plain_of(name)
    spent = take_turns({plain: side(plain), name: side(name)})
    mine, theirs = spent[name], spent[plain]
    return {
        "gflop": flops[name] / 1e9,
        "gflop_plain": flops[plain] / 1e9,
        "cpu": mine.cpu,
        "cpu_plain": theirs.cpu,
        "wall": mine.wall,
        "of_gflop": flops[name] / flops[plain],
        "of_cpu": mine.cpu / theirs.cpu,
        "of_wall": mine.wall / theirs.wall,
    }


def main() -> None:
    """Measures each in a process of its own, for such a process keeps all memory that it ever took; prints, writes."""
    found: dict[str, dict[str, float]] = {}
    print(f"{'GFLOP':>8}{'CPU s':>8}{'wall s':>8}{'of GFLOP':>10}{'of CPU':>8}{'of wall':>9}")
    spawn = multiprocessing.get_context("spawn")
    names = [name for name, (_, objectives) in SIDES.items() if objectives]
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for name, one in zip(names, pool.map(measured, names), strict=True):
            found[name] = one
            print(
                f"{one['gflop']:8.1f}{one['cpu']:8.2f}{one['wall']:8.2f}{one['of_gflop']:10.2f}{one['of_cpu']:8.2f}"
                f"{one['of_wall']:9.2f}  {name}, beside {plain_of(name)}",
                flush=True,
            )
    write_result("inside_cost", {"sides": found})


if __name__ == "__main__":
    main()
