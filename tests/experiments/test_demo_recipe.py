"""The batches the demo model learns from, and the two operations on its weights that no library has."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcrit.data import demo
from jaxcrit.models.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import demo_recipe as recipe
import demo_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer.build(rows_per_family=300)


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    first, again, other = (recipe.batch_at(tokenizer, seed, 7, 100)["tokens"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_packed_rows_are_whole_training_rows_weighted_on_their_responses(tokenizer):
    batch = recipe.batch_at(tokenizer, 0, 99, 100)
    for line in range(recipe.ROWS):
        assert batch["segments"][line].max() >= 2
        for segment in range(1, batch["segments"][line].max() + 1):
            here = batch["segments"][line] == segment
            ids, weights = batch["tokens"][line][here], batch["weights"][line][here]
            assert batch["positions"][line][here].tolist() == list(range(len(ids)))
            assert batch["targets"][line][here][:-1].tolist() == ids[1:].tolist()
            end = ids.tolist().index(tokenizer.token_to_id("[/INST]"))
            assert (weights[end:-1] == 1).all() and weights[-1] == 0
            assert np.allclose(weights[:end], recipe.PROMPT_WEIGHT)
            prompt = tokenizer.decode(ids[:end].tolist()).removeprefix(" ")
            assert demo.split_of(prompt) == "train"


def test_steps_of_muon_are_near_orthogonal():
    update = jax.random.normal(jax.random.key(0), (3, 24, 40))
    found = np.linalg.svd(np.asarray(recipe.orthogonalized(update)), compute_uv=False)
    assert found.min() > 0.5 and found.max() < 1.3


def test_soften_touches_the_first_blocks_queries_alone():
    config = ModelConfig.from_hf(recipe.hf_config(40, layers=2, width=32), "test")
    before = recipe.initial_weights(config, 0)
    after = recipe.soften(before)
    assert np.array_equal(after["blocks.q"][0], before["blocks.q"][0] * recipe.SOFTNESS)
    assert np.array_equal(after["blocks.q"][1], before["blocks.q"][1])
    assert all(after[path] is before[path] for path in before if path != "blocks.q")
