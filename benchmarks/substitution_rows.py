"""Substitution of all windows of five layers, beside torch at its best: shared prefixes, the head on responses only.

Random weights, a tuned model that differs from its base in the blocks. Part of `table.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from capture_rows import products, sorted_batches
from rows import Row, limit, take_turns

from jaxcrit.criteria.substitution import host_variant, join, variants, windows
from jaxcrit.data.batches import Budget, make_batches, response_mask
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import most_scored
from jaxcrit.evidence.variants import planned_evaluations, sweep
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.step import place

WINDOW, TEXTS, ROWS, THEIR_ROWS = 5, 16, 8, 4


def examples_of(config: ModelConfig) -> list[Example]:
    """Prompts with responses, of random tokens: about 60 and 70 of them."""
    rng, made = np.random.default_rng(3), []
    for row in range(TEXTS):
        prompt, response = (int(np.clip(rng.lognormal(mean, 0.5), 8, 400)) for mean in (4.0, 4.1))
        tokens = rng.integers(5, config.vocab_size, prompt + response).astype(np.int32)
        made.append(Example(str(row), tokens, prompt, "", ""))
    return made


def torch_losses(base: Any, tuned: Any, sets: list[tuple[int, ...]], examples: list[Example]) -> np.ndarray:
    """``[V, N]`` summed response losses; of what windows share, the tuned model's lower layers, nothing runs twice."""
    depth, found = tuned.config.num_hidden_layers, np.zeros((len(sets), len(examples)))
    prompts = torch.tensor([example.prompt_length for example in examples])
    with torch.inference_mode():
        for places, tokens, lengths in sorted_batches([example.token_ids for example in examples], THEIR_ROWS):
            positions = torch.arange(tokens.shape[1])[None]
            turned = tuned.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
            learn = (positions >= prompts[places][:, None]) & (positions < lengths[:, None])
            row, at = torch.nonzero(learn, as_tuple=True)
            targets = tokens[row, at]

            def run(model: Any, x: torch.Tensor, layers: Any, turned: Any = turned) -> torch.Tensor:
                for layer in layers:
                    out = model.model.layers[layer](x, position_embeddings=turned)
                    x = out[0] if isinstance(out, tuple) else out
                return x

            state, reached = tuned.model.embed_tokens(tokens), 0
            for number, layers in enumerate(sets):
                state, reached = run(tuned, state, range(reached, layers[0])), layers[0]
                x = run(tuned, run(base, state, layers), range(layers[-1] + 1, depth))
                logits = tuned.lm_head(tuned.model.norm(x[row, at - 1]))
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                found[number, places] = torch.zeros(len(places)).index_add_(0, row, losses).numpy()
    return found


def rows(checkpoint: Path) -> list[Row]:
    """All windows on 16 rows."""
    transformers.utils.logging.disable_progress_bar()
    mesh, opened = make_mesh(), open_checkpoint(checkpoint)
    config, rng = opened.config, np.random.default_rng(4)
    base = load(opened, mesh=mesh).weights()
    tuned = {
        path: value * (1 + 0.05 * rng.standard_normal(value.shape[:1] + (1,) * (value.ndim - 1), np.float32))
        if path.startswith("blocks.")
        else value
        for path, value in base.items()
    }
    tuned = {path: jax.device_put(value, base[path].sharding) for path, value in tuned.items()}
    examples, sets = examples_of(config), list(windows(config.num_layers, WINDOW).values())
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval() for _ in "bt"]
    _fill(theirs[1], config, tuned)
    outside = dict(tuned)
    blocks, host = join(config, dict(base), dict(tuned)), host_variant(config.num_layers, base=False)
    made = variants(sets, config.num_layers)
    batches = make_batches(examples, Budget(ROWS), prompt_only=False)
    placed = []
    for batch in batches:
        learn = response_mask(batch, examples)
        rows_of = TokenBatch(batch.tokens, batch.lengths, learn, most_scored(learn, mesh))
        placed.append((batch.rows, place(rows_of, mesh)))

    def ours() -> np.ndarray:
        found = np.zeros((len(sets), len(examples)))
        for places, batch in placed:
            real = places < len(examples)
            found[:, places[real]] = sweep(blocks, outside, host, made, batch).losses[:, real]
        return found

    mine, exact = ours(), torch_losses(*theirs, sets, examples)
    tokens = sum(len(example.token_ids) for example in examples)
    scored = sum(len(example.token_ids) - example.prompt_length for example in examples)
    passes = planned_evaluations(made, config.num_layers) / config.num_layers
    needed = products(config, passes * tokens, 1088)
    needed[(512, config.width, config.vocab_size)] = 2.0 * len(sets) * scored * config.width * config.vocab_size
    facts = {
        "rows": len(examples),
        "passes": passes,
        "padding": sum(batch.tokens.size for batch in batches) / tokens,
        "head on": sum(batch.scored for _, batch in placed) / scored,
        "largest relative difference": float(np.abs(mine / exact - 1).max()),
    }
    calls = {"jaxcrit": ours, "torch f32, shared prefixes": lambda: torch_losses(*theirs, sets, examples)}
    return [Row(f"substitution, {len(sets)} windows", take_turns(calls), limit(needed), facts)]


def _fill(model: Any, config: ModelConfig, weights: dict[str, Any]) -> None:
    """Puts weights into transformers' model."""
    from jaxcrit.models.weights import to_hf

    state = {name: torch.from_numpy(np.array(value)) for name, value in to_hf(Decoder(config, weights))}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
