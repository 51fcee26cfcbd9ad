"""Batches: nothing lost, repeated or reordered, few shapes, and no way to cut them that costs less."""

import json

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import (
    MOST_SHAPES,
    Budget,
    choose_shapes,
    choose_widths,
    common_shapes,
    make_batches,
    refuse_long,
)
from jaxcrit.data.templates import Example, render
from jaxcrit.data.tokenizer import load_tokenizer


def example(length, response=0, seed=0):
    ids = np.random.default_rng([seed, length]).integers(1, 100, length + response).astype(np.int32)
    return Example(f"id{seed}", ids, length, "", None)


def examples_of(lengths, response=0):
    return [example(length, response, seed) for seed, length in enumerate(lengths)]


def computed(shapes, lengths):
    """Tokens computed in batches of these shapes, one size of batch for each length, counted the slow way."""
    (size,) = {rows for rows, _ in shapes}
    of = [min(length for _, length in shapes if length >= one) for one in lengths]
    return sum(length * size * -(-of.count(length) // size) for length in set(of))


def cheapest(lengths, budget):
    """The least cost over every way to cut the lengths, in ascending order, into runs and to give each a shape."""
    ordered = sorted(lengths)
    best = [0.0]
    for stop in range(1, len(ordered) + 1):
        length = -(-ordered[stop - 1] // 8) * 8
        best.append(
            min(
                best[start] + budget.shape + -(-(stop - start) // rows) * (rows * (length + budget.row) + budget.batch)
                for start in range(stop)
                for rows in budget.sizes
            )
        )
    return best[-1]


def spent(batches, budget):
    """The cost of batches that are there."""
    rows = sum(len(batch.rows) for batch in batches)
    shapes = len({batch.tokens.shape for batch in batches})
    tokens = sum(batch.tokens.size for batch in batches)
    return tokens + rows * budget.row + len(batches) * budget.batch + shapes * budget.shape


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)
# Lengths as prompts have them: lognormal, mean about 120, a few of a thousand.
FIXED = np.clip(np.random.default_rng(0).lognormal(4.3, 0.9, 300), 8, 1500).astype(int)


# Padding (tokens computed to tokens) and number of shapes of `FIXED`.
PADDING = {"dear": (1.358, 6), "usual": (1.096, 19), "cheap": (1.072, 25), "equal": (1.224, 17)}


class TestChooseShapes:
    @settings(deadline=None, max_examples=60)
    @given(
        lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30),
        rows=st.integers(1, 9),
        least=st.integers(1, 3),
        costs=st.tuples(st.integers(0, 300), st.integers(0, 60), st.integers(0, 20)),
    )
    def test_no_batches_cost_less(self, lengths, rows, least, costs):
        budget = Budget(rows * least, least, *costs)
        batches = make_batches(examples_of(lengths), budget)
        assert spent(batches, budget) <= cheapest(lengths, budget) + 1e-6
        assert {batch.tokens.shape[0] for batch in batches} <= set(budget.sizes)
        assert all(batch.tokens.shape[0] % least == 0 for batch in batches)

    @pytest.mark.parametrize(("rows", "least", "sizes"), [(8, 1, [1, 2, 4, 8]), (6, 1, [1, 2, 4, 6]), (8, 8, [8])])
    def test_sizes(self, rows, least, sizes):
        assert Budget(rows, least).sizes == sizes

    def test_few_shapes_and_little_padding(self):
        """Padding and compiles of a fixed list: by costs, by number, and of equally large batches."""
        of = {}
        for name, budget in {
            "dear": Budget(8, shape=1600),
            "usual": Budget(8),
            "cheap": Budget(8, shape=20),
            "equal": 8,
        }.items():
            batches = make_batches(examples_of(FIXED), budget)
            shapes = {batch.tokens.shape for batch in batches}
            of[name] = round(sum(batch.tokens.size for batch in batches) / FIXED.sum(), 3), len(shapes)
        assert of == PADDING

    def test_bounded_and_sorted(self):
        chosen = choose_shapes(range(1, 3000), Budget(4, shape=0))
        assert len(chosen) <= MOST_SHAPES and chosen[-1][1] >= 2999
        assert len(choose_shapes(range(1, 500), Budget(4), most=2)) <= 2
        assert list(chosen) == sorted(set(chosen), key=lambda shape: shape[::-1])
        widths = choose_widths(range(1, 500), 4)
        assert len(widths) <= 8 and widths == tuple(sorted(set(widths))) and widths[-1] >= 499

    def test_no_longer_than_the_context(self):
        assert choose_shapes([100, 101], Budget(1), max_length=101)[-1] == (1, 101)
        assert choose_shapes([100, 300], Budget(1), max_length=101)[-1] == (1, 101)

    def test_many_lengths_stay_cheap(self):
        lengths = np.arange(1, 40_000, 7)
        chosen = choose_shapes(lengths, Budget(8))
        assert len(chosen) <= MOST_SHAPES and chosen[-1][1] >= lengths.max()
        ladder = np.array(sorted({length for _, length in chosen}))
        assert ladder[np.searchsorted(ladder, lengths)].sum() < 1.05 * lengths.sum()

    def test_parts_share_their_shapes(self):
        parts = [examples_of(FIXED[:150].tolist(), response=2), examples_of(FIXED[150:].tolist(), response=2)]
        assert common_shapes(parts, Budget(8)) == choose_shapes(FIXED, Budget(8))
        shapes = common_shapes(parts, Budget(8), prompt_only=False)
        assert shapes == choose_shapes(FIXED + 2, Budget(8)) and common_shapes([], Budget(8)) == ()
        for part in parts:
            batches = make_batches(part, Budget(8), shapes, prompt_only=False)
            assert {batch.tokens.shape for batch in batches} <= set(shapes)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
    @pytest.mark.parametrize(
        ("name", "field", "ratio", "powers_of_two"),
        [("dolly", "instruction", 1.13, 1.81), ("gsm8k", "question", 1.06, 1.50), ("boolq", "passage", 1.04, 1.64)],
    )
    def test_padding_of_real_prompts(self, name, field, ratio, powers_of_two):
        """The figures of the module's docstring."""
        lines = (SHARED / "data" / f"{name}_test.jsonl").read_text().splitlines()
        rows = [{"prompt": json.loads(line)[field]} for line in lines]
        examples = render(rows, load_tokenizer(SHARED / "weights" / "stories260K-hf"))
        lengths = [example.prompt_length for example in examples]
        total = sum(batch.tokens.size for batch in make_batches(examples, Budget(8)))
        assert round(total / sum(lengths), 2) == ratio
        assert round(computed([(8, 2**power) for power in range(3, 14)], lengths) / sum(lengths), 2) == powers_of_two


class TestMakeBatches:
    @settings(deadline=None, max_examples=100)
    @given(lengths=LENGTHS, batch_size=st.integers(1, 9), response=st.integers(0, 3), prompt_only=st.booleans())
    def test_every_example_once_and_in_its_place(self, lengths, batch_size, response, prompt_only):
        examples = examples_of(lengths, response)
        batches = make_batches(examples, batch_size, prompt_only=prompt_only)
        assert {batch.tokens.shape[0] for batch in batches} == {batch_size}
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

    def test_same_input_same_batches(self):
        examples = examples_of([5, 3, 5, 9, 30])
        for one, two in zip(make_batches(examples, 2), make_batches(examples, 2), strict=True):
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_array_equal(one.rows, two.rows)

    def test_ties_keep_sample_order(self):
        (batch,) = make_batches(examples_of([4, 4, 3, 4]), 4)
        assert batch.rows.tolist() == [2, 0, 1, 3]

    def test_given_shapes(self):
        batches = make_batches(examples_of([3, 10]), 1, [(1, 40), (1, 10), (1, 10), (1, 20)])
        assert [batch.tokens.shape for batch in batches] == [(1, 10), (1, 10)]
        (batch,) = make_batches(examples_of([3, 10]), Budget(2), [(1, 40), (2, 10)])
        assert batch.tokens.shape == (2, 10)
        for shapes in ([(1, 9)], [(0, 10)], [(1, 0), (1, 10)]):
            with pytest.raises(UserError, match="expected shapes of 1 up to the longest example, 10 tokens; got"):
                make_batches(examples_of([3, 10]), 1, shapes)

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
