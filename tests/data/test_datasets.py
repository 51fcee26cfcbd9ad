"""Reading rows: the kinds of row, the names of datasets, and one line for every mistake."""

import json

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.data import datasets
from jaxcrit.data.datasets import load, read_rows

GOOD = '{"prompt": "a"}\n'
MESSAGES = '{"messages": [%s]}'
USER, ASSISTANT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestReadRows:
    def test_every_kind_and_extra_fields_come_back_raw(self, write):
        rows = [
            {"prompt": "q", "response": "a", "family": "open"},
            {"prompt": "q", "response": None},
            {"messages": [{"role": "system", "content": ""}, json.loads(USER), json.loads(ASSISTANT)]},
            {"text": "a\u2028b", "n": 1},
        ]
        assert read_rows(write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))) == rows

    def test_blank_lines_bom_and_crlf(self, write):
        assert read_rows(write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')) == [
            {"prompt": "a"},
            {"prompt": "b"},
        ]

    def test_array(self, write):
        rows = [{"prompt": "a"}, {"prompt": "b"}]
        assert read_rows(write("\n" + json.dumps(rows, indent=1))) == rows
        assert read_rows(write(json.dumps(rows)), 1) == rows[:1]

    def test_limit_reads_no_further(self, write):
        assert read_rows(write(GOOD + "broken"), 1) == [{"prompt": "a"}]

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("", ["got an empty file"]),
            ("\n \n", ["got an empty file"]),
            ("[]", ["got an empty file"]),
            (GOOD + '{"prompt": ', ["line 2", "broken JSON", "column"]),
            ('{\n"prompt": "a"}', ["line 1", "one JSON object per line"]),
            ('[{"prompt": "a"},\n oops]', ["array that begins in line 1", "line 2 of it"]),
            (GOOD + '"text"', ["line 2", "expected a JSON object", "got a string"]),
            ("[1]", ["row 1", "got a number"]),
            ("[" * 100_000, ["cannot be read"]),
            (GOOD.encode() + b'{"prompt": "\xff"}', ["line 2", "expected UTF-8", "0xff"]),
            (b'[{"prompt":\n"\xff"}]', ["expected UTF-8", "line 2 of it"]),
            (GOOD + '{"prompt": "b", "n": NaN}', ["line 2", "finite"]),
            (GOOD + '{"prompt": "b", "n": 1e999}', ["line 2", "finite"]),
            (GOOD + "\n" + GOOD, ["line 3", "the same row as line 1"]),
            ('{"instruction": "a", "output": "b"}', ["line 1", "found 'instruction', 'output'"]),
            ('{"promt": "a"}', ["found 'promt'", "did you mean 'prompt'?"]),
            ("{}", ["found no fields"]),
            ('{"prompt": "a", "messages": []}', ["expected a user message", "got none"]),
            ('{"text": "a", "response": "b"}', ["response or completion beside prompt only"]),
            (GOOD + '{"prompt": ""}', ["line 2: prompt", "an empty string"]),
            (GOOD + '{"prompt": " \\n"}', ["line 2: prompt", "only white space"]),
            ('{"text": ""}', ["line 1: text", "an empty string"]),
            ('{"prompt": 3}', ["line 1: prompt", "expected text, got a number"]),
            ('{"prompt": null}', ["line 1: prompt", "got null"]),
            ('{"prompt": "a", "response": true}', ["line 1: response", "got true or false"]),
            ('{"prompt": "\\ud800"}', ["line 1: prompt", "surrogate pair at character 1"]),
            ('{"messages": {}}', ["messages to be a list", "got an object"]),
            (MESSAGES % "", ["expected a user message", "got none"]),
            (MESSAGES % "[]", ["message 1", "role and content, got a list"]),
            (MESSAGES % '{"content": "a"}', ["message 1", "got 'content'"]),
            (MESSAGES % '{"role": "asistant", "content": "a"}', ["message 1", "did you mean 'assistant'?"]),
            (
                MESSAGES % '{"role": ["user"], "content": "a"}',
                ["message 1", "expected role system, developer, user, assistant, tool"],
            ),
            (MESSAGES % '{"role": "user", "content": [{"type": "text"}]}', ["message 1: content", "got a list"]),
            (MESSAGES % '{"role": "user", "content": " "}', ["message 1: content", "only white space"]),
            (MESSAGES % ASSISTANT, ["expected a user message", "got none"]),
            (MESSAGES % f"{USER}, {ASSISTANT}, {ASSISTANT}", ["expected a user message", "got one of assistant"]),
            (MESSAGES % '{"role": "system", "content": "s"}', ["expected a user message", "got one of system"]),
        ],
    )
    def test_refuses(self, write, content, parts):
        path = write(content)
        message = refusal(read_rows, path)
        assert message.startswith(str(path))
        for part in parts:
            assert part in message

    def test_absent_file_and_directory(self, write, tmp_path):
        write(GOOD, "dolly.jsonl")
        assert "did you mean 'dolly.jsonl'?" in refusal(read_rows, tmp_path / "doly.jsonl")
        assert "did you mean 'demo'?" in refusal(load, "dem")
        assert "no file" in refusal(read_rows, tmp_path / "absent" / "x.jsonl")
        assert "got a directory" in refusal(read_rows, tmp_path)
        assert "cannot be read" in refusal(read_rows, write(GOOD) / "x")

    @pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
    def test_published_fields_wait_for_their_dataset(self):
        message = refusal(read_rows, SHARED / "data" / "dolly_test.jsonl")
        assert "line 1" in message and "found 'instruction', 'context', 'response'" in message


_KEYS = st.sampled_from(["prompt", "response", "messages", "conversations", "text", "role", "content", "from", "a\nb"])
_LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from(["user", "assistant"])
_JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3))


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=30) | st.lists(_JSON.map(json.dumps), max_size=3).map("\n".join).map(str.encode))
def test_whatever_a_file_holds_is_rows_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert read_rows(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


class TestLoad:
    @pytest.fixture(autouse=True)
    def demo(self, tmp_path, monkeypatch):
        folder = tmp_path / "demo_prompts"
        folder.mkdir()
        for family in ("open", "closed"):
            (folder / f"{family}.jsonl").write_text(json.dumps({"prompt": family, "family": family}))
        monkeypatch.setattr(datasets, "DEMO_PROMPTS", folder)
        return folder

    @pytest.mark.parametrize("spec", ["", "demo"])
    def test_default_is_every_embedded_family(self, spec):
        loaded = load(spec)
        assert [(each.name, each.source) for each in loaded] == [("closed", "demo:closed"), ("open", "demo:open")]
        assert loaded[1].rows == [{"prompt": "open", "family": "open"}]

    def test_parts(self, write):
        one, two = write(GOOD, "one.jsonl"), write(GOOD + '{"prompt": "b"}', "two.json")
        loaded = load(f"{one}, demo:open,{two}", limit=1)
        assert [each.name for each in loaded] == ["one", "open", "two"]
        assert loaded[2].source == str(two) and loaded[2].rows == [{"prompt": "a"}]

    def test_refuses(self, write, demo):
        one, other = write(GOOD, "open.jsonl"), write(GOOD, "open.json")
        assert "'open' from both" in refusal(load, f"{one},{other}")
        assert "'open' from both" in refusal(load, f"demo,{one}")
        assert "between commas" in refusal(load, f"{one},")
        assert "did you mean 'closed'?" in refusal(load, "demo:close")
        assert "got ''" in refusal(load, "demo:")
        for file in demo.iterdir():
            file.unlink()
        assert "found none" in refusal(load)
