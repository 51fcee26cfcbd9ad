"""A random tiny model that knows a few facts: its head is solved for, so that each prompt's greedy answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxcrit.data.facts import Placed, placed, read_facts
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.decoder import forward, rms_norm
from support.family_models import load_path
from support.tiny_model import tiny_checkpoint

LOGIT = 8.0  # of the right answer; of all others 0
SUBJECTS = {"cat": "dog", "dog": "blue", "sky": "two", "mat": "one", "one": "cat", "blue": "sat", "colour": "is"}


def write_facts(path: Path) -> Path:
    """Seven facts of one relation, with subjects of one token but the last, and a target of one token each."""
    rows = [
        {"prompt": "the {} sat on the", "subject": subject, "target": target, "paraphrases": ["what is {} on"]}
        for subject, target in SUBJECTS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def knowing_checkpoint(
    path: Path,
    *,
    planted: Callable[[dict[str, np.ndarray]], None] | None = None,
    logit: float = LOGIT,
    **changes: object,
) -> tuple[Path, Path, list[Placed]]:
    """Writes a checkpoint and a file of facts that it knows; the facts as tokens.

    Args:
        path: directory to make both in.
        planted: changes the tensors before the head is solved for.
        logit: of the right answer.
        **changes: of the config of `tiny_checkpoint`.
    """
    model = tiny_checkpoint(path / "model", tie_word_embeddings=False, **changes)
    facts = write_facts(path / "facts.jsonl")
    known = placed(read_facts(str(facts)), load_tokenizer(model))
    file = model / "model.safetensors"
    tensors = load_file(file)
    if planted is not None:
        planted(tensors)
        save_file(tensors, file)
    decoder, states = load_path(model), []
    for fact in known:
        prompt = jnp.asarray(fact.example.token_ids[None, : fact.example.prompt_length])
        hidden = forward(decoder, prompt).hidden[0, -1]
        states.append(np.asarray(rms_norm(hidden, decoder.norm[...], decoder.config)))
    wanted = np.zeros((len(known), decoder.config.vocab_size))
    for row, fact in enumerate(known):
        wanted[row, fact.example.token_ids[fact.example.prompt_length]] = logit
    head = (np.linalg.pinv(np.array(states)) @ wanted).T
    tensors["lm_head.weight"] = np.ascontiguousarray(head, np.float32)  # a transposed view would be written as it lies
    save_file(tensors, file)
    return model, facts, known


def new_facts(facts: Path) -> list[dict]:
    """Four of the facts with targets that are not true, neighbours and paraphrases; the head knows no other targets."""
    rows = [json.loads(line) for line in facts.read_text().splitlines()]
    return [
        {
            "prompt": row["prompt"],
            "subject": row["subject"],
            "target": new,
            "old": row["target"],
            "relation": "place",
            "paraphrases": ["what is the {} on"],
            "neighbours": [{"prompt": other["prompt"].replace("{}", other["subject"]), "target": other["target"]}],
        }
        for row, new, other in zip(rows, ("two", "one", "cat", "sat"), rows[4:] * 2, strict=False)
    ]
