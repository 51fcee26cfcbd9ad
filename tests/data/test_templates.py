"""RowOptions: what the model is given, where the prompt ends, and that the response never changes the prompt."""

import json

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_tokenizers import family_tokenizer
from support.tiny import CHAT_TEMPLATE, tiny_tokenizer_dir
from tokenizers import normalizers

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import RowOptions
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.inspection import texts
from jaxcrit.data.templates import check_same_rendering, render, template_hash
from jaxcrit.data.tokenizer import load_tokenizer

BOS = 0


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return lambda **options: load_tokenizer(tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"), **options))


@pytest.fixture(scope="module")
def chat(make):
    return make()


@pytest.fixture(scope="module")
def base(make):
    return make(chat_template=None)


def prompt_text(example, tokenizer):
    return tokenizer.decode(example.token_ids[: example.prompt_length])


def response_text(example, tokenizer):
    return tokenizer.decode(example.token_ids[example.prompt_length :])


class TestChat:
    def test_prompt_row(self, chat):
        row = {"prompt": "the cat", "response": "sat"}
        (example,) = render([row], chat)
        assert prompt_text(example, chat) == "<s><|user|>\nthe cat<|end|>\n<|assistant|>\n" == example.prompt
        assert response_text(example, chat) == "sat<|end|>"
        assert example.response == "sat" and example.sample_id == sample_id(row)
        assert example.token_ids.dtype == np.int32

    def test_bos_once_though_template_and_tokenizer_both_add_it(self, chat):
        assert chat("a")["input_ids"][0] == BOS and chat.chat_template.startswith("{{ bos_token }}")
        (example,) = render([{"prompt": "the cat"}], chat, "chat")
        assert list(example.token_ids).count(BOS) == 1 and example.token_ids[0] == BOS

    def test_messages(self, chat):
        messages = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ]
        answered = [*messages, {"role": "assistant", "content": "four"}]
        open_row, closed_row = render([{"messages": messages}, {"messages": answered}], chat)
        assert open_row.response is None and len(open_row.token_ids) == open_row.prompt_length
        assert closed_row.response == "four" and response_text(closed_row, chat) == "four<|end|>"
        assert closed_row.prompt == open_row.prompt and closed_row.prompt_length == open_row.prompt_length
        assert open_row.prompt.startswith("<s><|system|>\nbe kind<|end|>\n<|user|>\none<|end|>\n<|assistant|>\ntwo")

    def test_template_that_leaves_answers_out(self, make):
        odd = make(chat_template="{{ messages | length }}:{{ messages[0]['content'] }}>")
        row = {"prompt": "q", "response": "a"}
        (example,) = render([row], odd, responses=False)
        assert prompt_text(example, odd) == "1:q>" and len(example.token_ids) == example.prompt_length
        with pytest.raises(UserError, match=r"where an answer begins or ends cannot be told .* renders '3:Qvxq>'"):
            render([row], odd)

    def test_template_that_refuses(self, make):
        strict = make(chat_template="{{ raise_exception('no system here') }}")
        with pytest.raises(UserError, match=r"row 1: the model's chat template refuses .* no system here"):
            render([{"prompt": "q"}], strict)

    @pytest.mark.parametrize(
        ("template", "text"),
        [
            ('{% if strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% endif %}', "26 Jul 2024"),
            ("{{ strftime_now( '%Y-%m-%d' ) }}, {{ strftime_now('%B') }}", "2024-07-26, July"),
        ],
    )
    def test_date_stands_still(self, make, template, text):
        (example,) = render([{"prompt": "q"}], make(chat_template=template))
        assert example.prompt == text


class TestNone:
    def test_bos_as_the_tokenizer_adds_it(self, make, base):
        (with_bos,) = render([{"prompt": "the cat", "response": " sat"}], base)
        (without,) = render([{"prompt": "the cat"}], make(chat_template=None, bos=False))
        assert prompt_text(with_bos, base) == "<s>the cat" and response_text(with_bos, base) == " sat"
        assert list(without.token_ids) == list(with_bos.token_ids[1 : with_bos.prompt_length])

    def test_bos_in_the_text_is_not_doubled(self, base):
        (example,) = render([{"text": "<s>the cat"}], base)
        assert prompt_text(example, base) == "<s>the cat" and example.prompt_length == len(example.token_ids)

    def test_text_is_never_templated(self, chat):
        for template in ("auto", "chat", "none"):
            (example,) = render([{"text": "the cat"}], chat, template)
            assert prompt_text(example, chat) == "<s>the cat" and example.response is None

    def test_none_leaves_a_chat_model_untemplated(self, chat):
        (example,) = render([{"prompt": "the cat"}], chat, "none")
        assert prompt_text(example, chat) == "<s>the cat"

    def test_token_across_the_boundary(self, base):
        """`the` is one token, `t` + `he` two: the response must not change what the model is asked."""
        assert len(base("the", add_special_tokens=False)["input_ids"]) == 1
        merged, alone = render([{"prompt": "t", "response": "he"}, {"prompt": "t"}], base)
        assert list(merged.token_ids[: merged.prompt_length]) == list(alone.token_ids)
        assert response_text(merged, base) == "he"

    def test_eos_that_a_tokenizer_appends_does_not_end_the_prompt(self, tmp_path):
        path = tiny_tokenizer_dir(tmp_path, chat_template=None)
        file = path / "tokenizer.json"
        content = json.loads(file.read_text())
        processor = content["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
        file.write_text(json.dumps(content))
        tokenizer = load_tokenizer(path)
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        (example,) = render([{"prompt": "the cat", "response": " sat"}], tokenizer)
        assert tokenizer.decode(example.token_ids) == "<s>the cat sat"


class TestRefusals:
    def test_unknown_template(self, chat):
        for function in (lambda: render([{"prompt": "a"}], chat, "chatt"), lambda: template_hash(chat, "chatt")):
            with pytest.raises(UserError, match=r"--template=chatt: .*did you mean 'chat'\?"):
                function()

    def test_a_template_without_a_name(self, chat):
        for function in (lambda: render([{"prompt": "a"}], chat, "chat:"), lambda: RowOptions(template="chat:")):
            with pytest.raises(UserError, match=r"--template=chat:: expected .*chat:NAME or chat:FILE"):
                function()

    def test_chat_without_chat_template(self, base):
        with pytest.raises(UserError, match="use --template=none"):
            render([{"prompt": "a"}], base, "chat")

    def test_messages_without_chat_template(self, base, chat):
        row = {"messages": [{"role": "user", "content": "q"}]}
        with pytest.raises(UserError, match="row 2: messages need a chat template, and this tokenizer has none"):
            render([{"prompt": "a"}, row], base)
        with pytest.raises(UserError, match="turns it off"):
            render([row], chat, "none")

    def test_prompt_without_tokens(self, base):
        base = load_tokenizer(base.name_or_path)
        base.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        with pytest.raises(UserError, match=r"^a\.jsonl: row 2: the prompt .* has no tokens"):
            render([{"prompt": "a"}, {"prompt": "\u200b"}], base, where="a.jsonl")

    def test_no_rows(self, base):
        assert render([], base) == []


def test_template_hash(chat, base, make):
    other = make(chat_template=CHAT_TEMPLATE + " ")
    hashes = [template_hash(chat), template_hash(chat, "none"), template_hash(other)]
    hashes.append(template_hash(make(chat_template=None, bos=False)))
    assert len(set(hashes)) == len(hashes)
    assert template_hash(chat) == template_hash(chat, "chat")
    assert template_hash(base) == template_hash(base, "none") == template_hash(chat, "none")


_ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=80)
@given(prompt=_ANY, response=_ANY, mode=st.sampled_from(["none", "chat"]))
def test_response_never_changes_the_prompt(chat, prompt, response, mode):
    with_response, alone = render([{"prompt": prompt, "response": response}, {"prompt": prompt}], chat, mode)
    assert list(with_response.token_ids[: with_response.prompt_length]) == list(alone.token_ids)
    end = "<|end|>" if mode == "chat" else ""
    assert chat.decode(with_response.token_ids[with_response.prompt_length :]) == response + end


def test_two_renderings_are_compared_only_when_allowed(chat):
    first, second = template_hash(chat), template_hash(chat, "none")
    check_same_rendering(first, first)
    check_same_rendering(first, second, allow_template_mismatch=True)
    with pytest.raises(UserError) as caught:
        check_same_rendering(first, second)
    message = str(caught.value)
    assert first in message and second in message and "--allow_template_mismatch" in message and "\n" not in message


_LETTERS = "".join(map(chr, range(32, 127))) + "\n"
_RESPONSES = st.text(_LETTERS, min_size=1, max_size=20).map(str.strip).filter(bool)  # Llama-3's template strips


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    return {name: family_tokenizer(path / name, name, strip=False) for name in ("llama2", "llama3", "phi3")}


@settings(deadline=None, max_examples=150)
@given(
    family=st.sampled_from(["llama2", "llama3", "phi3"]),
    prompt=st.text(_LETTERS, min_size=1, max_size=20).filter(str.strip),
    response=_RESPONSES,
    mode=st.sampled_from(["none", "chat", "named"]),
)
def test_unmasked_text_is_the_response(stand_ins, family, prompt, response, mode):
    """With tokenizers that put a space in front of a text, that merge letters, that have bytes for tokens."""
    tokenizer = stand_ins[family]
    if mode == "named":
        row, options = {"question": prompt, "answer": response}, {"dataset": "gsm8k", "template": "none"}
    else:
        row, options = {"prompt": prompt, "response": response}, {"template": mode}
    (example,) = render([row], tokenizer, **options)
    around = {"llama2": (" ", " </s>"), "llama3": ("", "<|eot_id|>"), "phi3": ("", "<|end|>")}[family]
    before, after = around if mode == "chat" else ("", "")
    shown, unmasked = texts(example, tokenizer)
    assert unmasked == before + response + after
    if mode == "named":
        assert shown.endswith(prompt + "\n"), "a line break, so that question and answer do not run together"


@settings(deadline=None, max_examples=80)
@given(family=st.sampled_from(["llama2", "llama3"]), prompt=_RESPONSES, response=_RESPONSES)
def test_unmasked_text_of_the_paper_is_the_response_and_its_slips(stand_ins, family, prompt, response):
    row = {"question": prompt, "answer": response}
    (example,) = render([row], stand_ins[family], dataset="gsm8k", edition="paper")
    _, unmasked = texts(example, stand_ins[family])
    end = {"llama2": f" {response} </s>", "llama3": f"<|begin_of_text|>{response}<|eot_id|>"}[family]
    assert unmasked == end


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_real_rows_with_a_real_tokenizer():
    tokenizer = load_tokenizer(SHARED / "weights" / "stories260K-hf")
    lines = (SHARED / "data" / "dolly_test.jsonl").read_text().splitlines()
    rows = [{"prompt": row["instruction"], "response": row["response"]} for row in map(json.loads, lines)]
    examples = render(rows, tokenizer)
    assert len(examples) == len(rows) > 200
    for row, example in zip(rows, examples, strict=True):
        # The whole is one tokenisation wherever no token spans the boundary, and begins with BOS once.
        assert list(example.token_ids[:2]).count(1) == 1 == example.token_ids[0]
        assert list(example.token_ids[: example.prompt_length]) == tokenizer(row["prompt"])["input_ids"]
