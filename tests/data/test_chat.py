"""Chat templates: which one is used, and that what is trained on is the answer and the token that ends its turn."""

import json
import time
import types

import pytest
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.data import chat
from jaxcrit.data.chat import chat_of
from jaxcrit.data.templates import render, template_hash
from jaxcrit.data.tokenizer import load_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "[Q]", "[A]", "<|think|>"]
ROW = {"prompt": "3 + 4 =", "response": "It is 7."}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"), chat_template=None)


@pytest.fixture
def make(directory):
    def make(template=None):
        tokenizer = load_tokenizer(directory)
        tokenizer.add_tokens(SPECIAL, special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


def trained(tokenizer, row=ROW, template="auto"):
    """Text of the prompt and of what is trained on; the prompt is the one without the answer."""
    (example,) = render([row], tokenizer, template)
    (asked,) = render([row], tokenizer, template, responses=False)
    ids = example.token_ids.tolist()
    assert ids[: example.prompt_length] == asked.token_ids.tolist()
    return tuple(tokenizer.decode(part) for part in (ids[: example.prompt_length], ids[example.prompt_length :]))


def turns(user, assistant, *, after="", generation=""):
    """A template of two kinds of turn, what follows all of them, and what opens an answer."""
    body = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    opened = f"{{% if add_generation_prompt %}}{generation}{{% endif %}}" if generation else ""
    return f"{{% for m in messages %}}{body}{{% endfor %}}{after}{opened}"


C = "{{ m['content'] }}"
ML_USER = f"<|im_start|>user\n{C}<|im_end|>\n"
ML = "<|im_start|>user\n3 + 4 =<|im_end|>\n<|im_start|>assistant\n"
LAST = "{% if not loop.last %}"
TEMPLATES = {
    "usual": (
        turns(ML_USER, f"<|im_start|>assistant\n{C}<|im_end|>\n", generation="<|im_start|>assistant\n"),
        (ML, "It is 7.<|im_end|>"),
    ),
    "space around the answer": (turns(f"[Q] {C} [A]", f" {C} </s>"), ("[Q] 3 + 4 = [A]", " It is 7. </s>")),
    "always opens the next turn": (
        turns(f"[Q]user: {C}</s>", f"[A]bot: {C}</s>", after="[A]bot: "),
        ("[Q]user: 3 + 4 =</s>[A]bot: ", "It is 7.</s>"),
    ),
    "leaves the last turn open": (
        turns(
            ML_USER,
            f"<|im_start|>assistant\n{C}{LAST}<|im_end|>\n{{% endif %}}",
            generation="<|im_start|>assistant\n",
        ),
        (ML, "It is 7.<|im_end|>"),
    ),
    "one ending for turns, one for the whole": (
        turns(
            f"<|user|>\n{C}<|end|>\n",
            f"<|assistant|>\n{C}<|end|>\n",
            after="{% if not add_generation_prompt %}</s>{% endif %}",
            generation="<|assistant|>\n",
        ),
        ("<|user|>\n3 + 4 =<|end|>\n<|assistant|>\n", "It is 7.<|end|>"),
    ),
    "ends the last turn alone": (
        turns(f"User: {C}\n", f"Bot: {C}{{% if loop.last %}}</s>{{% endif %}}\n", generation="Bot: "),
        ("User: 3 + 4 =\nBot: ", "It is 7.</s>"),
    ),
    "opens thoughts in the prompt": (
        turns(ML_USER, f"<|im_start|>assistant\n{C}<|im_end|>\n", generation="<|im_start|>assistant\n<think>\n"),
        (ML + "<think>\n", "It is 7.<|im_end|>"),
    ),
    "empty thoughts before the last answer": (
        turns(
            ML_USER,
            "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}" + C + "<|im_end|>\n",
            generation="<|im_start|>assistant\n",
        ),
        (ML, "It is 7.<|im_end|>"),
    ),
    "opens no answer": (turns(ML_USER, f"<|im_start|>assistant\n{C}<|im_end|>\n"), (ML, "It is 7.<|im_end|>")),
    "a token for each turn and none for its end": (
        turns(f"<|user|>\n{C}\n", f"<|assistant|>\n{C}\n", generation="<|assistant|>\n"),
        "ends",
    ),
    "the same, always open": (turns(f"<|user|>\n{C}\n", f"<|assistant|>\n{C}\n", after="<|assistant|>\n"), "ends"),
    "one opening for all turns": (
        turns(f"<|im_start|>user\n{C}\n", f"<|im_start|>bot\n{C}\n", after="<|im_start|>bot\n"),
        "ends",
    ),
    "a system turn, then no ends": (
        "<|system|>\nBe kind.\n" + turns(f"<|user|>\n{C}\n", f"<|assistant|>\n{C}\n", generation="<|assistant|>\n"),
        "ends",
    ),
    "BOS before each question": (turns(f"<s>[Q]{C}[A]", C), "ends"),
    "no special token": (turns(f"Human: {C}\n", f"Bot: {C}\n", generation="Bot: "), "ends"),
    "other words before an answer than asked for": (
        turns(ML_USER, f"bot said {C}<|im_end|>\n", generation="<|im_start|>assistant\n"),
        "begins",
    ),
    "refuses answers": (
        turns(ML_USER, "{{ raise_exception('questions only') }}"),
        "ends cannot be told: the model's chat template refuses the conversation: questions only",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_the_token_that_ends_its_turn(make, name):
    template, expected = TEMPLATES[name]
    tokenizer = make(template)
    if isinstance(expected, tuple):
        assert trained(tokenizer) == expected
        turn = chat_of(tokenizer).turn
        assert expected[1].endswith(turn.token) and turn.token
        (example,) = render([ROW], tokenizer)
        assert example.token_ids[-1] == tokenizer.convert_tokens_to_ids(turn.token)
    else:
        with pytest.raises(UserError, match=f"^row 1: where an answer {expected}") as caught:
            render([ROW], tokenizer)
        assert "\n" not in str(caught.value)
        assert render([ROW], tokenizer, responses=False), "prompts alone need no end"


THINKS = TEMPLATES["opens thoughts in the prompt"][0]
KEEPS_THE_REST = THINKS.replace("bot", "").replace(
    f"assistant\n{C}<", "assistant\n{{ m['content'].split('</think>')[-1].lstrip() }}<"
)


@pytest.mark.parametrize("template", [THINKS, KEEPS_THE_REST], ids=["written as given", "taken out"])
@pytest.mark.parametrize("given", ["<think>\n3, 4</think>It is 7.", "3, 4</think>It is 7."])
def test_thoughts_are_trained_on_and_opened_once(make, template, given):
    row = {"prompt": "3 + 4 =", "response": given}
    assert trained(make(template), row) == (ML + "<think>\n", "3, 4</think>It is 7.<|im_end|>")


def test_an_answer_that_the_template_rewrites_is_refused(make):
    rewrites = TEMPLATES["usual"][0].replace("{{ m['content'] }}", "{{ m['content'] | replace('7', 'seven') }}")
    with pytest.raises(UserError, match=r"^x: row 1: where an answer stands cannot be told .*It is seven"):
        render([ROW], make(rewrites), where="x")


TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m['role'] }}:"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "weather?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
FOUND = {"role": "tool", "content": "sunny", "name": None}


class TestRoles:
    def test_tools_and_their_results_are_part_of_the_prompt(self, make):
        row = {"messages": [*ASKED, CALL, FOUND, {"role": "assistant", "content": "It is sunny."}]}
        prompt, rest = trained(make(TOOLS), row | {"tools": [{"name": "look"}]})
        assert prompt.startswith('[{"name": "look"}]\nsystem:be kind<|end|>\n') and "tool:sunny<|end|>" in prompt
        assert rest == "It is sunny.<|end|>"
        assert trained(make(TOOLS), row | {"tools": '[{"name": "look"}]'}) == (prompt, rest)

    def test_a_call_is_an_answer_as_the_template_writes_it(self, make):
        tokenizer = make(TOOLS)
        _, rest = trained(tokenizer, {"messages": [*ASKED, CALL]})
        assert rest == '[{"function": {"name": "look"}}]<|end|>'
        (example,) = render([{"messages": [*ASKED, CALL]}], tokenizer)
        assert example.response

    def test_roles_that_a_template_leaves_out_are_named(self, make):
        silent = TEMPLATES["usual"][0].replace("{% else %}", "{% elif m['role'] == 'assistant' %}")
        with pytest.raises(UserError, match="row 1: the model's chat template leaves out messages of role system"):
            render([{"messages": ASKED}], make(silent))

    def test_parts_of_text_are_put_together(self, make):
        parts = [{"type": "text", "text": "3 + "}, {"type": "text", "text": "4 ="}]
        row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ["It ", "is 7."]}]}
        assert trained(make(TEMPLATES["usual"][0]), row) == TEMPLATES["usual"][1]


NAMED = {"brief": "[Q]{{ messages[0]['content'] }}", "tool_use": "[A]{{ messages[0]['content'] }}"}


class TestChoice:
    def prompt(self, tokenizer, template="auto", **fields):
        (example,) = render([{"messages": [{"role": "user", "content": "hi"}], **fields}], tokenizer, template)
        return example.prompt

    def test_by_name_by_file_and_by_default(self, make, tmp_path):
        tokenizer, own = make({**NAMED, "default": "{{ messages[0]['content'] }}"}), tmp_path / "own.jinja"
        own.write_text("é {{ messages[0]['content'] }}", encoding="utf-8")
        assert self.prompt(tokenizer) == self.prompt(tokenizer, "chat") == "hi"
        assert self.prompt(tokenizer, "chat:brief") == "[Q]hi"
        assert self.prompt(tokenizer, tools=[{"name": "look"}]) == "[A]hi"
        assert self.prompt(tokenizer, f"chat:{own}") == self.prompt(make(), f"chat:{own}") == "é hi"
        hashes = [template_hash(tokenizer, name) for name in ("auto", "chat:brief", f"chat:{own}", "none")]
        assert len(set(hashes)) == 4

    def test_without_a_default_one_has_to_be_chosen(self, make):
        tokenizer = make(NAMED)
        with pytest.raises(UserError, match=r"templates brief, tool_use, and none called default.*=chat:brief$"):
            self.prompt(tokenizer)
        assert self.prompt(tokenizer, "chat:brief") == "[Q]hi"

    def test_names_that_there_are_not(self, make, tmp_path):
        for tokenizer, has in ((make(NAMED), "the chat templates brief, tool_use"), (make(), "no chat template")):
            with pytest.raises(UserError, match=f"--template=chat:brif: no such file, and the tokenizer has {has}"):
                self.prompt(tokenizer, "chat:brif")
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(UserError, match="bytes: expected a Jinja template, got something else"):
            self.prompt(make(), f"chat:{tmp_path / 'bytes'}")
        (tmp_path / "broken").write_text("{% for %}")
        with pytest.raises(UserError, match="refuses the conversation"):
            self.prompt(make(), f"chat:{tmp_path / 'broken'}")

    def test_templates_of_a_directory(self, directory, tmp_path):
        """As checkpoints hold them: a list of named ones, or a file of its own that goes before it."""
        path = tiny_tokenizer_dir(tmp_path, chat_template=None)
        settings = json.loads((path / "tokenizer_config.json").read_text())
        listed = [{"name": name, "template": template} for name, template in NAMED.items()]
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": listed}))
        assert self.prompt(load_tokenizer(path), "chat:brief") == "[Q]hi"
        (path / "chat_template.jinja").write_text("alone: {{ messages[0]['content'] }}")
        assert self.prompt(load_tokenizer(path)) == "alone: hi"


BOMBS = {
    "time": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "memory": "{{ ('a' * 3000000000)|length }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_takes_all_there_is_ends_in_a_line(bomb, make, monkeypatch):
    monkeypatch.setattr(chat, "_PATIENCE", 2.0)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"takes more than 5 s or 1 GiB to render; give another with --template=chat:FILE"
    ):
        chat_of(make(BOMBS[bomb])).prompt([{"role": "user", "content": "hi"}])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 1/0 }}",
        "{{ 10 ** 400 * 1.0 }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_what_a_template_does_to_itself_is_one_line(template, make):
    with pytest.raises(UserError, match="row 1: the model's chat template refuses the conversation") as caught:
        chat_of(make(template)).prompt([{"role": "user", "content": "hi"}], "row 1")
    assert "\n" not in str(caught.value)


def test_a_template_is_tried_once(make, monkeypatch):
    tries = []
    monkeypatch.setattr(chat.subprocess, "run", lambda *_, **__: tries.append(1) or types.SimpleNamespace(returncode=0))
    for _ in range(3):
        chat_of(make("{% generation %}tried once{% endgeneration %}")).prompt([{"role": "user", "content": "hi"}])
    assert len(tries) == 1
