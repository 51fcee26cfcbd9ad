"""What objectives beside the loss cost a training step, in CPU seconds and in operations, both beside the plain step.

A real shape (SmolLM2-135M, random weights), 4 rows of 64 tokens, float32, AdamW; every other row as long. All layers
train, or five in the middle; embeddings are frozen. Operations are counted from the traced steps, so what a step spends
on memory and small products beyond them shows as the difference of the two ratios. Sides take turns in one process.
Run as ``python benchmarks/inside_cost.py``.
"""

from __future__ import annotations

import dataclasses
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
# By name: layers that train, objectives. The plain step of the same layers comes before those that are beside it.
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


def main() -> None:
    """Takes turns, prints, writes."""
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

    found: dict[str, dict[str, float]] = {}
    plain = ""
    print(f"{'GFLOP':>8}{'CPU s':>8}{'wall s':>8}{'of GFLOP':>10}{'of CPU':>8}{'of wall':>9}")
    for name, (_, objectives) in SIDES.items():
        if not objectives:
            plain = name
            continue
        spent = take_turns({plain: side(plain), name: side(name)})  # two at a time: a state is three times the weights
        mine, theirs = spent[name], spent[plain]
        ratios = [flops[name] / flops[plain], mine.cpu / theirs.cpu, mine.wall / theirs.wall]
        found[name] = {
            "gflop": flops[name] / 1e9,
            "gflop_plain": flops[plain] / 1e9,
            "cpu": mine.cpu,
            "cpu_plain": theirs.cpu,
            **dict(zip(("of_gflop", "of_cpu", "of_wall"), ratios, strict=True)),
        }
        print(
            f"{flops[name] / 1e9:8.1f}{mine.cpu:8.2f}{mine.wall:8.2f}{ratios[0]:10.2f}{ratios[1]:8.2f}{ratios[2]:9.2f}"
            f"  {name}, beside {plain}",
            flush=True,
        )
    write_result("inside_cost", {"sides": found})


if __name__ == "__main__":
    main()
