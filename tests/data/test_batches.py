"""Batches: nothing lost, repeated or reordered, few shapes, and the cheapest ladder there is."""

import itertools
import json

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import MAX_BUCKETS, choose_buckets, make_batches, refuse_long
from jaxcrit.data.templates import Example, render
from jaxcrit.data.tokenizer import load_tokenizer


def example(length, response=0, seed=0):
    ids = np.random.default_rng([seed, length]).integers(1, 100, length + response).astype(np.int32)
    return Example(f"id{seed}", ids, length, "", None)


def examples_of(lengths, response=0):
    return [example(length, response, seed) for seed, length in enumerate(lengths)]


def computed(ladder, lengths, batch_size):
    """Tokens computed with a ladder, counted the slow way."""
    of = [min(bucket for bucket in ladder if bucket >= length) for length in lengths]
    return sum(bucket * batch_size * -(-of.count(bucket) // batch_size) for bucket in set(of))


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


class TestChooseBuckets:
    @settings(deadline=None, max_examples=60)
    @given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30), batch_size=st.integers(1, 5))
    def test_no_ladder_computes_less(self, lengths, batch_size):
        chosen = choose_buckets(lengths, batch_size)
        *shorter, longest = sorted({-(-length // 8) * 8 for length in lengths})
        ladders = [
            (*subset, longest)
            for count in range(min(MAX_BUCKETS, len(shorter) + 1))
            for subset in itertools.combinations(shorter, count)
        ]
        costs = [computed(ladder, lengths, batch_size) for ladder in ladders]
        assert computed(chosen, lengths, batch_size) == min(costs)
        assert len(chosen) == min(len(x) for x, cost in zip(ladders, costs, strict=True) if cost == min(costs))

    def test_bounded_and_sorted(self):
        chosen = choose_buckets(range(1, 500), 4)
        assert len(chosen) <= MAX_BUCKETS and chosen == tuple(sorted(set(chosen))) and chosen[-1] >= 499

    def test_no_longer_than_the_context(self):
        assert choose_buckets([100, 101], 1, max_length=101)[-1] == 101
        assert choose_buckets([100, 300], 1, max_length=101)[-1] == 101

    def test_many_lengths_stay_cheap(self):
        lengths = np.arange(1, 40_000, 7)
        chosen = choose_buckets(lengths, 8)
        assert len(chosen) == MAX_BUCKETS and chosen[-1] >= lengths.max()
        assert sum(computed([b for b in chosen if b >= n][:1], [n], 1) for n in lengths.tolist()) < 1.15 * lengths.sum()

    @pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
    @pytest.mark.parametrize(
        ("name", "field", "ratio", "powers_of_two"),
        [("dolly", "instruction", 1.31, 1.81), ("gsm8k", "question", 1.15, 1.50), ("boolq", "passage", 1.18, 1.64)],
    )
    def test_padding_of_real_prompts(self, name, field, ratio, powers_of_two):
        """The figures of the module's docstring."""
        lines = (SHARED / "data" / f"{name}_test.jsonl").read_text().splitlines()
        rows = [{"prompt": json.loads(line)[field]} for line in lines]
        examples = render(rows, load_tokenizer(SHARED / "weights" / "stories260K-hf"))
        lengths = [example.prompt_length for example in examples]
        total = sum(batch.tokens.size for batch in make_batches(examples, 8))
        assert round(total / sum(lengths), 2) == ratio
        assert round(computed([2**power for power in range(3, 14)], lengths, 8) / sum(lengths), 2) == powers_of_two


class TestMakeBatches:
    @settings(deadline=None, max_examples=100)
    @given(lengths=LENGTHS, batch_size=st.integers(1, 9), response=st.integers(0, 3), prompt_only=st.booleans())
    def test_every_example_once_and_in_its_place(self, lengths, batch_size, response, prompt_only):
        examples = examples_of(lengths, response)
        batches = make_batches(examples, batch_size, prompt_only=prompt_only)
        shapes = {batch.tokens.shape for batch in batches}
        assert len(shapes) <= MAX_BUCKETS and {shape[0] for shape in shapes} == {batch_size}
        back = [None] * len(examples)
        for batch in batches:
            assert batch.tokens.dtype == batch.lengths.dtype == batch.rows.dtype == np.int32
            real = batch.rows < len(examples)
            assert real[0] and not (np.diff(real.astype(int)) > 0).any()
            assert (batch.rows[~real] == len(examples)).all() and (batch.lengths[~real] == 1).all()
            assert (np.diff(batch.lengths[real]) >= 0).all()
            for tokens, length, row in zip(batch.tokens[real], batch.lengths, batch.rows, strict=False):
                assert back[row] is None and not tokens[length:].any()
                back[row] = tokens[:length]
        for one, tokens in zip(examples, back, strict=True):
            np.testing.assert_array_equal(tokens, one.token_ids[: one.prompt_length] if prompt_only else one.token_ids)

    @settings(deadline=None, max_examples=50)
    @given(lengths=LENGTHS, batch_size=st.integers(1, 9))
    def test_computes_what_the_ladder_says(self, lengths, batch_size):
        batches = make_batches(examples_of(lengths), batch_size)
        total = sum(batch.tokens.size for batch in batches)
        assert total >= sum(lengths)
        assert total == computed(choose_buckets(lengths, batch_size), lengths, batch_size)

    def test_same_input_same_batches(self):
        examples = examples_of([5, 3, 5, 9, 30])
        for one, two in zip(make_batches(examples, 2), make_batches(examples, 2), strict=True):
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_array_equal(one.rows, two.rows)

    def test_ties_keep_sample_order(self):
        (batch,) = make_batches(examples_of([4, 4, 3, 4]), 4)
        assert batch.rows.tolist() == [2, 0, 1, 3]

    def test_given_buckets(self):
        batches = make_batches(examples_of([3, 10]), 1, buckets=[40, 10, 10, 20])
        assert [batch.tokens.shape for batch in batches] == [(1, 10), (1, 10)]
        for buckets in ([9], [0, 10]):
            with pytest.raises(UserError, match="expected buckets of 1 up to the longest example, 10 tokens; got"):
                make_batches(examples_of([3, 10]), 1, buckets=buckets)

    def test_no_examples(self):
        assert make_batches([], 4) == []

    def test_too_long(self):
        examples = examples_of([3, 10, 12, 9])
        with pytest.raises(UserError, match=r"at most 9 tokens.* 2 of 4 are longer.* row 3 with 12") as caught:
            make_batches(examples, 2, max_length=9)
        assert "--truncate=left" in str(caught.value) and "\n" not in str(caught.value)
        assert len(make_batches(examples, 2, max_length=12)) == 2
        with pytest.raises(UserError, match=r"^a\.jsonl: expected prompts of at most 9"):
            refuse_long([9, 10], 9, "a.jsonl")

    def test_refuses_arguments(self):
        with pytest.raises(UserError, match="--batch_size=0: expected at least 1"):
            make_batches(examples_of([3]), 0)
