"""Greedy generation through the cache against running the whole sequence again for every token."""

import numpy as np
import pytest
from conftest import SHARED
from family_models import LENGTH, load_path, raw_config, sequences, states, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models.generation import greedy

NEW = 6


def recomputed(decoder, prompt):
    """The slow reference: one forward pass over everything for every token."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + NEW):
        _, logits = states(decoder, tokens, np.array([length], np.int32))
        tokens[0, length] = int(np.argmax(logits[0, length - 1]))
    return tokens[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-sliding", "qwen2-mixed-sliding", "qwen3-tied", "phi4-mini"])
def test_cache_equals_recomputing(case, tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config(case)))
    lengths = (9, 3, 1)
    tokens, _ = sequences(96, lengths=lengths)
    together = greedy(decoder, tokens[:, :9], np.array(lengths), NEW)
    assert together == [recomputed(decoder, row[:length]) for row, length in zip(tokens, lengths, strict=True)]


def test_long_side_of_the_boundary(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    tokens, _ = sequences(96, lengths=(17,))
    assert greedy(decoder, tokens[:, :17], np.array([17]), NEW) == [recomputed(decoder, tokens[0, :17])]


def test_crossing_the_boundary_is_refused(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    with pytest.raises(UserError, match="boundary at 16 tokens"):
        greedy(decoder, np.ones((1, 12), np.int32), np.array([12]), 5)


def test_context_is_not_exceeded(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    with pytest.raises(UserError, match="need 65 positions, the model has 64"):
        greedy(decoder, np.ones((1, 5), np.int32), np.array([5]), 60)


def test_stop_ends_each_row_by_itself(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    tokens, _ = sequences(96, lengths=(9, 5))
    prompts, lengths = tokens[:, :9], np.array([9, 5])
    free = greedy(decoder, prompts, lengths, NEW)
    stop = free[0][2]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert greedy(decoder, prompts, lengths, NEW, stop=(stop,)) == expected
    assert expected[0] != free[0]


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason=f"no checkpoints in {SHARED / 'weights'}")
def test_prompts_of_mixed_length_continue_as_alone():
    decoder = load_path(SHARED / "weights" / "stories260K-hf")
    prompts = [[1], [1, 410, 469, 347, 301, 262, 286], [1, 417]]
    tokens = np.zeros((3, 7), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    together = greedy(decoder, tokens, np.array([len(prompt) for prompt in prompts]), 60)
    for row, prompt in enumerate(prompts):
        assert greedy(decoder, np.array([prompt]), np.array([len(prompt)]), 60)[0] == together[row]
