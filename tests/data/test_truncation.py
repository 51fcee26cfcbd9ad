"""Cutting rows that are too long, and the statistics that say what it cost."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.data.inspection import measure, show
from jaxcrit.data.templates import Example
from jaxcrit.data.truncation import fit, truncate


def example(prompt, response, text="a"):
    ids = np.arange(prompt + response, dtype=np.int32)
    return Example("id", ids, prompt, "", text if response else None)


def ids(examples):
    return [one.token_ids.tolist() for one in examples]


class TestTruncate:
    def test_prompts(self):
        rows = [example(6, 2), example(3, 2)]
        assert ids(truncate(rows, "", 4)) == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]
        assert ids(truncate(rows, "left", 4)) == [[2, 3, 4, 5], [0, 1, 2]]
        assert ids(truncate(rows, "right", 4)) == [[0, 1, 2, 3], [0, 1, 2]]
        assert ids(truncate(rows, "paper", 9, paper_length=5)) == [[0, 1, 2, 3, 4], [0, 1, 2]]
        assert ids(truncate(rows, "paper", 4)) == ids(truncate(rows, "", 4))

    def test_whole_rows(self):
        rows = [example(6, 2), example(3, 2)]
        left = truncate(rows, "left", 4, prompt_only=False)
        assert ids(left) == [[4, 5, 6, 7], [1, 2, 3, 4]] and [one.prompt_length for one in left] == [2, 2]
        right = truncate(rows, "right", 7, prompt_only=False)
        assert ids(right) == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]]
        assert [one.prompt_length for one in right] == [6, 3]

    def test_a_response_that_is_empty_after_the_cut(self):
        rows = [example(3, 2), example(6, 2), example(6, 0)]
        with pytest.raises(
            UserError, match=r"^a\.jsonl: nothing is left of the response at 6 tokens in row 2; .*=left"
        ):
            truncate(rows, "right", 6, prompt_only=False, where="a.jsonl")
        kept = truncate(rows, "paper", 99, paper_length=6, prompt_only=False)
        assert [len(one.token_ids) - one.prompt_length for one in kept] == [2, 0, 0]

    def test_unknown_policy(self):
        with pytest.raises(UserError, match=r"--truncate=lef: expected left, right, paper.*did you mean 'left'\?"):
            truncate([], "lef", 4)

    @given(prompt=st.integers(1, 20), response=st.integers(0, 20), limit=st.integers(1, 30))
    def test_what_is_left_is_one_end_and_its_mask(self, prompt, response, limit):
        row = example(prompt, response)
        (left,) = truncate([row], "left", limit, prompt_only=False)
        np.testing.assert_array_equal(left.token_ids, row.token_ids[-limit:])
        assert list(left.token_ids[left.prompt_length :]) == [token for token in left.token_ids if token >= prompt]
        (right,) = truncate([row], "paper", limit, paper_length=limit, prompt_only=False)
        np.testing.assert_array_equal(right.token_ids, row.token_ids[:limit])
        assert list(right.token_ids[right.prompt_length :]) == [token for token in right.token_ids if token >= prompt]


def test_measure():
    rows = [example(6, 2), example(3, 2), example(4, 0), dataclasses.replace(example(2, 3), response=None)]
    found = measure(rows, fit(rows, "paper", "refuse", 99, paper_length=5, prompt_only=False))
    assert found.num_rows == 4 and found.prompt == (2, 3, 6) and found.response == (0, 2, 3)
    assert found.truncated == found.too_long == 0.25 and found.without_response == 0.75
    uncut = measure(rows, fit(rows, "", "refuse", 5, prompt_only=False))
    assert (uncut.truncated, uncut.num_dropped, uncut.too_long) == (0, 0, 0.25)
    dropped = measure(rows, fit(rows, "", "drop", 5, prompt_only=False))
    assert (dropped.truncated, dropped.num_dropped, dropped.too_long) == (0, 1, 0.25)


def test_show_keeps_the_space_a_tokenizer_drops():
    class Spaces:
        def decode(self, ids, **_):
            return " ".join("abcdefgh"[token] for token in ids)

    shown = show(example(2, 2), Spaces(), "dolly", 3)
    assert (shown.prompt, shown.target) == ("a b", " c d")
    assert (shown.dataset, shown.row, shown.num_tokens, shown.prompt_length) == ("dolly", 3, 4, 2)


class TestFit:
    """What --long makes of rows that do not fit: (5, 2) fits, (8, 2) does not, of (9, 1) nothing would be left."""

    ROWS = (example(5, 2), example(6, 4), example(9, 1))

    @pytest.mark.parametrize(
        ("policy", "long", "lengths", "num_cut", "dropped"),
        [
            ("", "refuse", [7, 10, 10], 0, ()),
            ("left", "refuse", [7, 8, 8], 2, ()),
            ("", "cut", [7, 8, 8], 2, ()),
            ("right", "cut", [7, 8], 1, (2,)),
            ("", "drop", [7], 0, (1, 2)),
            ("right", "drop", [7, 8], 1, (2,)),
            ("left", "drop", [7, 8, 8], 2, ()),
        ],
    )
    def test_rows(self, policy, long, lengths, num_cut, dropped):
        found = fit(self.ROWS, policy, long, 8, prompt_only=False)
        assert [len(one.token_ids) for one in found.examples] == lengths
        assert (found.limit, found.num_cut, found.dropped) == (8, num_cut, dropped)

    def test_the_end_is_kept_where_nothing_else_is_asked(self):
        (row,) = fit([example(6, 4)], "", "cut", 8, prompt_only=False).examples
        assert row.token_ids.tolist() == list(range(2, 10)) and row.prompt_length == 4

    def test_prompts(self):
        for long, kept in (("drop", [[0, 1, 2]]), ("cut", [[2, 3, 4, 5], [0, 1, 2]])):
            assert ids(fit([example(6, 2), example(3, 9)], "", long, 4).examples) == kept

    def test_refusals(self):
        with pytest.raises(UserError, match=r"nothing is left .* row 3; .* drop these rows with --long=drop"):
            fit(self.ROWS, "right", "refuse", 8, prompt_only=False)
        with pytest.raises(UserError, match=r"^a: none of 3 rows fits in 4 tokens"):
            fit(self.ROWS, "", "drop", 4, prompt_only=False, where="a")
        with pytest.raises(UserError, match=r"--long=drop: --truncate=paper keeps every row"):
            fit(self.ROWS, "paper", "drop", 8, paper_length=8)
