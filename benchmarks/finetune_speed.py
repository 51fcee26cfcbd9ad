"""A training step of five critical layers beside a full one, and beside transformers with the same layers frozen.

32 layers of width 320, vocabulary 4,096 (42 M parameters), batch 8 x 128, float32, AdamW, on the same cores, taking
turns in one process; the losses of all are compared first. The ratio of critical to full stands beside that of the
floating-point operations, counted from the traced steps. Temporary memory is XLA's. Run as
``python benchmarks/finetune_speed.py`` with the parity extra installed (about five minutes on two cores).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from environment import write_result

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.partition import OUTSIDE, partition, split
from jaxcrit.models.weights import table, to_hf
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import initial_state, make_step

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 32,
    "num_attention_heads": 5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
BATCH, LENGTH, ROUNDS = 8, 128, 7
MIDDLE, SCATTERED = tuple(range(20, 25)), (3, 9, 15, 21, 27)
Step = Callable[[], float]


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """By weight-table path: norms one, the rest normal."""
    rng = np.random.default_rng(0)
    return {
        row.path: np.ones(row.shape(config), np.float32)
        if row.path.endswith("norm")
        else 0.02 * rng.standard_normal(row.shape(config), np.float32)
        for row in table(config)
    }


def ours(config: ModelConfig, layers: tuple[int, ...], outside: tuple[str, ...], tokens: np.ndarray, **options: Any):
    """A step of jaxcrit: what calls it, its temporary memory in MiB, its operations."""
    parts = partition(config, layers, outside)
    mesh = make_mesh(None, jax.devices()[:1])
    loaded = {path: jnp.asarray(value) for path, value in weights(config).items()}
    params, frozen = split(parts.gather(loaded, mesh, jnp.float32))
    optimizer = make_optimizer("adamw", make_schedule("constant", 1e-4, 1000), parts)
    state = [initial_state(parts, optimizer, params, mesh)]
    lengths = np.full((1, len(tokens)), tokens.shape[1], np.int32)
    batch = TokenBatch(tokens[None], lengths, np.ones((1, *tokens.shape), bool))
    step = make_step(parts, optimizer, dtype=jnp.float32, **options)
    lowered = step.lower(state[0], frozen, batch)  # type: ignore[attr-defined]
    compiled = lowered.compile()
    operations = product_flops(
        make_step(parts, optimizer, dtype=jnp.float32, remat=False, form="runs"), state[0], frozen, batch
    )

    def call() -> float:
        state[0], metrics = compiled(state[0], frozen, batch)
        return float(metrics.sums.per_token)

    return call, compiled.memory_analysis().temp_size_in_bytes / 2**20, operations


def theirs(config: ModelConfig, layers: tuple[int, ...], tokens: np.ndarray) -> Step:
    """A step of transformers on torch with all but these layers frozen."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config.to_hf()))
    state = {name: torch.from_numpy(np.array(value)) for name, value in to_hf(Decoder(config, weights(config)))}
    model.load_state_dict(state)
    names = tuple(f"model.layers.{layer}." for layer in layers)
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith(names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def call() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def main() -> None:
    """Takes turns, prints and writes the best of each."""
    transformers.logging.set_verbosity_error()
    config = ModelConfig.from_hf(CONFIG)
    tokens = np.random.default_rng(1).integers(0, 4096, (BATCH, LENGTH)).astype(np.int32)
    made = {
        "full": ours(config, tuple(range(32)), OUTSIDE, tokens),
        "critical": ours(config, MIDDLE, (), tokens),
        "critical, no remat": ours(config, MIDDLE, (), tokens, remat=False),
        "scattered, runs": ours(config, SCATTERED, (), tokens, form="runs"),
        "scattered, gaps": ours(config, SCATTERED, (), tokens, form="gaps"),
    }
    steps: dict[str, Step] = {name: call for name, (call, _, _) in made.items()}
    steps["torch critical"] = theirs(config, MIDDLE, tokens)
    losses = {name: call() for name, call in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, call in steps.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    # Other work on the machine only ever adds time, so the best round is the one to compare.
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        rest = f"{made[name][1]:>9.0f} MiB{made[name][2] / 1e9:>9.1f} GFLOP" if name in made else ""
        print(f"{name:<22}{value:>8.3f} s (median {statistics.median(seconds[name]):.3f}){rest}")
    ratios = {
        "critical / full, seconds": best["critical"] / best["full"],
        "critical / full, operations without remat": made["critical"][2] / made["full"][2],
        "torch / jaxcrit, both without remat": best["torch critical"] / best["critical, no remat"],
        "torch / jaxcrit with remat": best["torch critical"] / best["critical"],
        "gaps / runs": best["scattered, gaps"] / best["scattered, runs"],
    }
    for name, value in ratios.items():
        print(f"{name:<44}{value:>8.3f}")
    write_result(
        "finetune_speed",
        {
            "seconds_best": best,
            "seconds": seconds,
            "temporary_mib": {name: memory for name, (_, memory, _) in made.items()},
            "gflop_without_remat": {name: operations / 1e9 for name, (_, _, operations) in made.items()},
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
