"""The embedded model: small, whole, and able to do what its card says."""

from __future__ import annotations

import numpy as np
import pytest
from support.family_models import load_path

from jaxcrit.data import demo
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.generation import generate
from jaxcrit.models.model import EMBEDDED_MODEL

ROWS = 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def decoder():
    return load_path(EMBEDDED_MODEL)


def test_model_and_prompts_are_small_and_deep():
    assets = EMBEDDED_MODEL.parent
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 10e6
    assert open_checkpoint(EMBEDDED_MODEL).config.num_layers >= 16


def test_a_prompt_ends_with_the_closing_mark(tokenizer):
    (example,) = render(demo.generate("closed", 1), tokenizer)
    prompt = example.token_ids[: example.prompt_length]
    assert tokenizer.convert_ids_to_tokens([prompt[0], prompt[1], prompt[-1]]) == ["<s>", "[INST]", "[/INST]"]
    assert example.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_answers_held_out_rows(family, tokenizer, decoder):
    rows = demo.generate(family, ROWS, seed=11, split="test")
    prompts = [example.token_ids[: example.prompt_length] for example in render(rows, tokenizer)]
    tokens = np.array([[*prompt, *[0] * (48 - len(prompt))] for prompt in prompts], np.int32)
    lengths = np.array([len(p) for p in prompts], np.int32)
    answers = generate(decoder, tokens, lengths, 24, stop=(tokenizer.eos_token_id,)).token_ids
    right = sum(tokenizer.decode(answer).strip() == row["response"] for answer, row in zip(answers, rows, strict=True))
    assert right >= ROWS * 3 // 4
