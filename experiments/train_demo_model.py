"""Trains the embedded demo model from nothing, exports it, and prints every figure of its card.

    python experiments/train_demo_model.py --seed=0 --out=runs/demo0              # train, from where it stopped
    python experiments/train_demo_model.py --evaluate --out=runs/demo0            # exact match on held-out rows
    python experiments/train_demo_model.py --compare=runs/demo1 --out=runs/demo0  # delta of two seeds
    python experiments/train_demo_model.py --prompts=jaxcrit/assets/demo_prompts  # the test prompts

On Linux training starts the program again with malloc settings that keep large arrays in huge pages: a quarter more
tokens a second, since XLA otherwise gives the pages of every temporary back and faults them in again.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import demo_recipe as recipe
import demo_tokenizer
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from absl import app, flags
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxcrit.core.files import atomic_path, read_npz, write_npz, write_text
from jaxcrit.criteria.delta import delta
from jaxcrit.data import demo
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.generation import generate
from jaxcrit.models.sites import Tap
from jaxcrit.models.weights import to_hf
from jaxcrit.similarity import cka

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "runs/demo_model", "checkpoint directory; the state of training is kept in OUT/training.npz")
flags.DEFINE_integer("seed", 0, "of the weights and of the data", lower_bound=0)
flags.DEFINE_integer("layers", 16, "blocks", lower_bound=1)
flags.DEFINE_integer("width", 96, "of the residual stream; a multiple of 32", lower_bound=32)
flags.DEFINE_integer("steps", 2000, "optimizer steps before the model settles", lower_bound=1)
flags.DEFINE_float("rate", 0.02, "peak learning rate")
flags.DEFINE_integer("save_every", 200, "steps between two states on disk", lower_bound=1)
flags.DEFINE_bool("evaluate", False, "print exact match of OUT instead of training")
flags.DEFINE_string("compare", "", "a second checkpoint directory: print delta of both instead of training")
flags.DEFINE_string("prompts", "", "directory to write the test prompts to instead of training")
flags.DEFINE_integer("rows", 300, "test rows per family", lower_bound=4)

_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**28),
}
_KEYS = ("weights", "first", "second")


def train(out: Path) -> None:
    """Trains, from the state in ``out`` if there is one, and exports."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _MALLOC)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_tokenizer.build()
    hf = recipe.hf_config(tokenizer.get_vocab_size(), FLAGS.layers, FLAGS.width)
    config = ModelConfig.from_hf(hf, "demo model")
    settings = {name: FLAGS[name].value for name in ("seed", "layers", "width", "steps", "rate")}
    weights = recipe.initial_weights(config, FLAGS.seed)
    first, second = ({path: np.zeros_like(value) for path, value in weights.items()} for _ in range(2))
    start, seconds, state = 0, 0.0, out / "training.npz"
    if state.exists():
        arrays, meta = read_npz(state)
        if meta["settings"] != settings:
            raise app.UsageError(
                f"{state} was written with {meta['settings']}, asked is {settings}; choose another --out"
            )
        weights, first, second = ({path: arrays[f"{key}/{path}"] for path in weights} for key in _KEYS)
        start, seconds = meta["step"], meta["seconds"]
    update = jax.jit(
        functools.partial(recipe.update, config=config, steps=FLAGS.steps, rate=FLAGS.rate), donate_argnums=(0, 1, 2)
    )
    began, losses = time.perf_counter() - seconds, []
    total = FLAGS.steps + recipe.SETTLE_STEPS
    for step in (bar := tqdm(range(start, total), initial=start, total=total, unit="step", mininterval=2)):
        if step == FLAGS.steps:
            weights = recipe.soften({path: jnp.asarray(value) for path, value in weights.items()})
        batch = recipe.batch_at(tokenizer, FLAGS.seed, step, FLAGS.steps)
        weights, first, second, loss = update(weights, first, second, batch, np.int32(step))
        losses.append(loss)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(jax.device_get(losses[-50:])):.3f}")
        if done % FLAGS.save_every == 0 or done in (FLAGS.steps, total):
            arrays = {
                f"{key}/{path}": np.asarray(value)
                for key, tree in zip(_KEYS, (weights, first, second), strict=True)
                for path, value in tree.items()
            }
            elapsed = time.perf_counter() - began
            write_npz(state, arrays, {"settings": settings, "step": done, "seconds": elapsed})
            print(f"step {done}: {elapsed:.0f} s, response loss {np.mean(jax.device_get(losses)):.3f}", flush=True)
            losses = []
            if done < total:
                print(f"    {_line(exact_match(Decoder(config, weights), tokenizer, 50))}", flush=True)
    export(Decoder(config, weights), hf, tokenizer, out)


def export(decoder: Decoder, hf: dict, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Writes the directory that transformers and jaxcrit load, weights in bfloat16."""
    demo_tokenizer.save(tokenizer, str(out))
    write_text(out / "config.json", json.dumps(hf, indent=2) + "\n")
    generation = {
        "bos_token_id": hf["bos_token_id"],
        "eos_token_id": hf["eos_token_id"],
        "pad_token_id": hf["pad_token_id"],
        "do_sample": False,
    }
    write_text(out / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    tensors = {name: np.ascontiguousarray(value.astype(ml_dtypes.bfloat16)) for name, value in to_hf(decoder)}
    with atomic_path(out / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    count, size = sum(tensor.size for tensor in tensors.values()), (out / "model.safetensors").stat().st_size
    print(f"{out}: {count:,} parameters, {size:,} bytes", flush=True)


def exact_match(
    decoder: Decoder,
    tokenizer: tokenizers.Tokenizer,
    count: int,
    families: Sequence[str] = demo.FAMILIES,
    encode: recipe.Encode = recipe.encode,
) -> dict[str, tuple[int, int]]:
    """By family, how many greedy answers equal the reference word for word, and of how many test rows."""
    right = {}
    for family in families:
        pairs = [encode(tokenizer, row) for row in demo.generate(family, count, seed=0, split="test")]
        lengths = np.array([len(prompt) for prompt, _ in pairs], np.int32)
        tokens = np.full((count, 48), demo_tokenizer.PAD, np.int32)
        for index, (prompt, _) in enumerate(pairs):
            tokens[index, : len(prompt)] = prompt
        answers = generate(decoder, tokens, lengths, 24, stop=(demo_tokenizer.EOS,)).token_ids
        hits = sum(answer == response[:-1] for answer, (_, response) in zip(answers, pairs, strict=True))
        right[family] = hits, count
    return right


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    z, p = 1.959964, right / asked
    middle, half = p + z * z / (2 * asked), z * np.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return (middle - half) / (1 + z * z / asked), (middle + half) / (1 + z * z / asked)


def deltas(directory: Path) -> dict[str, np.ndarray]:
    """By family, the paper's delta (biased, window 5) at the last prompt token: ``[L]``, NaN at the edges."""
    decoder, tokenizer = load(open_checkpoint(directory), dtype="float32"), _tokenizer(directory)

    @jax.jit
    def last_token(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        tap = Tap(lambda site, before, after, positions: after[np.arange(len(after)), lengths - 1], ("block",))
        return forward(decoder, tokens, tap=tap).taps["block"]

    found = {}
    for family in demo.FAMILIES:
        prompts = [recipe.encode(tokenizer, row)[0] for row in demo.generate(family, FLAGS.rows, seed=0, split="test")]
        tokens = np.array([prompt + [demo_tokenizer.PAD] * (48 - len(prompt)) for prompt in prompts], np.int32)
        hidden = last_token(tokens, np.array([len(prompt) for prompt in prompts]))
        found[family] = delta(cka(np.asarray(hidden)))[0]
    return found


def compare(one: Path, other: Path) -> None:
    """Prints delta of two checkpoints side by side, and how well their layers agree in rank."""
    left, right = deltas(one), deltas(other)
    for family in demo.FAMILIES:
        a, b = left[family], right[family]
        valid = np.isfinite(a)
        ranks = [np.argsort(np.argsort(values[valid])) for values in (a, b)]
        print(f"{family}: rank correlation {np.corrcoef(*ranks)[0, 1]:.2f} over {valid.sum()} layers")
        for name, values in (("A", a), ("B", b)):
            print(f"    {name} " + " ".join("   - " if np.isnan(value) else f"{value:.3f}" for value in values))


def _tokenizer(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def _line(right: dict[str, tuple[int, int]]) -> str:
    return "  ".join(f"{family} {hits / asked:.2f}" for family, (hits, asked) in right.items())


def main(argv: list[str]) -> None:
    """Does what the flags ask."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    out = Path(FLAGS.out)
    if FLAGS.prompts:
        directory = Path(FLAGS.prompts)
        directory.mkdir(parents=True, exist_ok=True)
        for family in demo.FAMILIES:
            rows = demo.generate(family, FLAGS.rows, seed=0, split="test")
            write_text(directory / f"{family}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    elif FLAGS.compare:
        compare(out, Path(FLAGS.compare))
    elif FLAGS.evaluate:
        families = (*demo.FAMILIES, *demo.HELD_OUT)
        right = exact_match(load(open_checkpoint(out)), _tokenizer(out), FLAGS.rows, families)
        for family, (hits, asked) in right.items():
            low, high = wilson(hits, asked)
            print(f"{family:<11} {hits}/{asked} = {hits / asked:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    else:
        train(out)


if __name__ == "__main__":
    app.run(main)
