"""Real trained checkpoints against transformers: logits, and 200 greedy tokens one for one."""

import numpy as np
import pytest
from conftest import SHARED
from support import reference
from support.family_models import BOUND, error, load_path, states

from jaxcrit.models.generation import generate

NAMES = ("stories260K-hf", "babyllama-tok105-hf")
pytestmark = pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason=f"no checkpoints in {SHARED / 'weights'}")


@pytest.mark.parametrize("name", NAMES)
def test_states_and_logits(name):
    path = SHARED / "weights" / name
    model, decoder = reference.read(path), load_path(path)
    tokens = np.random.RandomState(0).randint(3, model.config.vocab_size, (1, 100)).astype(np.int32)
    tokens[0, 0] = 1
    hidden, logits = states(decoder, tokens, np.array([100], np.int32))
    expected_hidden, expected_logits = reference.states(model, tokens[0])
    worst = max(error(ours, theirs) for ours, theirs in zip(hidden[:, 0], expected_hidden, strict=True))
    print(f"largest relative error {max(worst, error(logits[0], expected_logits)):.1e}")
    assert worst <= BOUND
    assert error(logits[0], expected_logits) <= BOUND


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name):
    path = SHARED / "weights" / name
    model = reference.read(path)
    with reference.torch.no_grad():
        expected = model.generate(
            reference.torch.tensor([[1]]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 1:].tolist()
    assert len(expected) == 200
    assert generate(load_path(path), np.array([[1]]), np.array([1]), 200).token_ids[0] == expected
