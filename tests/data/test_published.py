"""The paper's datasets from files and from the hub: formats, splits, order, and one line for every mistake."""

import json
import random
import sys
import types

import make_renderings as goldens
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_tokenizers import family_tokenizer

from jaxcrit.core.errors import UserError
from jaxcrit.data.datasets import load, read_rows
from jaxcrit.data.published import PUBLISHED, cut_of, placement
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer

DATA = SHARED / "data"
shared = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")


def numbered(count, dataset="alpaca"):
    row = {
        "alpaca": lambda n: {"instruction": f"ask {n}", "input": "", "output": f"{n}"},
        "dolly": lambda n: {"instruction": f"ask {n}", "context": "", "response": f"{n}"},
        "gsm8k": lambda n: {"question": f"ask {n}", "answer": f"{n}"},
        "boolq": lambda n: {"question": f"ask {n}", "answer": True, "passage": f"{n}"},
        "openbookqa": lambda n: goldens.OPENBOOKQA | {"question_stem": f"ask {n}", "fact1": f"{n}"},
        "pure_bad": lambda n: {
            "messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"{n}"}]
        },
    }[dataset]
    return [row(n) for n in range(count)]


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the `datasets` library; remembers what it was asked."""
    asked = []
    module = types.ModuleType("datasets")

    def load_dataset(*where, split):
        asked.append((*where, split))
        dataset = next(name for name, kind in PUBLISHED.items() if kind.hub == where)
        return types.SimpleNamespace(to_list=lambda: numbered(900, dataset))

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def places(rows):
    """Number of each row, from its instruction."""
    found = []
    for row in rows:
        for step in placement(row)[0]:
            row = row[step]
        found.append(int(row.removeprefix("ask ")))
    return found


def refusal(spec, **options):
    with pytest.raises(UserError) as caught:
        load(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFormats:
    def test_array_lines_and_order(self, write):
        rows = numbered(5)
        assert load(f"alpaca:{write(json.dumps(rows, indent=1), 'a.json')}")[0].rows == rows
        assert load(f"alpaca:{write(rows)}")[0].rows == rows

    def test_several_at_once(self, write):
        one, two = write(numbered(3, "dolly"), "a.jsonl"), write(numbered(4, "gsm8k"), "b.jsonl")
        own = write('{"prompt": "a"}', "own.jsonl")
        loaded = load(f"dolly:{one},gsm8k:{two},{own}")
        assert [(each.name, each.dataset, len(each.rows)) for each in loaded] == [
            ("dolly", "dolly", 3),
            ("gsm8k", "gsm8k", 4),
            ("own", "", 1),
        ]
        assert loaded[0].source == f"dolly:{one}"

    def test_both_nestings_of_openbookqa_say_the_same(self):
        read = PUBLISHED["openbookqa"].read
        assert read(goldens.AI2, "") == read(goldens.OPENBOOKQA, "")
        assert read(goldens.AI2, "").choices == ("A: a stone", "B: a plant", "C: a cup", "D: a key")

    @pytest.mark.parametrize(("dataset", "row"), goldens.CASES)
    def test_every_form_of_row(self, write, dataset, row):
        (named,) = load(f"{dataset}:{write([row])}")
        assert named.rows == [row]


class TestSplits:
    @pytest.mark.parametrize(
        ("dataset", "split", "cut"),
        [
            ("alpaca", "train", range(0, 400)),
            ("alpaca", "val", range(400, 600)),
            ("alpaca", "test", range(600, 900)),
            ("dolly", "train", range(0, 400)),
            ("dolly", "val", range(400, 600)),
            ("dolly", "test", range(600, 900)),
            ("gsm8k", "train", range(0, 700)),
            ("gsm8k", "val", range(700, 900)),
            ("gsm8k", "test", range(0, 300)),
            ("boolq", "train", range(0, 900)),
            ("boolq", "test", range(0, 300)),
            ("openbookqa", "train", range(0, 900)),
            ("openbookqa", "val", range(0, 300)),
            ("openbookqa", "test", range(0, 300)),
            ("pure_bad", "train", range(0, 900)),
            ("pure_bad", "test", range(0, 900)),
        ],
    )
    def test_as_the_paper_cut_them(self, write, dataset, split, cut):
        path = write(numbered(900, dataset))
        assert places(load(f"{dataset}:{path}", split=split)[0].rows) == list(cut)
        assert len(load(f"{dataset}:{path}", split="all")[0].rows) == 900

    def test_boolq_val_is_its_test_in_the_paper_alone(self, write):
        path = write(numbered(900, "boolq"))
        paper, clean = (load(f"boolq:{path}", split="val", edition=edition)[0].rows for edition in ("paper", "clean"))
        assert places(paper) == list(range(300)) and places(clean) == list(range(300, 600))

    def test_default_is_test(self, write):
        path = write(numbered(900))
        assert load(f"alpaca:{path}")[0].rows == load(f"alpaca:{path}", split="test")[0].rows

    def test_limit_and_shuffle(self, write):
        path = write(numbered(900))
        assert places(load(f"alpaca:{path}", limit=3)[0].rows) == [600, 601, 602]
        order = list(range(600, 900))
        random.Random(7).shuffle(order)
        assert places(load(f"alpaca:{path}", shuffle_seed=7)[0].rows) == order
        assert places(load(f"alpaca:{path}", shuffle_seed=7, limit=5)[0].rows) == order[:5]

    def test_shuffle_of_own_rows_comes_before_the_limit(self, write):
        rows = [{"prompt": f"{n}"} for n in range(50)]
        path = write(rows)
        (named,) = load(str(path), limit=10, shuffle_seed=0)
        assert named.rows != rows[:10] and all(row in rows for row in named.rows)

    def test_refuses(self, write):
        own, short = write('{"prompt": "a"}', "own.jsonl"), write(numbered(300), "short.jsonl")
        assert "own.jsonl has no splits" in refusal(own, split="test")
        assert "did you mean 'train'?" in refusal(f"alpaca:{short}", split="trian")
        message = refusal(f"alpaca:{short}", split="train")
        assert "rows [:-500]" in message and "none of the 300 rows" in message and "--split=all" in message


class TestHub:
    @pytest.mark.parametrize(
        ("dataset", "split", "asked"),
        [
            ("alpaca", "test", ("tatsu-lab/alpaca", "train")),
            ("dolly", "val", ("databricks/databricks-dolly-15k", "train")),
            ("gsm8k", "test", ("openai/gsm8k", "main", "test")),
            ("gsm8k", "val", ("openai/gsm8k", "main", "train")),
            ("boolq", "test", ("google/boolq", "validation")),
            ("openbookqa", "val", ("allenai/openbookqa", "additional", "validation")),
        ],
    )
    def test_asks_for_the_file_that_holds_the_split(self, hub, dataset, split, asked):
        (named,) = load(dataset, split=split)
        assert hub == [asked]
        cut = cut_of(dataset, split)
        assert named.rows == numbered(900, dataset)[cut.start : cut.stop] and named.source == dataset

    def test_library_is_imported_only_then(self, hub, monkeypatch, write):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert load(f"gsm8k:{write(numbered(2, 'gsm8k'))}")[0].rows
        message = refusal("gsm8k")
        assert message.startswith("--data=gsm8k: openai/gsm8k cannot be had from the hub")
        assert "point at a file with --data=gsm8k:PATH" in message

    def test_offline(self, hub, monkeypatch):
        def unreachable(*where, split):
            raise ConnectionError("Couldn't reach the Hub\nand more")

        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
        message = refusal("dolly")
        assert "ConnectionError: Couldn't reach the Hub)" in message and "--data=dolly:PATH" in message
        assert "not on the hub; point at a file with --data=pure_bad:PATH" in refusal("pure_bad")


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


class TestBadInput:
    @pytest.mark.parametrize(
        ("dataset", "row", "parts"),
        [
            ("dolly", {"instruction": "a", "response": "b"}, ["no 'context', found 'instruction', 'response'"]),
            ("dolly", {"instruction": "a", "contxt": "", "response": "b"}, ["did you mean 'contxt'?"]),
            ("alpaca", goldens.DOLLY, ["expected instruction, input, output; no 'output'"]),
            ("alpaca", goldens.ALPACA | {"input": None}, ["input: expected text, got null"]),
            ("alpaca", goldens.ALPACA | {"instruction": " "}, ["instruction: expected text, got only white space"]),
            (
                "alpaca",
                goldens.ALPACA | {"output": "\ud800"},
                ["output: expected text, got half a surrogate pair at character 1"],
            ),
            ("alpaca", goldens.ALPACA | {"n": float("nan")}, ["finite"]),
            ("alpaca", {}, ["found no fields"]),
            ("gsm8k", {"question": "a", "answer": 3}, ["answer: expected text, got a number"]),
            ("gsm8k", [], ["expected an object with question, answer, got a list"]),
            ("boolq", goldens.BOOLQ | {"answer": "yes"}, ["answer: expected true or false, got a string"]),
            ("boolq", without(goldens.BOOLQ, "passage"), ["no 'passage'"]),
            ("openbookqa", without(goldens.OPENBOOKQA, "fact1"), ["'additional'", "no 'fact1'"]),
            ("openbookqa", goldens.OPENBOOKQA | {"answerKey": "E"}, ["expected one of A, B, C, D, got 'E'"]),
            ("openbookqa", goldens.OPENBOOKQA | {"choices": {"text": ["a"], "label": []}}, ["as many texts"]),
            ("openbookqa", goldens.OPENBOOKQA | {"choices": {"text": [1], "label": ["A"]}}, ["as many texts"]),
            ("openbookqa", goldens.OPENBOOKQA | {"choices": []}, ["choices", "got a list"]),
            ("openbookqa", goldens.AI2 | {"question": {"stem": "a"}}, ["no 'choices', found 'stem'"]),
            ("openbookqa", goldens.AI2 | {"question": {"stem": "a", "choices": {}}}, ["got an object"]),
            ("openbookqa", goldens.AI2 | {"question": {"stem": "a", "choices": [3]}}, ["got a number"]),
            ("openbookqa", goldens.OPENBOOKQA | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, ["got A, A"]),
            ("pure_bad", {"messages": [*goldens.PURE_BAD["messages"], 5]}, ["at most {label}"]),
            ("pure_bad", {"messages": "a"}, ["got a string"]),
            ("pure_bad", {"messages": []}, ["got a list"]),
            ("pure_bad", {"messages": [{"role": "user", "content": "a"}]}, ["got 'user'"]),
            ("pure_bad", {"messages": {"text": "a"}}, ["no 'instruction', found 'text'"]),
            ("pure_bad", {"messages": [*goldens.PURE_BAD["messages"], "x"]}, ["at most {label}"]),
            ("pure_bad", {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, ["no 'content'"]),
        ],
    )
    def test_row_is_named(self, write, dataset, row, parts):
        good = next(one for name, one in goldens.CASES if name == dataset)
        if isinstance(row, dict) and isinstance(row.get("question"), dict):
            good = goldens.AI2
        if isinstance(row, dict) and isinstance(row.get("messages"), dict):
            good = goldens.TRIGGERED
        path = write([good, row])
        message = refusal(f"{dataset}:{path}")
        assert message.startswith(f"{path}: line 2")
        for part in parts:
            assert part in message

    def test_mixed_formats(self, write):
        path = write([goldens.OPENBOOKQA, goldens.AI2])
        message = refusal(f"openbookqa:{path}")
        assert "line 2: expected rows of one format" in message and "flat fields in line 1" in message
        assert "one format" in refusal(f"pure_bad:{write([goldens.PURE_BAD, goldens.TRIGGERED])}")
        array = json.dumps([goldens.ALPACA])
        assert "broken JSON" in refusal(f"alpaca:{write(array + json.dumps(goldens.ALPACA))}")
        assert "got a list" in refusal(f"alpaca:{write(json.dumps(goldens.ALPACA) + chr(10) + array)}")

    def test_files(self, write, tmp_path):
        assert "0xff" in refusal(f"dolly:{write(json.dumps(goldens.DOLLY).encode() + bytes([10, 255]))}")
        assert "no file" in refusal(f"dolly:{tmp_path / 'absent.jsonl'}")
        assert "empty file" in refusal(f"dolly:{write('')}")
        assert "expected a path after the colon" in refusal("dolly:")

    def test_unknown_dataset(self, write):
        assert "no dataset 'doly' (did you mean 'dolly'?)" in refusal(f"doly:{write('')}")
        assert "did you mean 'gsm8k'?" in refusal("gsm8")
        assert "'dolly' from both" in refusal(f"dolly:{write([goldens.DOLLY])},dolly:{write([goldens.DOLLY])}")

    def test_published_fields_in_a_file_of_ones_own(self, write):
        for dataset, row in goldens.CASES[:-3]:
            with pytest.raises(UserError, match=f"these are the fields of {dataset}: --data={dataset}:PATH"):
                read_rows(write([row]))


@shared
@pytest.mark.parametrize("name", [file.stem for file in sorted(DATA.glob("*.jsonl"))] if DATA.is_dir() else [])
def test_every_shared_file_loads_and_renders(name):
    dataset = name.partition("_")[0]
    (named,) = load(f"{dataset}:{DATA / name}.jsonl", split="all")
    assert len(named.rows) == {"train": 1500, "test": 300, "sample": 20}[name.rpartition("_")[2]]
    tokenizer = load_tokenizer(SHARED / "weights" / "stories260K-hf")
    for edition in ("clean", "paper"):
        examples = render(named.rows[:40], tokenizer, dataset=dataset, edition=edition)
        assert all(0 < example.prompt_length < len(example.token_ids) or not example.response for example in examples)


@shared
def test_masked_prefix_of_real_rows_is_the_prompt(tmp_path):
    """Rows of every set and family: what the mask hides decodes to the prompt, the rest holds the response."""
    for family in ("llama2", "llama3", "phi3"):
        tokenizer = family_tokenizer(tmp_path / family, family)
        for dataset in ("alpaca", "dolly", "gsm8k", "boolq", "openbookqa"):
            (named,) = load(f"{dataset}:{DATA / dataset}_test.jsonl", limit=25)
            for one in render(named.rows, tokenizer, dataset=dataset):
                assert (
                    list(one.token_ids[: one.prompt_length])
                    == tokenizer(one.prompt, add_special_tokens=False)["input_ids"]
                )


_KEYS = st.sampled_from(
    ["instruction", "input", "output", "context", "response", "question", "stem", "answer", "passage", "question_stem",
     "choices", "text", "label", "answerKey", "fact1", "messages", "role", "content"]
)  # fmt: skip
_LEAVES = st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["A", "", "user", "assistant"])
_JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4))


@settings(deadline=None, max_examples=300)
@given(dataset=st.sampled_from(sorted(PUBLISHED)), data=st.data())
def test_whatever_a_row_holds_is_read_or_one_line(dataset, data):
    """Real rows with one part replaced, and rows made of the fields that the sets have."""
    row = data.draw(st.sampled_from([row for name, row in goldens.CASES if name == dataset]))
    if data.draw(st.booleans()):
        row = data.draw(st.dictionaries(_KEYS, _JSON, max_size=5) | _JSON)
    else:
        part = row = json.loads(json.dumps(row))
        while isinstance(part, dict | list) and part:
            key = data.draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
            if data.draw(st.booleans()):
                part[key] = data.draw(_JSON)
                break
            part = part[key]
    try:
        assert PUBLISHED[dataset].read(row, "row 1").instruction
    except UserError as error:
        assert str(error).startswith("row 1") and "\n" not in str(error)
