"""Where an answer ends: named in several files, in the order of transformers, the same for every command."""

import json
from types import SimpleNamespace

import pytest
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.stops import known_stops, stop_tokens


@pytest.fixture
def model(tmp_path):
    """The tiny tokenizer: EOS is 1, its chat template ends turns with <|end|>, 5; config.json names 7."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir(tmp_path))
    config = SimpleNamespace(eos_token_ids=(7,), vocab_size=320)
    return SimpleNamespace(tokenizer=tokenizer, config=config, checkpoint=SimpleNamespace(path=tmp_path))


def generation_config(model, content):
    (model.checkpoint.path / "generation_config.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


@pytest.mark.parametrize("named", [None, {}, {"eos_token_id": None}])
def test_config_json_counts_where_generation_config_names_none(model, named):
    if named is not None:
        generation_config(model, named)
    assert known_stops(model) == {7: "config.json", 1: "tokenizer", 5: "chat template"}


@pytest.mark.parametrize(("named", "ids"), [(9, [9, 1, 5]), ([5, 2, 1], [5, 2, 1]), (0, [0, 1, 5])])
def test_generation_config_goes_first_and_config_json_is_left_out(model, named, ids):
    generation_config(model, {"eos_token_id": named})
    assert list(known_stops(model)) == ids
    assert stop_tokens("<|user|>,300,5", model) == [*ids, 3, 300]


def test_a_template_that_is_not_used_or_ends_no_turn_adds_none(model, tmp_path):
    assert list(known_stops(model, "none")) == [7, 1]
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    for template in (f"chat:{plain}", "chat:absent"):
        assert list(known_stops(model, template)) == [7, 1]
    model.tokenizer.chat_template = {"brief": "{{ messages[0]['content'] }}"}
    assert list(known_stops(model)) == [7, 1]


@pytest.mark.parametrize("content", ["{", "[]", {"eos_token_id": "</s>"}, {"eos_token_id": [1, True]}])
def test_a_damaged_file_is_one_line(model, content):
    generation_config(model, content)
    with pytest.raises(UserError, match=r"generation_config\.json: ") as caught:
        stop_tokens("", model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "part"), [("320", "'320' is no token id"), ("the cat", "is 2 tokens")])
def test_stops_that_are_no_token(model, text, part):
    with pytest.raises(UserError, match=f"--stop={text}: .*{part}"):
        stop_tokens(text, model)
