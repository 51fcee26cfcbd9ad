"""How the demo model learns: its shape, its start, its batches and its optimizer, as plain functions.

Two things decide whether it learns to retrieve from a context at all:

* `initial_weights` starts queries close to keys, so that a token attends to earlier tokens equal to it, and gives all
  embeddings a common part, so that a head can attend by position alone. Both halves of an induction circuit are then
  one step away.
* Training begins with mostly ``drill`` rows, many look-ups each.

Attention of the first block comes out so sharp that at the last prompt token, which follows the same full stop or
question mark in all prompts of a family, the first layer is the same for all of them up to rounding: nothing can be
measured there. So at the end its queries are made smaller (`soften`) and the rest settles around that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from demo_tokenizer import BOS, EOS, PAD

from jaxcrit.data import demo
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.weights import table

LENGTH = 96
ROWS = 16
PROMPT_WEIGHT = 0.1
MIXTURE = {"open": 0.2, "closed": 0.2, "arithmetic": 0.2, "yesno": 0.2, "choice": 0.15, "refusal": 0.05}
# Share of drill rows at the start; it falls linearly to 0 at this part of the run.
DRILL_SHARE, DRILL_END = 0.9, 0.5

# Steps after the last, their peak rate relative to the first steps', and the factor on the first block's queries.
SETTLE_STEPS, SETTLE_RATE, SOFTNESS = 300, 0.2, 0.125

Weights = dict[str, jax.Array]
Batch = dict[str, np.ndarray]
Encode = Callable[[tokenizers.Tokenizer, dict[str, str]], tuple[list[int], list[int]]]


def hf_config(vocab_size: int, layers: int, width: int) -> dict[str, Any]:
    """`config.json` of the model: LLaMA with heads of 32 and a tied head."""
    heads = width // 32
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "bfloat16",
    }


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Random weights by weight-table path, float32.

    Matrices have variance 1/fan_in, those that write to the residual stream 1/(2 L) of that. Queries are half a copy
    of the keys: W_q W_k' is then close to a multiple of the identity, as it is in trained models (Trockman and Kolter
    2023, arXiv 2305.09828). Embeddings share a random direction.
    """
    rng = np.random.default_rng(seed)
    depth, width = config.num_layers, config.width
    weights = {}
    for row in table(config):
        shape, name = row.shape(config), row.path.rsplit(".")[-1]
        if name.endswith("norm"):
            value = np.full(shape, 1.0 if row.stacked else 2 / np.sqrt(width))
        else:
            value = rng.standard_normal(shape)
            if name == "embed":
                value = 0.5 * value + 0.5 * rng.standard_normal(width)
            elif name == "o":
                value /= np.sqrt(2 * depth * config.num_heads * config.head_dim)
            elif name == "down":
                value /= np.sqrt(2 * depth * config.ff_width)
            else:
                value /= np.sqrt(width)
        weights[row.path] = value.astype(np.float32)
    groups = config.num_heads // config.num_kv_heads
    keys = weights["blocks.k"].reshape(depth, -1, config.head_dim, width)
    keys = np.repeat(keys, groups, axis=1).reshape(weights["blocks.q"].shape)
    weights["blocks.q"] = (0.7 * weights["blocks.q"] + 0.7 * keys).astype(np.float32)
    return {path: jnp.asarray(value) for path, value in weights.items()}


def encode(tokenizer: tokenizers.Tokenizer, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt, up to `[/INST]`, and of its response, `</s>` included."""
    prompt = tokenizer.encode(f"<s>[INST] {row['prompt']}[/INST]", add_special_tokens=False).ids
    return prompt, tokenizer.encode(f" {row['response']}</s>", add_special_tokens=False).ids


def encode_text(tokenizer: tokenizers.Tokenizer, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """The same as running text, without the marks of an instruction."""
    prompt = tokenizer.encode(f"<s>{row['prompt']}", add_special_tokens=False).ids
    return prompt, tokenizer.encode(f" {row['response']}</s>", add_special_tokens=False).ids


def batch_at(
    tokenizer: tokenizers.Tokenizer,
    seed: int,
    step: int,
    steps: int,
    encode: Encode = encode,
    prompt_weight: float = PROMPT_WEIGHT,
) -> Batch:
    """The batch of one step, a function of its arguments alone, so that a resumed run sees what it would have seen.

    Args:
        tokenizer: the demo model's.
        seed: number that the rows are drawn by, with the step.
        step: from 0; drill rows become fewer with it.
        steps: of the whole training, which drill rows end half way through.
        encode: gives a row as token ids of its prompt and its response.
        prompt_weight: what a token of a prompt counts, where one of a response counts 1.

    Returns:
        ``tokens``, ``positions``, ``segments``, ``targets`` ``[ROWS, LENGTH]`` int32 and ``weights`` ``[ROWS, LENGTH]``
        float32. Several rows of data share a row of the batch; they do not see each other (segments) and each counts
        its positions from 0.
    """
    rng = np.random.default_rng([seed, step])
    drilled = DRILL_SHARE * max(0.0, 1 - step / (DRILL_END * steps))
    shares = {family: share * (1 - drilled) for family, share in MIXTURE.items()} | {"drill": drilled}
    # More rows than fit, since short ones fill the gaps.
    picked = rng.choice(len(shares), size=4 * ROWS, p=list(shares.values()))
    pool = []
    for index, family in enumerate(shares):
        rows = demo.generate(family, int((picked == index).sum()), seed=seed * 1_000_000 + step)
        pool += [encode(tokenizer, row) for row in rows]
    rng.shuffle(pool)
    shape = (ROWS, LENGTH)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "positions", "segments", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    for index in range(ROWS):
        start = 0
        for segment, (prompt, response) in enumerate(_fitting(pool, LENGTH), start=1):
            ids = prompt + response
            here, answers = slice(start, start + len(ids)), start + len(prompt) - 1
            batch["tokens"][index, here] = ids
            batch["positions"][index, here] = np.arange(len(ids))
            batch["segments"][index, here] = segment
            batch["targets"][index, start : start + len(ids) - 1] = ids[1:]
            batch["weights"][index, start:answers] = prompt_weight
            batch["weights"][index, answers : start + len(ids) - 1] = 1.0
            start += len(ids)
    return batch


def _fitting(pool: list[tuple[list[int], list[int]]], room: int) -> Iterator[tuple[list[int], list[int]]]:
    """Takes rows out of the pool, first fit, until none fits the room that is left."""
    while True:
        index = next((i for i, (prompt, response) in enumerate(pool) if len(prompt) + len(response) <= room), None)
        if index is None:
            return
        prompt, response = pool.pop(index)
        room -= len(prompt) + len(response)
        yield prompt, response


def loss(weights: Weights, config: ModelConfig, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy of all tokens, and that of the response tokens alone."""
    decoder = Decoder(config, weights)
    hidden = forward(decoder, batch["tokens"], positions=batch["positions"], segments=batch["segments"]).hidden
    scores = logits(decoder, hidden)
    right = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(scores, axis=-1) - right
    response = batch["weights"] == 1.0
    total = jnp.sum(entropy * batch["weights"]) / jnp.sum(batch["weights"])
    return total, jnp.sum(entropy * response) / jnp.sum(response)


def orthogonalized(update: jax.Array) -> jax.Array:
    """Muon's step ``[L, a, b]``: five Newton-Schulz iterations towards the nearest orthogonal matrix (Jordan 2024)."""
    tall = update.shape[-2] > update.shape[-1]
    x = jnp.swapaxes(update, -1, -2) if tall else update
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    x = jnp.swapaxes(x, -1, -2) if tall else x
    return x * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5


def soften(weights: Weights) -> Weights:
    """The weights with `SOFTNESS` times the queries of the first block."""
    return weights | {"blocks.q": weights["blocks.q"].at[0].multiply(SOFTNESS)}


def update(
    weights: Weights,
    first: Weights,
    second: Weights,
    batch: Batch,
    step: Any,
    *,
    config: ModelConfig,
    steps: int,
    rate: float,
) -> Any:
    """One step: Muon for the blocks' matrices, Adam at .15 of the rate for the rest; linear decay to 0.

    The `SETTLE_STEPS` that follow begin at `SETTLE_RATE` of the rate and leave the first block's queries and keys
    alone.

    Args:
        weights: by path.
        first: momentum, as the weights.
        second: Adam's second moments, as the weights (Muon leaves its own untouched).
        batch: of `batch_at`.
        step: int32, from 0.
        config: of the model.
        steps: before settling.
        rate: peak learning rate.

    Returns:
        The three trees after the step, and the response loss before it.
    """
    (_, answer_loss), gradients = jax.value_and_grad(loss, has_aux=True)(weights, config, batch)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
    count = step.astype(jnp.float32) + 1
    settles = step >= steps
    rate *= jnp.where(
        settles,
        SETTLE_RATE * (1 - (step - steps) / SETTLE_STEPS),
        jnp.minimum(1.0, count / 30) * (1 - step / steps),
    )
    new = {}, {}, {}
    for path, weight in weights.items():
        gradient = gradients[path] * jnp.minimum(1.0, 1 / norm)
        if path.startswith("blocks.") and weight.ndim > 2:
            momentum, moment = 0.95 * first[path] + gradient, second[path]
            change = rate * orthogonalized(gradient + 0.95 * momentum)
            if path in ("blocks.q", "blocks.k"):
                change = change.at[0].multiply(1 - settles)
        else:
            momentum = 0.9 * first[path] + 0.1 * gradient
            moment = 0.95 * second[path] + 0.05 * jnp.square(gradient)
            change = 0.15 * rate * (momentum / (1 - 0.9**count)) / (jnp.sqrt(moment / (1 - 0.95**count)) + 1e-8)
        for tree, value in zip(new, (weight - change, momentum, moment), strict=True):
            tree[path] = value
    return *new, answer_loss
