"""A training step of layers 12 to 16 of a real shape, 4 rows of 256 tokens, beside torch with all else frozen.

Torch computes in float32, the same numbers, and under autocast to bfloat16, others but faster where the processor has
instructions for it. The limit is that of the products of one step without recomputation, attention by blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rows import OURS, Row, limit, take_turns

from jaxcrit.core.pages import keep_pages
from jaxcrit.models.attention import Attention
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.partition import partition, split
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import initial_state, make_step

BATCH, LENGTH, LAYERS, RATE = 4, 256, tuple(range(12, 17)), 1e-5


def rows(checkpoint: Path) -> list[Row]:
    """One row; the losses of all sides after as many steps stand beside it."""
    keep_pages()  # as `jaxcrit finetune` does; torch gains by it too
    loaded = open_checkpoint(checkpoint)
    config = dataclasses.replace(loaded.config, attention=Attention("auto"))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    mesh = make_mesh(None, jax.devices()[:1])
    parts = partition(config, LAYERS)
    params, frozen = split(parts.gather(load(loaded, dtype="float32", mesh=mesh).weights(), mesh, jnp.float32))
    optimizer = make_optimizer("adamw", make_schedule("constant", RATE, 1000), parts)
    batch = TokenBatch(tokens[None], np.full((1, BATCH), LENGTH, np.int32), np.ones((1, BATCH, LENGTH), bool))

    def ours(remat: bool) -> Callable[[], float]:
        state = [initial_state(parts, optimizer, jax.tree.map(jnp.copy, params), mesh)]
        step = make_step(parts, optimizer, dtype=jnp.float32, remat=remat)

        def call() -> float:
            state[0], metrics = step(state[0], frozen, batch)
            return float(metrics.sums.per_token)

        return call

    calls = {OURS: ours(True), "jaxcrit --noremat": ours(False)}
    calls |= {"torch float32": theirs(checkpoint, tokens), "torch bfloat16": theirs(checkpoint, tokens, True)}
    plain = make_step(parts, optimizer, dtype=jnp.float32, remat=False, form="runs")
    flops = product_flops(plain, initial_state(parts, optimizer, params, mesh), frozen, batch)
    head = 2 * 2 * tokens.size * config.width * config.vocab_size  # forward, and the gradient of what enters it
    inside = (tokens.size, config.width, config.ff_width)
    least = limit({inside: flops - head, (tokens.size, config.width, config.vocab_size): head})
    spent = take_turns(calls)
    losses = {f"loss of {name}": call() for name, call in calls.items()}
    return [Row("step of layers 12-16, 4 x 256", spent, least, {"GFLOP": flops / 1e9, **losses})]


def theirs(checkpoint: Path, tokens: np.ndarray, half: bool = False) -> Callable[[], float]:
    """A step of transformers on torch in which these layers alone have gradients; AdamW is fused."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    names = tuple(f"model.layers.{layer}." for layer in LAYERS)
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith(names))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def call() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return call
