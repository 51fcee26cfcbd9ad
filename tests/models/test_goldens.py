"""The decoder against what transformers computed once (tests/goldens/make_goldens.py), without torch."""

from pathlib import Path

import pytest
from support.family_models import BOUND, GOLDEN_CASES, error, load_path, states, write_model

from jaxcrit.core.files import read_npz
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder

GOLDENS, META = read_npz(Path(__file__).parents[1] / "goldens" / "decoders.npz")


def worst(case, decoder):
    """Largest relative error of any layer or logit."""
    tokens, lengths = GOLDENS[f"{case}/tokens"], GOLDENS[f"{case}/lengths"]
    hidden, logits = states(decoder, tokens, lengths)
    errors = []
    for row, length in enumerate(lengths):
        golden = GOLDENS[f"{case}/hidden{row}"]
        errors += [error(ours, theirs) for ours, theirs in zip(hidden[:, row, :length], golden, strict=True)]
        errors.append(error(logits[row, :length], GOLDENS[f"{case}/logits{row}"]))
    return max(errors)


def decoder_of(case, path):
    return load_path(write_model(path, META["configs"][case]))


def test_goldens_are_of_every_case():
    assert set(META["configs"]) == set(GOLDEN_CASES)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_states_and_logits(case, tmp_path):
    assert worst(case, decoder_of(case, tmp_path)) <= BOUND


MISTAKES = {
    "rope theta": ("llama-gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    "no rope scaling": ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "window off by one": ("mistral-sliding", {"sliding_window": 6}),
    "window in one layer more": ("qwen2-mixed-sliding", {"layer_types": ["sliding_attention"] * 3}),
    "norm epsilon": ("llama-gqa", {"rms_norm_eps": 1e-3}),
    "longrope boundary": ("phi3-longrope", {"original_max_position_embeddings": 20}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, tmp_path):
    """The bound is tight enough to see what is most easily got wrong."""
    case, changes = MISTAKES[mistake]
    right = decoder_of(case, tmp_path)
    wrong = ModelConfig.from_hf({**META["configs"][case], **changes})
    assert worst(case, Decoder(wrong, right.weights())) > 20 * BOUND
