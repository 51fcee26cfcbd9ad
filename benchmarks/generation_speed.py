"""Greedy generation against transformers on the same cores: same weights, prompts and number of new tokens, float32.

The embedded model and the LLaMA shape of 110 M parameters of capture_speed.py, one prompt at a time and 16 of mixed
length at once (transformers pads on the left and masks). Neither stops before the last token. The two take turns in
one process; their tokens are compared. Run as ``python benchmarks/generation_speed.py`` with the parity extra
installed (about three minutes on two cores).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from capture_speed import timed, write_checkpoint
from environment import write_result
from rows import OURS, Row, limit, take_turns

from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.generation import generate
from jaxcrit.models.model import EMBEDDED_MODEL
from jaxcrit.parallel.mesh import make_mesh

BATCHES = (1, 16)
LENGTHS = (16, 40)  # shortest and longest prompt


def prompts(count: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, right padded, and their lengths."""
    rng = np.random.default_rng(count)
    lengths = np.linspace(LENGTHS[1], LENGTHS[0], count).astype(int)
    return rng.integers(3, vocabulary, (count, LENGTHS[1])).astype(np.int32), lengths


def theirs(model: Any, tokens: np.ndarray, lengths: np.ndarray, new: int) -> list[list[int]]:
    """transformers' answer to a batch, padded on the left."""
    width = tokens.shape[1]
    ids, mask = np.zeros(tokens.shape, np.int64), np.zeros(tokens.shape, np.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = tokens[row, :length], 1
    with torch.inference_mode():
        found = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[:, width:].tolist()


def compare(path: Path, new: int, rounds: int) -> dict[str, Any]:
    """Both sides on one checkpoint, batch by batch."""
    decoder = load(open_checkpoint(path), dtype="float32", mesh=make_mesh())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    result = {}
    for batch in BATCHES:
        tokens, lengths = prompts(batch, decoder.config.vocab_size)
        sides: dict[str, Callable[[], list[list[int]]]] = {
            "jaxcrit": lambda t=tokens, n=lengths: generate(decoder, t, n, new).token_ids,
            "transformers": lambda t=tokens, n=lengths: theirs(model, t, n, new),
        }
        cold = {name: timed(side) for name, side in sides.items()}
        answers = [answer for _, answer in cold.values()]
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                before = time.process_time()
                seconds, _ = timed(side)
                spent[name].append((seconds, time.process_time() - before))
        warm = {name: min(seconds for seconds, _ in one) for name, one in spent.items()}
        processor = {name: float(np.median([seconds for _, seconds in one])) for name, one in spent.items()}
        rates = {
            name: {"warm": batch * new / seconds, "with_compile": batch * new / cold[name][0]}
            for name, seconds in warm.items()
        }
        result[f"batch_{batch}"] = {
            "tokens_per_second": rates,
            "ratio": warm["transformers"] / warm["jaxcrit"],
            "processor_seconds": processor,
            "processor_ratio": processor["transformers"] / processor["jaxcrit"],
            "ratio_with_compile": cold["transformers"][0] / cold["jaxcrit"][0],
            "equal_tokens": float(np.mean(np.array(answers[0]) == np.array(answers[1]))),
        }
    return result


def rows(checkpoint: Path, new: int = 64) -> list[Row]:
    """One prompt, and 16 of mixed length; the limit is that of a step's widest product."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    decoder = load(open_checkpoint(checkpoint), dtype="float32", mesh=make_mesh())
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config, found = decoder.config, []
    for batch in BATCHES:
        tokens, lengths = prompts(batch, config.vocab_size)
        calls: dict[str, Callable[[], list[list[int]]]] = {
            OURS: lambda t=tokens, n=lengths: generate(decoder, t, n, new).token_ids,
            "transformers": lambda t=tokens, n=lengths: theirs(model, t, n, new),
        }
        answers = [np.array(call()) for call in calls.values()]
        facts = {"equal tokens": float((answers[0] == answers[1]).mean())}
        operations = 2.0 * sum(value.size for value in jax.tree.leaves(decoder)) * batch * new
        floor = limit({(batch, config.width, config.vocab_size): operations})
        found.append(Row(f"generate {new} tokens, {batch} rows", take_turns(calls), floor, facts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="a directory to measure too")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        found = {
            "embedded": compare(EMBEDDED_MODEL, args.new_tokens, args.rounds),
            "110M": compare(Path(directory), args.new_tokens, args.rounds),
        }
    if args.checkpoint:
        found["given"] = compare(args.checkpoint, args.new_tokens, args.rounds)
    print(f"new tokens per second, {args.new_tokens} per prompt (with compile: the first call, compiling included)")
    heads = {"model": -10, "batch": 6, "transformers": 14, "jaxcrit": 10, "ratio": 8, "CPU": 8, "with compile": 14}
    print("".join(f"{head:{'<' if width < 0 else '>'}{abs(width)}}" for head, width in heads.items()) + f"{'equal':>8}")
    for name, batches in found.items():
        for batch, one in zip(BATCHES, batches.values(), strict=True):
            rates = one["tokens_per_second"]
            print(
                f"{name:<10}{batch:>6}{rates['transformers']['warm']:>14.0f}{rates['jaxcrit']['warm']:>10.0f}"
                f"{one['ratio']:>7.2f}x{one['processor_ratio']:>7.2f}x{rates['jaxcrit']['with_compile']:>14.0f}{one['equal_tokens']:>8.3f}"
            )
    result = {"new_tokens": args.new_tokens, "prompt_lengths": LENGTHS, "models": found}
    print(f"wrote {write_result('generation_speed', result)}")


if __name__ == "__main__":
    main()
