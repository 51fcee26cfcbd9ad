"""Warm capture against a transformers loop with hooks, one prompt at a time: same weights, prompts, dtype and cores.

A LLaMA shape of 110 M parameters, 300 prompts of mixed length (lognormal, mean about 80 tokens), float32. The two take
turns in one process, and the states they return are compared. Run as ``python benchmarks/capture_speed.py`` with the
parity extra installed (about four minutes on two cores).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from environment import write_result
from rows import rates
from safetensors.numpy import save_file

from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evidence.capture import capture, compiled_steps
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import hf_shapes, table
from jaxcrit.parallel.mesh import make_mesh

TARGET = 2.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def prompts(count: int) -> list[Example]:
    """Random tokens; lengths lognormal with mean 80, between 8 and 512."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(80) - 0.6**2 / 2, 0.6, count), 8, 512).astype(int)
    return [
        Example(f"{row}", rng.integers(0, 32000, length).astype(np.int32), int(length), "", None)
        for row, length in enumerate(lengths)
    ]


def write_checkpoint(path: Path) -> None:
    """Random weights of the usual scale."""
    rng = np.random.default_rng(1)
    shapes = hf_shapes(ModelConfig.from_hf(CONFIG))
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def hooked(model: Any, examples: list[Example]) -> np.ndarray:
    """What a user would write instead: a hook on every layer that keeps the last token's state; ``[L, N, D]``."""
    states: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output[0, -1].clone()))
        for layer, kept in zip(model.model.layers, states, strict=True)
    ]
    with torch.inference_mode():
        for example in examples:
            model.model(torch.from_numpy(example.token_ids[None].astype(np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(kept) for kept in states]).numpy()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    began = time.perf_counter()
    states = function()
    return time.perf_counter() - began, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    examples, mesh = prompts(args.prompts), make_mesh()
    batches = make_batches(examples, args.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_checkpoint(path)
        load_ours, decoder = timed(lambda: load(open_checkpoint(path), mesh=mesh))
        load_theirs, model = timed(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        )

        def ours() -> np.ndarray:
            return np.asarray(capture(decoder, batches, len(examples), mesh=mesh).hidden)

        def theirs() -> np.ndarray:
            return hooked(model, examples)

        (cold_ours, states), (cold_theirs, expected) = timed(ours), timed(theirs)
        rounds = [(timed(theirs)[0], timed(ours)[0]) for _ in range(args.rounds)]
    error = float(np.abs(states - expected).max() / np.abs(expected).max())
    warm_theirs, warm_ours = (min(times) for times in zip(*rounds, strict=True))
    tokens, padded = sum(example.prompt_length for example in examples), sum(batch.tokens.size for batch in batches)
    ceiling = cores * max(rates((768, CONFIG["hidden_size"], CONFIG["intermediate_size"])).values()) / 1e9
    config = ModelConfig.from_hf(CONFIG)
    inside = sum(np.prod(row.shape(config)) for row in table(config) if row.stacked)
    floor = 2 * float(inside) * tokens / ceiling / 1e9
    result = {
        "matmul_ceiling_gflops": ceiling,
        "seconds_at_ceiling_without_padding": floor,
        "prompts": len(examples),
        "tokens": tokens,
        "padded_tokens": padded,
        "batch_size": args.batch_size,
        "buckets": sorted({batch.tokens.shape[1] for batch in batches}),
        "compiles": compiled_steps(),
        "threads": cores,
        "largest_relative_difference": error,
        "load_seconds": {"jaxcrit": load_ours, "transformers": load_theirs},
        "cold_seconds": {"jaxcrit": cold_ours, "transformers": cold_theirs},
        "warm_seconds": {"jaxcrit": warm_ours, "transformers": warm_theirs},
        "rounds_seconds": [{"transformers": them, "jaxcrit": us} for them, us in rounds],
        "speedup": warm_theirs / warm_ours,
        "speedup_cold": cold_theirs / cold_ours,
        "target": TARGET,
    }
    print(
        f"{len(examples)} prompts, {tokens} tokens ({padded} with padding), {cores} cores; states agree to {error:.1e}"
    )
    for kind, them, us in (
        ("warm (best round)", warm_theirs, warm_ours),
        ("cold, compiles included", cold_theirs, cold_ours),
        ("loading", load_theirs, load_ours),
    ):
        print(f"{kind:>24}: transformers + hooks {them:6.1f} s, jaxcrit {us:6.1f} s: {them / us:.2f}x")
    print(
        f"at the cores' matmul ceiling ({ceiling:.0f} GFLOP/s) and without padding it would take {floor:.1f} s:"
        f" {warm_theirs / floor:.2f}x"
    )
    print(f"target {TARGET}x warm; wrote {write_result('capture_speed', result)}")


if __name__ == "__main__":
    main()
