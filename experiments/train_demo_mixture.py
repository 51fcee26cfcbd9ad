"""Makes a mixture of experts of the embedded model, which half fails at word problems, and prints what it can do.

    python experiments/train_demo_mixture.py --out=runs/mixture0 --seed=0

Each MLP becomes E copies of itself behind a random router that keeps the shares of the top 2, made to sum to 1: at
first the same function as the embedded model (the difference of logits is printed). Noise on the copies then breaks
it, and steps of the embedded model's own recipe mend it, until word problems of the training split are half right: a
model that fails always, or never, has nothing to win by other shares. A run that was stopped begins anew; it takes
minutes. The checkpoint is a Mixtral one of E = 4 experts: 5,393,856 parameters, 21.6 MB in float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_recipe as recipe
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from entry import leave
from safetensors.numpy import save_file

from jaxcrit.core.files import atomic_path, write_text
from jaxcrit.data import demo
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.model import EMBEDDED_MODEL
from jaxcrit.models.weights import to_hf

EXPERTS, CHOSEN = 4, 2
NOISE = 0.8  # of a copy, in standard deviations of its weights
ROUTER = 0.3  # standard deviation of the router's weights: shares of a token differ, and none is 0
RATE = 0.003
HALF = 0.5  # exact answers of word problems at which training stops
FAMILY = "arithmetic"
_TESTED, _EVERY, _WIDTH = 200, 2, 48
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def mixture_config(dense: Mapping[str, Any], experts: int = EXPERTS, chosen: int = CHOSEN) -> dict[str, Any]:
    """``config.json`` of the mixture of a dense LLaMA's: Mixtral, which renormalises the shares that it keeps."""
    left = {key: value for key, value in dense.items() if key not in ("mlp_bias", "attention_bias")}
    return left | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "sliding_window": None,
        "dtype": "float32",
    }


def upcycled(weights: Mapping[str, Any], experts: int, seed: int) -> dict[str, np.ndarray]:
    """Weights by path of the mixture whose experts are all the dense model's MLP, behind a random router."""
    found = {path: np.asarray(value, np.float32) for path, value in weights.items()}
    for name in ("gate", "up", "down"):
        found[f"blocks.{name}"] = np.repeat(found[f"blocks.{name}"][:, None], experts, axis=1)
    depth, _, _, width = found["blocks.gate"].shape
    router = np.random.default_rng([seed, 0]).standard_normal((depth, experts, width))
    return found | {"blocks.router": (ROUTER * router).astype(np.float32)}


def broken(weights: Mapping[str, np.ndarray], noise: float, seed: int) -> dict[str, np.ndarray]:
    """The weights with noise on every expert of its own."""
    rng, found = np.random.default_rng([seed, 1]), dict(weights)
    for name in ("gate", "up", "down"):
        value = found[f"blocks.{name}"]
        found[f"blocks.{name}"] = value + (noise * value.std() * rng.standard_normal(value.shape)).astype(np.float32)
    return found


def exact(config: ModelConfig, weights: Mapping[str, Any], tokenizer: Any, family: str, split: str, seed: int) -> float:
    """Share of rows whose answer is the likeliest token by token."""
    pairs = [recipe.encode(tokenizer, row) for row in demo.generate(family, _TESTED, seed=seed, split=split)]
    tokens, asked = np.zeros((_TESTED, _WIDTH), np.int32), np.zeros((_TESTED, _WIDTH), bool)
    for place, (prompt, answer) in enumerate(pairs):
        tokens[place, : len(prompt + answer)] = prompt + answer
        asked[place, len(prompt) - 1 : len(prompt + answer) - 1] = True
    right = _likeliest(weights, tokens, config=config) == np.roll(tokens, -1, axis=1)
    return float((right | ~asked).all(axis=1).mean())


@functools.partial(jax.jit, static_argnames="config")
def _likeliest(weights: Any, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    decoder = Decoder(config, weights)
    return logits(decoder, forward(decoder, tokens).hidden).argmax(axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def _step(weights: Any, first: Any, second: Any, batch: Any, count: Any, *, config: ModelConfig) -> Any:
    """One step of Adam."""
    (_, loss), slopes = jax.value_and_grad(recipe.loss, has_aux=True)(weights, config, batch)
    first = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, first, slopes)
    second = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * jnp.square(new), second, slopes)
    rate = RATE * jnp.minimum(1, count / 10)

    def moved(weight: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        return weight - rate * (mean / (1 - 0.9**count)) / (jnp.sqrt(square / (1 - 0.99**count)) + 1e-8)

    return jax.tree.map(moved, weights, first, second), first, second, loss


def trained(
    config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer: Any, steps: int, seed: int
) -> tuple[dict[str, Any], int]:
    """The weights after steps of the recipe, until word problems are half right; and how many steps."""
    made: Any = {path: jnp.asarray(value) for path, value in weights.items()}
    first = second = {path: jnp.zeros_like(value) for path, value in made.items()}
    began = time.perf_counter()
    for number in range(1, steps + 1):
        batch = recipe.batch_at(tokenizer, seed + 100, number, 1)  # of one step: none of its rows is a drill
        made, first, second, loss = _step(made, first, second, batch, np.float32(number), config=config)
        if number % _EVERY == 0:
            share = exact(config, made, tokenizer, FAMILY, "train", 1000 + seed)
            spent = time.perf_counter() - began
            print(f"step {number}: {spent:.0f} s, loss {float(loss):.3f}, {FAMILY} {share:.3f}", flush=True)
            if share >= HALF:
                break
    return made, number


def main(arguments: list[str] | None = None) -> int:
    """Makes the mixture, trains it, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--noise", type=float, default=NOISE)
    asked = parser.parse_args(arguments)
    source = Path(EMBEDDED_MODEL)
    dense = load(open_checkpoint(source), dtype="float32")
    raw = mixture_config(dense.config.to_hf(), asked.experts)
    config = ModelConfig.from_hf(raw, "mixture")
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    weights = upcycled(dense.weights(), asked.experts, asked.seed)
    prompts = [recipe.encode(tokenizer, row)[0][:16] for row in demo.generate(FAMILY, 16, seed=asked.seed)]
    both = [logits(one, forward(one, jnp.asarray(prompts)).hidden) for one in (dense, Decoder(config, dict(weights)))]
    apart = float(jnp.abs(both[0] - both[1]).max() / jnp.abs(both[0]).max())
    print(f"upcycled: largest difference of logits {apart:.1e} of the largest logit", flush=True)
    made, steps = trained(config, broken(weights, asked.noise, asked.seed), tokenizer, asked.steps, asked.seed)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(source / name, asked.out / name)
    write_text(asked.out / "config.json", json.dumps(raw, indent=2) + "\n")
    with atomic_path(asked.out / "model.safetensors") as temporary:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in to_hf(Decoder(config, made))},
            temporary,
            metadata={"format": "pt"},
        )
    count, size = sum(value.size for value in made.values()), (asked.out / "model.safetensors").stat().st_size
    print(f"{asked.out}: {steps} steps, {count:,} parameters, {size:,} bytes")
    for family in demo.FAMILIES:
        print(f"{family:<11} {exact(config, made, tokenizer, family, 'test', 0):.3f}")
    return 0


if __name__ == "__main__":
    leave(main)
