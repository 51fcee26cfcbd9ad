"""A row of the table of speeds: one piece of work, timed here and by a peer in turns, beside the limit of the machine.

A benchmark whose work stands in the table has ``rows(checkpoint: Path) -> list[Row]``; `table.py` calls each in a
process of its own. The unit is CPU-seconds, user and system: they hold on a machine that others use too, wall seconds
do not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import hf_shapes

OURS = "jaxcrit"
Shape = tuple[int, int, int]  # rows, contracted, columns of a product
# The shape of a real model (SmolLM2-135M), where no checkpoint is given.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a side took: medians of the rounds but for wall, which is the least; ``first`` is the call that compiles."""

    cpu: float
    wall: float
    first: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: work that was timed.
        spent: by side, ``jaxcrit`` and its peers; a command that has no peer stands alone.
        limit: CPU-seconds that nothing on this machine goes below (see `limit`); 0 where it is not products.
        facts: what else was measured or must be known, such as padding, equal tokens, bytes.
    """

    work: str
    spent: dict[str, Spent]
    limit: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """Ours on the first line, then a line for each peer with the ratios of CPU and wall seconds to ours."""
        ours = self.spent[OURS]
        facts = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.facts.items()
        ]
        found = []
        for name, one in {OURS: ours, **self.spent}.items():
            cells = [f"{self.work if name == OURS else '':<34}{name:<26}{one.cpu:8.2f}{one.wall:8.2f}{one.first:8.2f}"]
            if name != OURS:
                cells.append(f"{one.cpu / ours.cpu:8.2f}x{one.wall / ours.wall:8.2f}x")
            elif self.limit:
                cells.append(f"{'':18}{self.limit:8.2f}{ours.cpu / self.limit:7.2f}x")
            found.append("".join(cells))
        return [*found, *([f"{'':<34}{', '.join(facts)}"] if facts else [])]


HEAD = (
    f"{'work':<34}{'who':<26}{'CPU s':>8}{'wall s':>8}{'first':>8}{'of CPU':>9}{'of wall':>9}{'limit':>8}{'to it':>8}"
)


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = 3) -> dict[str, Spent]:
    """Times calls in turns in this process, after one of each that compiles and warms up."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            worked, began = time.process_time(), time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append((time.process_time() - worked, time.perf_counter() - began))
    return {
        name: Spent(statistics.median(cpu for cpu, _ in warm), min(wall for _, wall in warm), first[1])
        for name, (first, *warm) in spent.items()
    }


def limit(flops: Mapping[Shape, float]) -> float:
    """CPU-seconds of operations at the rate that the better of XLA and torch reaches in products of these shapes.

    Args:
        flops: operations by the shape of product they are done in; a work's few dominant shapes will do.
    """
    return sum(count / max(rates(shape).values()) for shape, count in flops.items())


def rates(shape: Shape, seconds: float = 0.3) -> dict[str, float]:
    """Operations per CPU-second of a float32 product, by XLA, torch where it is installed, and numpy.

    Torch and numpy take turns with XLA; each has the best of its turns.
    """
    rng, (rows, inner, columns) = np.random.default_rng(0), shape
    x, w = rng.standard_normal((rows, inner), np.float32), rng.standard_normal((inner, columns), np.float32)
    left, right = jnp.asarray(x), jnp.asarray(w)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    calls: dict[str, Callable[[], Any]] = {
        "XLA": lambda: product(left, right).block_until_ready(),
        "numpy": lambda: x @ w,
    }
    try:
        import torch
    except ImportError:
        pass
    else:
        a, b = torch.from_numpy(x), torch.from_numpy(w)
        calls["torch"] = lambda: a @ b
    best = dict.fromkeys(calls, 0.0)
    for _ in range(3):
        for name, call in calls.items():
            call()
            worked, began, times = time.process_time(), time.perf_counter(), 0
            while time.perf_counter() - began < seconds / 3:
                call()
                times += 1
            best[name] = max(best[name], times * 2 * math.prod(shape) / (time.process_time() - worked))
    return best


def write_checkpoint(path: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """Writes a float32 checkpoint of random weights of the usual scale into a directory, and returns it."""
    rng = np.random.default_rng(1)
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
        for name, shape in hf_shapes(ModelConfig.from_hf(dict(config))).items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path
