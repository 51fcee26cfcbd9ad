"""A language that the embedded model does not know: its own tasks with every token renamed, so that all else is known.

    python experiments/renamed_language.py --out=runs/language

Token t of the V that the model knows becomes token t + V, written as one character of Unicode's private use. The
new language has the word order and the meaning of the old; parallel rows are as many as one asks for. Rows have
``prompt`` and ``response`` in the new language, ``english_prompt`` and ``english_response`` in the old.

The rows of the embedding that the new tokens take are drawn at random. Their scale is a trap: as long as the old ones,
they win the softmax of a tied head and wreck the known language before a single step. The program prints the loss of
the known language by the scale of the new rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from entry import leave
from safetensors.numpy import save_file

from jaxcrit.core.files import json_lines, write_text
from jaxcrit.core.groups import RowOptions
from jaxcrit.data.demo import FAMILIES, generate
from jaxcrit.evidence.completions import completions
from jaxcrit.models.model import EMBEDDED_MODEL, Model, open_model
from jaxcrit.models.weights import to_hf
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.reporting.tables import aligned

FIRST = 0xE000  # of Unicode's private use, which has room for 6,400
SCALE = 0.1
EMBEDDING = "model.embed_tokens.weight"
Row = dict[str, str]


def extended(out: Path, scale: float = SCALE, seed: int = 0) -> str:
    """Writes the embedded model with twice the vocabulary; gives its directory.

    Args:
        out: directory; what is there already is kept.
        scale: standard deviation of the new rows' entries, in that of the old rows.
        seed: seed of the new rows.
    """
    if (out / "model.safetensors").exists():
        return str(out)
    out.mkdir(parents=True, exist_ok=True)
    known = open_model(mesh=make_mesh(None, jax.devices()[:1]), dtype="float32")
    tensors = {name: np.asarray(value) for name, value in to_hf(known.decoder())}
    old = tensors[EMBEDDING]
    new = scale * old.std() * np.random.default_rng(seed).standard_normal(old.shape)
    count, tensors[EMBEDDING] = len(old), np.concatenate([old, new.astype(np.float32)])
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    tokenizer = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text())
    like = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": count + t, "content": chr(FIRST + t), **like} for t in range(count)]
    write_text(out / "tokenizer.json", json.dumps(tokenizer))
    write_text(out / "config.json", json.dumps({**config, "vocab_size": 2 * count, "dtype": "float32"}))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        write_text(out / name, (EMBEDDED_MODEL / name).read_text())
    save_file(tensors, out / "model.safetensors")
    return str(out)


def renamed(text: str, tokenizer: Any) -> str:
    """A text in the new language; as it stands behind a space, where the chat template puts it."""
    return "".join(chr(FIRST + token) for token in tokenizer(f" {text}", add_special_tokens=False)["input_ids"])


def parallel(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Rows in the new language, each with itself in the old."""
    return [
        {
            "prompt": renamed(row["prompt"], tokenizer),
            "response": renamed(row["response"], tokenizer),
            "english_prompt": row["prompt"],
            "english_response": row["response"],
        }
        for row in rows
    ]


def english(rows: Sequence[Row]) -> list[Row]:
    """The same rows in the old language."""
    return [{"prompt": row["english_prompt"], "response": row["english_response"]} for row in rows]


def language(tokenizer: Any, count: int, seed: int, split: str) -> list[Row]:
    """So many rows of each family of tasks, in both languages, in an order of their own."""
    rows = [row for family in FAMILIES for row in generate(family, count, seed, split)]
    order = np.random.default_rng(seed).permutation(len(rows))
    return parallel([rows[place] for place in order], tokenizer)


def answered(model: Model, rows: Sequence[Row]) -> dict[str, float]:
    """Loss per token of the responses, and the share of rows that greedy decoding answers exactly."""
    (dataset,) = model.read(RowOptions(), [dict(row) for row in rows], responses=True)
    found = completions(model, model.decoder(), dataset.examples, 48)
    tokens = sum(len(one.token_ids) - one.prompt_length for one in dataset.examples)
    return {"loss": float(-found.log_p.sum() / tokens), "exact": float(found.right.mean()), "rows": len(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the known language's loss by the scale of the new rows, before any step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/language", help="directory for models and rows")
    parser.add_argument("--rows", type=int, default=8, help="rows of each family of tasks")
    parser.add_argument("--scales", default="1,0.3,0.1,0.03", help="scales of the new rows, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    out, body = Path(given.out), []
    for scale in map(float, given.scales.split(",")):
        for seed in range(given.seeds):
            model = open_model(extended(out / f"scale-{scale:g}-{seed}", scale, seed))
            rows = language(model.tokenizer, given.rows, 0, "test")
            write_text(out / "test.jsonl", json_lines(rows))
            known, new = answered(model, english(rows)), answered(model, rows)
            found = [f"{known['loss']:.3f}", f"{known['exact']:.2f}", f"{new['loss']:.2f}"]
            body.append([f"{scale:g}", str(seed), *found, ""])
    print("\n".join(aligned(["scale", "seed", "known: loss", "exact", "new: loss", ""], body)))
    return 0


if __name__ == "__main__":
    leave(main)
