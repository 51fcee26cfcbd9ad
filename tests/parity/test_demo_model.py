"""The embedded model in transformers: same states, same logits, same chat template."""

import numpy as np
from support import reference
from support.family_models import BOUND, error, load_path, states

from jaxcrit.data import demo
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.model import EMBEDDED_MODEL


def test_states_and_logits_of_a_row():
    tokenizer, model = load_tokenizer(EMBEDDED_MODEL), reference.read(EMBEDDED_MODEL)
    (example,) = render(demo.generate("arithmetic", 1), tokenizer)
    tokens = np.asarray(example.token_ids, np.int32)
    hidden, logits = states(load_path(EMBEDDED_MODEL, dtype="float32"), tokens[None], np.array([len(tokens)], np.int32))
    expected_hidden, expected_logits = reference.states(model, tokens)
    assert error(hidden[:, 0], expected_hidden) <= BOUND
    assert error(logits[0], expected_logits) <= BOUND
