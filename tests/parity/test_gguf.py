"""GGUF files as transformers reads them: every weight, states, logits, greedy tokens, tokenizer."""

import os
from pathlib import Path

import numpy as np
import pytest
import transformers
from support import reference
from support.family_models import BOUND, error, load_path, states
from support.gguf_files import ARCHITECTURES, write_gguf

import jaxcrit as jc
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.generation import generate
from jaxcrit.models.weights import to_hf

REAL = os.environ.get("JAXCRIT_REAL_MODEL", "")
TEXTS = ("hello the  teller", " hello\n\n12345 don't", "é ü 中 </s><s>the", "")
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " the"}]


def theirs(path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=reference.torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def same_tokens(path, texts):
    """Our tokenizer splits, joins and renders as transformers' own does."""
    ours, other = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.get_vocab() == other.get_vocab()
    assert (
        ours.special_tokens_map.items() <= other.special_tokens_map.items()
    )  # of which only Gemma's class has another
    for text in texts:
        assert ours(text).input_ids == other(text).input_ids
        assert ours.decode(ours(text).input_ids) == other.decode(other(text).input_ids)
    assert ours.apply_chat_template(TALK, tokenize=True) == other.apply_chat_template(TALK, tokenize=True)
    return ours


def greedy(model, prompt, count):
    with reference.torch.no_grad():
        found = model.generate(
            reference.torch.from_numpy(prompt.astype(np.int64))[None],
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_is_read_as_transformers_reads_it(architecture, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture)
    model, decoder = theirs(path), load_path(path)
    state = model.state_dict()
    for name, value in to_hf(decoder):
        np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)
    tokens = np.random.RandomState(0).randint(3, 300, (1, 24)).astype(np.int32)
    hidden, logits = states(decoder, tokens, np.array([24], np.int32))
    expected, scores = reference.states(model, tokens[0])
    worst = max(error(ours, other) for ours, other in zip(hidden[:, 0], expected, strict=True))
    assert max(worst, error(logits[0], scores)) <= BOUND
    assert generate(decoder, tokens[:, :9], np.array([9]), 64).token_ids[0] == greedy(model, tokens[0, :9], 64)
    same_tokens(path, TEXTS)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "llama"), ("phi3", "gpt2")])
def test_other_tokenizers_too(architecture, kind, tmp_path):
    same_tokens(write_gguf(tmp_path / "tiny.gguf", architecture, kind=kind), TEXTS)


@pytest.mark.skipif(not REAL, reason="JAXCRIT_REAL_MODEL names no file of a real model")
def test_a_real_model():
    path = Path(REAL)
    model, decoder = theirs(path), load_path(path)
    tokenizer = same_tokens(path, (*TEXTS, "The capital of France is"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    tokens = np.array([prompt["input_ids"]], np.int32)
    _, logits = states(decoder, tokens, np.array(tokens.shape[1:], np.int32))
    _, scores = reference.states(model, tokens[0])
    assert error(logits[0], scores) <= BOUND
    answer = generate(decoder, tokens, np.array(tokens.shape[1:]), 64).token_ids[0]
    assert answer == greedy(model, tokens[0], 64)
    print(error(logits[0], scores), tokenizer.decode(answer))


ASKED = (
    "What is the capital of France?",
    "Name a color.",
    "What is 2 + 2? Answer with a number.",
    "Write a haiku about rain.",
    "Say hello in Spanish.",
    "Is water wet? Yes or no.",
)


@pytest.mark.skipif(not REAL, reason="JAXCRIT_REAL_MODEL names no file of a real model")
def test_answers_of_a_real_model_end_where_they_end_in_transformers():
    path, torch = Path(REAL), reference.torch
    model, opened = theirs(path), jc.load(path)
    found = jc.generate(opened, list(ASKED), max_new_tokens=64)
    ended = 0
    for asked, row in zip(ASKED, *found.rows.values(), strict=True):
        talk = [{"role": "user", "content": asked}]
        ids = opened.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            given = {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64), "do_sample": False}
            answer = model.generate(torch.tensor([ids]), max_new_tokens=64, **given)[0, len(ids) :].tolist()
        stopped = answer[-1] == opened.tokenizer.eos_token_id
        assert (row["token_ids"], row["stopped"]) == (answer[:-1] if stopped else answer, stopped), asked
        ended += stopped
    print(f"{ended} of {len(ASKED)} answers end within 64 tokens")
    assert 0 < ended < len(ASKED)
