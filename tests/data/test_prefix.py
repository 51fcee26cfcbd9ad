"""Where a prompt is cut that another model has read the beginning of."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import PrefixOptions, RowOptions
from jaxcrit.data.dataset import Limits, read_datasets
from jaxcrit.data.prefix import with_prefixes
from jaxcrit.data.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(RowOptions, PrefixOptions):
    """Rows with a prefix."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer")))


def read(tokenizer, rows, prefix, context=256, responses=False, **options):
    asked = Asked(prefix=prefix, **options)
    found = read_datasets({"rows": rows}, tokenizer, asked, Limits(context, 320), responses=responses)
    return with_prefixes(found, asked)[0].examples


def test_a_share_leaves_one_on_each_side(tokenizer):
    rows = [[5] * count for count in (2, 10, 11)]
    assert [one.prefix_length for one in read(tokenizer, rows, "0.8")] == [1, 8, 8]
    assert [one.prefix_length for one in read(tokenizer, rows, "0.01")] == [1, 1, 1]


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_context_ends_a_token(template, tokenizer):
    """Prefix and rest are tokenised apart: the same context in front of two questions has the same tokens."""
    context = "the cat sat on the mat an"
    rows = [{"prefix": context, "prompt": f"{context}{more}", "response": "two"} for more in ("d the dog", "y one")]
    both = read(tokenizer, rows, "context", template=template, responses=True)
    heads = [one.token_ids[: one.prefix_length].tolist() for one in both]
    assert heads[0] == heads[1] and tokenizer.decode(heads[0]).endswith(context)
    for one, row in zip(both, rows, strict=True):
        text = tokenizer.decode(one.token_ids[: one.prompt_length])
        assert row["prompt"] in text and text.count("<s>") == 1
        assert tokenizer.decode(one.token_ids[one.prompt_length :]).startswith("two")
    whole = read(tokenizer, rows, "0.5", template=template)
    assert len(whole[0].token_ids) < both[0].prompt_length, "else the cut would have been between tokens anyway"


def test_contexts_of_the_published_sets(tokenizer, tmp_path):
    boolq = {"question": "is it", "answer": True, "passage": "the sky is blue"}
    dolly = {"instruction": "name it", "context": "the sky is blue", "response": "blue"}
    for name, row in (("boolq", boolq), ("dolly", dolly)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([row]))
        asked = Asked(prefix="context", data=f"{name}:{file}", split="all")
        (one,) = with_prefixes(read_datasets(None, tokenizer, asked, Limits(256, 320)), asked)[0].examples
        assert tokenizer.decode(one.token_ids[: one.prefix_length]).endswith("the sky is blue"), name


def test_cut_rows_keep_what_is_left_of_their_prefix(tokenizer):
    rows = [{"prefix": "the cat sat", "prompt": "the cat sat on the mat"}]
    (whole,) = read(tokenizer, rows, "context", template="none")
    (left,) = read(tokenizer, rows, "context", template="none", context=whole.prompt_length - 1, truncate="left")
    assert left.prefix_length == whole.prefix_length - 1
    assert left.token_ids[left.prefix_length :].tolist() == whole.token_ids[whole.prefix_length :].tolist()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "one"}, {"prompt": "two"}], {}, "--prefix=context: no context in row 1, 2; leave such rows"),
        ([{"prompt": "one", "prefix": "two"}], {}, "row 1: prefix: expected text that stands in the prompt, got 'two'"),
        ([{"prompt": "one", "prefix": 3}], {}, "row 1: prefix: expected text, got a number"),
        ([{"prompt": "one", "prefix": "one"}], {"template": "none"}, "nothing of the prompt is left behind the prefix"),
        ([{"prompt": "one", "prefix": "one"}], {"edition": "paper"}, "--prefix=context: is of --edition=clean"),
        ([[3, 4]], {}, "no context in row 1"),
        ([[3]], {"prefix": "0.5"}, "--prefix=0.5: nothing of the prompt is left behind the prefix in row 1"),
        ([[3]], {"prefix": "1.5"}, "--prefix=1.5: expected context, or a share between 0 and 1 such as 0.8"),
        ([[3]], {"prefix": "half"}, "--prefix=half: expected context, or a share"),
    ],
)
def test_bad_prefixes(rows, options, message, tokenizer):
    with pytest.raises(UserError) as caught:
        read(tokenizer, rows, **{"prefix": "context", **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)
