"""Which files and which tensors: the same directory, read by transformers and by jaxcrit, is the same model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import reference
from support.family_models import BOUND, error, load_path, raw_config, sequences, states

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


def write(path, tensors, name="model.safetensors"):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path / name, {"format": "pt"})


def another_head(path, held):
    write(path, {**held, HEAD: -held[EMBED]})


def the_head_alone(path, held):
    write(path, {HEAD if key == EMBED else key: value for key, value in held.items()})


def names_of_a_backbone(path, held):
    write(path, {key.removeprefix("model."): value for key, value in held.items()})


def names_of_a_model_in_a_model(path, held):
    write(path, {"model." + key: value for key, value in held.items()})


def shards(path, held):
    """Two shards; the final norm is in both, with other values."""
    (path / "model.safetensors").unlink()
    names = sorted(held)
    for number in (0, 1):
        part = {name: held[name] for name in names[number::2]}
        write(path, {**part, NORM: held[NORM] * (2 + number)}, f"{number}.safetensors")
    where = {name: f"{at % 2}.safetensors" for at, name in enumerate(names)}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**where, NORM: "1.safetensors"}}))


def an_index_beside_a_single_file(path, held):
    shards(path, held)
    write(path, held)


def an_index_left_behind(path, held):
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(held, "gone.safetensors")}))
    write(path, held, "consolidated.safetensors")


KINDS = (
    another_head,
    the_head_alone,
    names_of_a_backbone,
    names_of_a_model_in_a_model,
    shards,
    an_index_beside_a_single_file,
    an_index_left_behind,
)


@pytest.mark.parametrize("arrange", KINDS)
def test_both_read_the_same_of_a_directory(arrange, tmp_path):
    model = reference.make(raw_config("llama-tied"), tmp_path)
    tokens, lengths = sequences(model.config.vocab_size, lengths=(16,))
    arrange(tmp_path, load_file(tmp_path / "model.safetensors"))
    theirs = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=reference.torch.float32)
    _, expected = reference.states(theirs.eval(), tokens[0, :16])
    _, ours = states(load_path(tmp_path), tokens, lengths)
    assert error(ours[0, :16], expected) <= BOUND
    if arrange in (another_head, shards):
        _, before = reference.states(model, tokens[0, :16])
        assert error(ours[0, :16], before) > 100 * BOUND
