"""Greedy tokens of every family and variation against transformers: a batch of mixed lengths against one at a time."""

import numpy as np
import pytest
from support import reference
from support.family_models import CASES, load_path, raw_config

from jaxcrit.models.generation import generate
from jaxcrit.models.sampling import Sampling

NEW = 64
LENGTHS = (14, 3)  # with longrope's boundary at 16, both pass it


def theirs(model, prompt, **options):
    """New tokens of one prompt."""
    with reference.torch.no_grad():
        found = model.generate(
            reference.torch.from_numpy(prompt.astype(np.int64))[None],
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            **{"do_sample": False, **options},
        )
    return found[0, len(prompt) :].tolist()


def prompts():
    tokens = np.random.RandomState(5).randint(3, 96, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    return tokens, [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case, tmp_path):
    model = reference.make({**raw_config(case), "max_position_embeddings": 128}, tmp_path)
    tokens, alone = prompts()
    # transformers computes the cache anew at longrope's boundary for Phi-3 alone; for LLaMA it mixes both sides'
    # keys, unless told to keep none.
    uncached = {"use_cache": False} if case == "llama-longrope" else {}
    expected = [theirs(model, prompt, **uncached) for prompt in alone]
    assert generate(load_path(tmp_path), tokens, np.array(LENGTHS), NEW).token_ids == expected


def test_repetition_penalty(tmp_path):
    model = reference.make({**raw_config("llama-gqa"), "max_position_embeddings": 128}, tmp_path)
    tokens, alone = prompts()
    expected = [theirs(model, prompt, repetition_penalty=1.7) for prompt in alone]
    found = generate(load_path(tmp_path), tokens, np.array(LENGTHS), NEW, sampling=Sampling(repetition_penalty=1.7))
    assert found.token_ids == expected
    assert expected != [theirs(model, prompt) for prompt in alone]


def test_what_top_k_and_top_p_leave(tmp_path):
    """Our scores after temperature, top-k and top-p against transformers' processors in their order."""
    from transformers import GenerationConfig

    from jaxcrit.models.sampling import restrict

    model = reference.make(raw_config("llama-gqa"), tmp_path)
    scores = np.random.default_rng(0).normal(0, 2, (50, 96)).astype(np.float32)
    ids = reference.torch.zeros((50, 1), dtype=reference.torch.long)
    for k, p, heat in ((0, 0.6, 1.0), (7, 1.0, 0.7), (9, 0.8, 1.9), (200, 0.05, 1.0)):
        options = GenerationConfig(do_sample=True, top_k=k, top_p=p, temperature=heat)
        processors = model._get_logits_processor(options)
        expected = processors(ids, reference.torch.from_numpy(scores.copy())).numpy()
        found = np.asarray(restrict(scores / heat, Sampling(temperature=heat, top_k=k, top_p=p)))
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        kept = np.isfinite(expected)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-6)
