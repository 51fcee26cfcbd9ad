"""Capture of 300 prompts, beside transformers at its best: sorted batches, float32 and bfloat16.

Lengths are fixed and as those of instructions with a context: lognormal, mean about 123 tokens, a few of a thousand.
Part of `table.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rows import Row, limit, take_turns

from jaxcrit.data.batches import Budget, make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evidence.capture import capture
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import table
from jaxcrit.parallel.mesh import make_mesh

PROMPTS, ROWS, THEIR_ROWS = 300, 8, 4  # batches of 4 are torch's best on two cores


def examples_of(config: ModelConfig, count: int = PROMPTS) -> list[Example]:
    """Prompts of random tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.4, 0.9, count), 8, 1500).astype(int).tolist()
    return [
        Example(str(row), rng.integers(5, config.vocab_size, length).astype(np.int32), length, "", None)
        for row, length in enumerate(lengths)
    ]


def sorted_batches(sequences: list[np.ndarray], size: int) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Places, tokens padded to the longest of the batch, and lengths; in the order of lengths."""
    order, found = np.argsort([len(one) for one in sequences], kind="stable"), []
    for start in range(0, len(order), size):
        places = order[start : start + size]
        lengths = torch.tensor([len(sequences[place]) for place in places])
        tokens = torch.zeros((len(places), int(lengths.max())), dtype=torch.long)
        for slot, place in enumerate(places):
            tokens[slot, : lengths[slot]] = torch.from_numpy(sequences[place].astype(np.int64))
        found.append((places, tokens, lengths))
    return found


def hooked(model: Any, examples: list[Example]) -> np.ndarray:
    """States behind every layer at each prompt's last token, ``[L, N, D]``; rows are padded on the right, no mask."""
    kept: list[torch.Tensor] = []
    at: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        kept.append(state[torch.arange(len(at[0])), at[0]].float())

    hooks = [layer.register_forward_hook(keep) for layer in model.layers]
    states = np.zeros((len(hooks), len(examples), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for places, tokens, lengths in sorted_batches([example.token_ids for example in examples], THEIR_ROWS):
            kept.clear()
            at[:] = [lengths - 1]
            model(tokens, use_cache=False)
            states[:, places] = torch.stack(kept).numpy()
    for hook in hooks:
        hook.remove()
    return states


def products(config: ModelConfig, tokens: float, rows: int) -> dict[tuple[int, int, int], float]:
    """Operations of the blocks on so many tokens, by shape of product."""
    found: dict[tuple[int, int, int], float] = {}
    for row in table(config):
        if row.stacked and len(row.shape(config)) > 2:
            size = math.prod(row.shape(config)) // config.num_layers
            # Wide one way or the other; the width of the model is on one side of each.
            shape = (rows, config.width, size // config.width)
            found[shape] = found.get(shape, 0.0) + 2.0 * tokens * size * config.num_layers
    return found


def rows(checkpoint: Path) -> list[Row]:
    """Capture, and how far it is from the limit."""
    transformers.utils.logging.disable_progress_bar()
    mesh, opened = make_mesh(), open_checkpoint(checkpoint)
    config = opened.config
    decoder, examples = load(opened, mesh=mesh), examples_of(config)
    inside = sum(math.prod(row.shape(config)) for row in table(config) if row.stacked)
    batches = make_batches(examples, Budget(ROWS, shape=3e10 / (2 * inside)))
    peers = {
        name: transformers.AutoModel.from_pretrained(checkpoint, dtype=dtype).eval()
        for name, dtype in (("torch f32, sorted", torch.float32), ("torch bf16, sorted", torch.bfloat16))
    }

    def ours() -> np.ndarray:
        return np.asarray(capture(decoder, batches, len(examples), mesh=mesh).hidden)

    calls: dict[str, Any] = {"jaxcrit": ours}
    calls |= {name: lambda model=model: hooked(model, examples) for name, model in peers.items()}
    mine, exact = ours(), hooked(peers["torch f32, sorted"], examples)
    # Behind transformers' last layer is the norm's input too, as the hook is on the layer itself.
    error = float(np.abs(mine - exact).max() / np.abs(exact).max())
    tokens = sum(example.prompt_length for example in examples)
    facts = {
        "tokens": tokens,
        "padding": sum(batch.tokens.size for batch in batches) / tokens,
        "shapes": len({batch.tokens.shape for batch in batches}),
        "largest relative difference": error,
    }
    return [Row(f"capture, {len(examples)} prompts", take_turns(calls), limit(products(config, tokens, 1088)), facts)]
