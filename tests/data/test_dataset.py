"""Rows in one step: whatever a user has becomes datasets, as rows from a file would."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import RowOptions
from jaxcrit.core.hashing import sha256_json
from jaxcrit.data.dataset import Dataset, Limits, read_datasets
from jaxcrit.data.tokenizer import load_tokenizer

PLAIN = RowOptions(template="none")
LIMITS = Limits(64, 320, "MODEL")
PAIRS = [{"prompt": f"{i} cats", "response": "two dogs"} for i in range(6)]


class Table:
    """Rows as the datasets library gives them: every row has every field, None where it had none."""

    column_names = ("prompt", "response", "text")

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter([{name: row.get(name) for name in self.column_names} for row in self.rows])


class Endless(Table):
    def __iter__(self):
        return ({"prompt": f"{i} cats", "response": None} for i in itertools.count())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer_dir(path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return file


def tokens(dataset):
    return [example.token_ids.tolist() for example in dataset.examples]


@pytest.mark.parametrize("responses", [False, True])
def test_one_dataset_whatever_it_comes_in(tokenizer, path, responses):
    def read(rows, options=PLAIN):
        return read_datasets(rows, tokenizer, options, LIMITS, responses=responses)

    (expected,) = read(None, dataclasses.replace(PLAIN, data=str(path)))
    assert expected.name == "pairs" and expected.source == str(path)
    for rows in (path, str(path), PAIRS, tuple(PAIRS), Table(PAIRS), {"mine": PAIRS}, {"mine": Table(PAIRS)}, expected):
        (found,) = read(rows)
        assert tokens(found) == tokens(expected) and found.sample_ids == expected.sample_ids
        assert found.describe()["hash"] == sha256_json(expected.sample_ids) == expected.describe()["hash"]
    (named,) = read({"mine": PAIRS})
    assert (named.name, named.source) == ("mine", "memory")
    assert [one.name for one in read([expected, named])] == ["pairs", "mine"]
    assert [one.name for one in read({"a": expected, "b": PAIRS})] == ["a", "b"]


def test_prompts_and_token_ids(tokenizer):
    prompts = [row["prompt"] for row in PAIRS]
    (texts,) = read_datasets(prompts, tokenizer, PLAIN, LIMITS)
    (bare,) = read_datasets([{"prompt": prompt} for prompt in prompts], tokenizer, PLAIN, LIMITS)
    assert texts.sample_ids == bare.sample_ids and tokens(texts) == tokens(bare)
    for ids in (tokens(texts), [np.array(row) for row in tokens(texts)], [tuple(row) for row in tokens(texts)]):
        (found,) = read_datasets(ids, tokenizer, RowOptions(), LIMITS)
        assert tokens(found) == tokens(texts), "no template touches them"
        assert [example.prompt_length for example in found.examples] == [len(row) for row in tokens(texts)]
    (same,) = read_datasets(np.array([[3, 4], [5, 6]]), tokenizer, PLAIN, LIMITS)
    assert tokens(same) == [[3, 4], [5, 6]]


def test_order_and_number_are_those_of_a_file(tokenizer, path):
    for changes in ({"limit": 2}, {"shuffle_seed": 3}, {"shuffle_seed": 3, "limit": 2}):
        options = dataclasses.replace(PLAIN, **changes)
        (file,) = read_datasets(path, tokenizer, options, LIMITS)
        (memory,) = read_datasets(PAIRS, tokenizer, options, LIMITS)
        assert memory.sample_ids == file.sample_ids and len(memory.examples) == changes.get("limit", 6)
    (streamed,) = read_datasets(Endless([]), tokenizer, dataclasses.replace(PLAIN, limit=3), LIMITS)
    assert len(streamed.examples) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: expected rows, prompts or token ids, got none"),
        ({}, "rows: expected one dataset or more by name, got none"),
        ({"mine": []}, "mine: expected rows, prompts or token ids, got none"),
        ({"../a": ["one"]}, "that can name a directory, got '../a'"),
        ({1: ["one"]}, "that can name a directory, got 1"),
        (7, "rows: expected rows, prompts or token ids, got int"),
        ({"mine": "one"}, "mine: expected rows, prompts or token ids, got str"),
        pytest.param(({"prompt": text} for text in "ab"), "read again, got generator; give a list", id="generator"),
        (["one", 2], "rows, row 2: expected a dict such as"),
        (["one", [2]], "rows, row 2: expected a dict such as"),
        ([[True, False]], "rows, row 1: expected a dict such as"),
        ([[]], "rows, row 1: expected a dict such as"),
        ([[3, 4], [3, -4]], "rows, row 2: expected token ids of 0 or more, got -4"),
        ([[3, 4], [5], np.array([3, 4])], "rows: row 3 is the same row as row 1"),
        (["one", "two", "one"], "rows: row 3 is the same row as row 1"),
        ([{"prmpt": "one"}], "rows: row 1: .*did you mean 'prompt'"),
        ([{"prompt": " "}], "rows: row 1"),
        ([[3, 320]], "the tokenizer gives token 320, the model knows 320"),
        ([[3] * 65], "expected prompts of at most 64 tokens"),
        ([Dataset("a", "x", []), Dataset("a", "y", [])], "got two called 'a'; rename one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_rows_are_one_line(tokenizer, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read_datasets(rows, tokenizer, PLAIN, LIMITS)
    assert "\n" not in str(caught.value)


def test_repeats_are_named_at_once_or_dropped(tokenizer, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "one", "two", "six")))
    tokens = [[3, 4], [5], np.array([3, 4]), [5], [6]]
    for rows, places in (
        (file, ("line 3", "line 4")),
        (["one", "two", "one", "two", "six"], ("row 3", "row 4")),
        (tokens, ("row 3", "row 4")),
    ):
        with pytest.raises(UserError, match="is the same row as") as caught:
            read_datasets(rows, tokenizer, PLAIN, LIMITS)
        assert all(place in str(caught.value) for place in places) and "--duplicates=drop" in str(caught.value)
        (found,) = read_datasets(rows, tokenizer, dataclasses.replace(PLAIN, duplicates="drop"), LIMITS)
        assert len(found.examples) == 3
        assert "2 rows that repeat an earlier one are left out" in capsys.readouterr().err
    (first,) = read_datasets(file, tokenizer, dataclasses.replace(PLAIN, duplicates="drop", limit=2), LIMITS)
    assert len(first.examples) == 2


def test_published_sets_keep_their_repeats_unless_told(tokenizer, tmp_path):
    rows = [{"instruction": f"{i % 500} cats", "input": "", "output": "two"} for i in range(520)]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = dataclasses.replace(PLAIN, data=f"alpaca:{tmp_path / 'alpaca.jsonl'}", split="all")
    (kept,) = read_datasets(None, tokenizer, asked, LIMITS)
    (once,) = read_datasets(None, tokenizer, dataclasses.replace(asked, duplicates="drop"), LIMITS)
    assert (len(kept.examples), len(once.examples)) == (520, 500)


def test_rows_in_two_datasets_are_noticed(tokenizer, capsys):
    read_datasets({"a": ["one", "two"], "b": ["two", "three"]}, tokenizer, PLAIN, LIMITS)
    assert "a and b have 1 rows in common" in capsys.readouterr().err
    read_datasets({"a": ["one"], "b": ["two"]}, tokenizer, PLAIN, LIMITS)
    assert not capsys.readouterr().err


def test_rows_to_train_on_have_responses(tokenizer):
    for rows in (["one", "two"], [[3, 4], [5]], [PAIRS[0], {"prompt": "three"}]):
        with pytest.raises(UserError, match=r"memory: row .* has no response to learn from"):
            read_datasets(rows, tokenizer, PLAIN, LIMITS, responses=True)


def test_a_split_that_is_not_asked_for_is_of_published_datasets_alone(tokenizer, path, tmp_path):
    published = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"{i} cats", "input": "", "output": "two"} for i in range(520)]
    published.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = f"alpaca:{published}"
    (own,) = read_datasets(path, tokenizer, PLAIN, LIMITS, split="train")
    assert len(own.examples) == 6
    asked = dataclasses.replace(PLAIN, data=named, split="train")
    (train,) = read_datasets(None, tokenizer, asked, LIMITS, responses=True)
    assert len(train.examples) == 20
    for rows, options in ((named, PLAIN), (None, dataclasses.replace(PLAIN, data=named))):
        (found,) = read_datasets(rows, tokenizer, options, LIMITS, responses=True, split="train")
        assert found.sample_ids == train.sample_ids


def test_what_is_too_long_is_cut_or_left_out_and_counted(tokenizer, capsys):
    rows = [*PAIRS, {"prompt": "cats and dogs " * 9, "response": "two dogs"}]
    limits = Limits(20, 320, "MODEL")

    def read(**options):
        return read_datasets({"mine": rows}, tokenizer, dataclasses.replace(PLAIN, **options), limits, responses=True)

    with pytest.raises(UserError, match=r"row 7 is longer; drop such rows with --long=drop"):
        read()
    for options, counts in (({"long": "drop"}, (6, 0, 1)), ({"long": "cut"}, (7, 1, 0))):
        (found,) = read(**options)
        said = found.describe()
        assert (said["num_samples"], said["num_cut"], said["num_dropped"]) == counts
        _, cut, dropped = counts
        told = f"mine: 7 rows, {cut} cut and {dropped} left out for being longer than 20 tokens"
        joined, last = capsys.readouterr().err.splitlines()[-2:]
        assert last == told and joined.startswith(
            "mine: no chat template, so that 6 responses follow their prompts with"
        )
    (bare,) = read_datasets([[3, 4], [5] * 30], tokenizer, dataclasses.replace(PLAIN, long="drop"), limits)
    assert tokens(bare) == [[3, 4]] and bare.num_dropped == 1
    (again,) = read_datasets(bare, tokenizer, dataclasses.replace(PLAIN, long="drop"), limits)
    assert again.num_dropped == 1, "what was left out before is still known"
    with pytest.raises(UserError, match=r"--long=drp: expected refuse or cut or drop \(did you mean 'drop'\?\)"):
        dataclasses.replace(PLAIN, long="drp")
