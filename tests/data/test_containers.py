"""Rows in the files that people have: tables, packed files, other encodings, saved sets, sets of the hub."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import sys
import types
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import RowOptions
from jaxcrit.data.dataset import named_rows
from jaxcrit.data.datasets import conversation, load, read_rows
from jaxcrit.data.published import placement

ROWS = [{"prompt": "1 + 1 =", "response": "2"}, {"prompt": "é\nor, not", "response": 'a "b"'}, {"prompt": "open"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,response\n1 + 1 =,2\n"é\nor, not","a ""b"""\nopen,\n'


def arrow(path, opener):
    table = pyarrow.Table.from_pylist(ROWS)
    with opener(str(path), table.schema) as writer:
        writer.write_table(table)


def refusal(path, function=read_rows, **options):
    with pytest.raises(UserError) as caught:
        function(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "packed": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "rows.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "rows.csv": lambda path: path.write_text(CSV, encoding="utf-8-sig"),
    "rows.CSV.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "rows.tsv": lambda path: path.write_text(
        'prompt\tresponse\n1 + 1 =\t2\n"é\nor, not"\t"a ""b"""\nopen\t\n', encoding="utf-16"
    ),
    "wide.jsonl": lambda path: path.write_text(LINES, encoding="utf-16"),
    "wider.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-32"),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "rows.parquet.gz": lambda path: (
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
        path.write_bytes(gzip.compress(path.read_bytes())),
    ),
    "rows.arrow": lambda path: arrow(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pyarrow.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_whatever_they_come_in(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    assert read_rows(path) == ROWS and read_rows(path, 1) == ROWS[:1]
    (named,) = load(str(path), limit=2)
    assert named.rows == ROWS[:2] and named.name == name.partition(".")[0]


def test_what_is_not_json_in_a_table_is_text(tmp_path):
    row = {"prompt": "hi", "when": datetime.date(2024, 1, 2), "turns": [{"a": 1, "b": None}, {"a": None, "b": "x"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows")
    assert read_rows(tmp_path / "rows") == [{"prompt": "hi", "when": "2024-01-02", "turns": [{"a": 1}, {"b": "x"}]}]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:30], ["gzip file", "cannot be unpacked"]),
        ("a.jsonl.gz", gzip.compress(b"oops", mtime=0), ["line 1", "broken JSON"]),
        ("a.xz", lzma.compress(LINES.encode())[:40], ["xz file", "cannot be unpacked"]),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", ["parquet file", "cannot be read"]),
        ("a.arrow", b"ARROW1\0\0", ["arrow file", "cannot be read"]),
        ("a.zip", b"PK\x03\x04rest", ["zip archive", "unpack it"]),
        ("a.zst", b"\x28\xb5\x2f\xfdrest", ["zstandard", "unpack it"]),
        ("a.csv", b"prompt,response\na,b,c\n", ["row 1", "expected 2 cells"]),
        ("a.csv", b"prompt,response\na\n", ["row 1", "expected 2 cells"]),
        ("a.csv", b'prompt\n"a', ["CSV by its name"]),
        ("a.csv", b"prompt\n\xe9\n", ["expected UTF-8", "0xe9"]),
        ("a.csv", b"question\na\n", ["row 1", "found 'question'"]),
        ("a.csv", b"prompt,response\n", ["got an empty file"]),
        ("a.jsonl", b"\xff\xfe\x00", ["expected UTF-16"]),
        ("a.jsonl", b"prompt,response\nx,y\n", ["broken JSON", ".csv"]),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    said = refusal(path)
    assert said.startswith(str(path)) and all(part in said for part in parts), said


class TestKinds:
    USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    ASKS, TELLS = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}

    def read(self, tmp_path, *rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(path)

    def test_read_as_they_are(self, tmp_path):
        rows = [
            {"prompt": "a", "completion": "b"},
            {"prompt": "Hi", "prompt_id": "1", "messages": [self.USER, self.BOT]},
            {"prompt": "Hi", "messages": [{"role": "system", "content": "be kind"}, self.USER]},
            {"prompt": [self.USER], "completion": [self.BOT]},
            {"prompt": [self.USER], "completion": "Hello"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            {"messages": [self.USER, {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "1"}]},
            {"prompt": "a", "conversations": 5},
            {"conversations": [self.ASKS, self.TELLS]},
            {"conversations": [self.USER, self.BOT]},
        ]
        assert self.read(tmp_path, *rows) == rows

    def test_a_conversation_is_messages_by_other_names(self, tmp_path):
        system = {"from": "system", "value": "be kind"}
        (row,) = self.read(tmp_path, {"conversations": [system, self.ASKS, {**self.TELLS, "weight": None}]})
        found = conversation(row)
        assert found.messages == [{"role": "system", "content": "be kind"}, self.USER] and found.answer == self.BOT
        assert placement(row) == (("conversations", 1, "value"), ("conversations", 2, "value"))
        assert placement({**row, "instruction": "x"})[0] == ("instruction",), "what is beside another field stays there"

    @pytest.mark.parametrize(
        ("row", "part"),
        [
            ({"prompt": "Ho", "messages": [USER, BOT]}, "prompt is not the first user message of messages; keep one"),
            ({"prompt": "a", "completion": "b", "response": "c"}, "and one of them"),
            ({"text": "a", "completion": "b"}, "beside prompt only"),
            ({"prompt": [USER], "completion": [USER]}, "completion: expected one message of role assistant"),
            ({"prompt": [USER], "completion": [BOT, BOT]}, "completion: expected one message of role assistant"),
            ({"prompt": [], "completion": [BOT]}, "expected a user message"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "got a list of image"),
            ({"messages": [{"role": "user", "content": []}]}, "got a list of nothing"),
            ({"messages": [USER], "tools": "no JSON"}, "tools: expected a list"),
            ({"messages": [{"role": "tool", "content": "1"}]}, "expected a user message before the response"),
            ({"messages": None}, "expected messages to be a list"),
            ({"conversations": None}, "expected messages to be a list"),
            ({"conversations": "Hi"}, "got a string"),
            ({"conversations": []}, "expected a user message before the response, got none"),
            ({"conversations": [5]}, "message 1: expected an object with role and content"),
            ({"conversations": [{}]}, "turn 1: expected an object with from, a text, and value, got no fields"),
            ({"conversations": [{"from": 5, "value": "Hi"}]}, "turn 1: expected an object with from, a text"),
            ({"conversations": [{"from": "humn", "value": "Hi"}]}, "got 'humn'"),
            ({"conversations": [ASKS], "response": "Hello"}, "response or completion beside prompt only"),
        ],
    )
    def test_what_contradicts_itself_is_one_line(self, tmp_path, row, part):
        with pytest.raises(UserError, match=part) as caught:
            self.read(tmp_path, row)
        assert "\n" not in str(caught.value)


class TestSets:
    """Sets of the datasets library, in directories and on the hub."""

    @pytest.fixture
    def saved(self, tmp_path):
        one = datasets.Dataset.from_list(ROWS)
        one.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
        return tmp_path

    def test_a_saved_set(self, saved):
        (named,) = load(str(saved / "one"), limit=2)
        assert (named.name, named.rows) == ("one", ROWS[:2])
        assert load(str(saved / "two"))[0].rows == ROWS[1:2]
        assert load(str(saved / "two"), preferred="train")[0].rows == load(str(saved / "two"), split="train")[0].rows
        (trained,) = named_rows(str(saved / "two"), RowOptions(), "train")
        assert trained.rows == ROWS
        assert "has no splits" in refusal(str(saved / "one"), load, split="test")
        said = refusal(str(saved / "two"), load, split="tran")
        assert "--split=tran" in said and "train, test (did you mean 'train'?)" in said
        (saved / "one" / "state.json").write_text("{")
        assert "is a saved dataset, and cannot be read" in refusal(str(saved / "one"), load)
        (file,) = (saved / "two" / "test").glob("*.arrow")
        content, text = file.read_bytes(), ROWS[1]["prompt"].encode()
        file.write_bytes(content.replace(text, b"\xbe" * len(text)))
        assert "two: expected text in UTF-8" in refusal(str(saved / "two"), load)

    def test_a_set_of_the_hub(self, monkeypatch, tmp_path):
        asked, one = [], datasets.Dataset.from_list(ROWS)
        both = datasets.DatasetDict({"train_sft": one, "test_sft": one})

        def load_dataset(*names, split):
            asked.append((*names, split))
            return one if split else both

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        monkeypatch.chdir(tmp_path)
        assert "expected a split of train_sft, test_sft; choose one with --split" in refusal("someone/chats", load)
        (named,) = load("someone/chats:short", split="train_sft")
        assert (named.name, named.source, named.rows) == ("chats", "someone/chats:short", ROWS)
        assert asked == [("someone/chats", None), ("someone/chats", "short", "train_sft")]

    @pytest.mark.parametrize("path", ["here/rows.jsonl", "nowhere/rows.csv", "here/rows", "./a/b", "~/a"])
    def test_a_mistyped_path_asks_no_hub(self, monkeypatch, tmp_path, path):
        monkeypatch.setitem(sys.modules, "datasets", None)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        assert "no file" in refusal(path, load)

    def test_neither_a_file_nor_to_be_had(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "datasets", None)
        monkeypatch.chdir(tmp_path)
        said = refusal("someone/chats", load)
        assert said.startswith("--data=someone/chats: someone/chats cannot be had from the hub")
        assert said.endswith("there is no file of this name")


def test_what_unpacks_without_end_is_refused_before_it_fills_memory(tmp_path):
    """A thousand times its size, in one line, in blank lines, in a CSV; rows that are alike 50 times over are read."""
    for name, unit in (("line.jsonl", b"x"), ("blank.jsonl", b"\n"), ("rows.csv", b"a,b\n"), ("wide.json", b"[")):
        packed = gzip.compress(unit * (20 * 2**20 // len(unit)), 6)
        (tmp_path / f"{name}.gz").write_bytes(packed)
        assert "unpacks to more than 200 times its size" in refusal(tmp_path / f"{name}.gz"), name
    same = "".join(json.dumps({"prompt": f"{number} {'the same ' * 400}"}) + "\n" for number in range(50))
    (tmp_path / "same.jsonl.gz").write_bytes(gzip.compress(same.encode()))
    assert len(read_rows(tmp_path / "same.jsonl.gz")) == 50


def test_what_is_read_at_once_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcrit.data.containers._LARGEST", 2**20)
    monkeypatch.setattr("jaxcrit.data.containers.LARGEST_TEXT", 2**10)
    (tmp_path / "rows.csv").write_text("prompt\n" + "a row\n" * 2**18)
    assert "unless a row a line (JSONL) or a table" in refusal(tmp_path / "rows.csv")
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedReader(Counted(path, mode)))
        assert "unless a row a line (JSONL) or a table" in refusal(tmp_path / "rows.csv")
    assert 0 < sum(read) < 2**20, "its size says it before it is read"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x" * 2**10}))
    assert "line 1: expected a row, got more than" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": f"{number} {'x' * 100}"} for number in range(40)]))
    assert len(read_rows(tmp_path / "rows.json")) == 40, "an array in one line, longer than a row may be"


def test_a_pipe_or_device_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "expected rows in a file, got a device or pipe" in refusal(tmp_path / "rows.jsonl")
    assert "got a device or pipe" in refusal("/dev/zero")
    reading, writing = os.pipe()
    os.write(writing, LINES.encode())
    os.close(writing)
    assert f"/dev/fd/{reading}: expected rows in a file, got a device or pipe" in refusal(f"/dev/fd/{reading}")
    os.close(reading)


def test_tables_whose_offsets_lie_are_refused(tmp_path):
    """Followed, they end the process."""
    arrow(tmp_path / "rows.arrow", pyarrow.ipc.new_stream)
    whole = (tmp_path / "rows.arrow").read_bytes()
    offsets = whole.index(b"\0\0\0\0" + len(ROWS[0]["prompt"]).to_bytes(4, "little"))
    (tmp_path / "rows.arrow").write_bytes(whole[: offsets + 4] + b"\xff\xff\xff\x7f" + whole[offsets + 8 :])
    assert "is a arrow file, and cannot be read" in refusal(tmp_path / "rows.arrow")


def test_a_row_names_each_key_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n')
    assert "line 2: prompt named twice" in refusal(tmp_path / "rows.jsonl")
