"""Training batches: every row once an epoch, the same for any split among processes, rebuilt from (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.data.steps import IGNORED, Steps
from jaxcrit.data.templates import Example


def examples_of(lengths):
    return [
        Example(f"{n}", np.arange(100 * n + 1, 100 * n + 1 + length, dtype=np.int32), max(1, length // 2), "", "a")
        for n, length in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 7), seed=st.integers(-1, 5), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_row_once(lengths, batch_size, seed, epoch):
    steps = Steps(examples_of(lengths), batch_size, seed)
    numbers = range(epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch)
    rows = np.concatenate([steps.rows(number) for number in numbers])
    assert sorted(rows[rows < len(lengths)]) == list(range(len(lengths)))
    assert len(rows) - len(lengths) < batch_size
    if seed < 0:
        assert rows[: len(lengths)].tolist() == list(range(len(lengths)))


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, processes=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 20))
def test_processes_share_one_batch(lengths, processes, step):
    whole = Steps(examples_of(lengths), 12, 3).batch(step)
    parts = [Steps(examples_of(lengths), 12, 3).batch(step, process, processes) for process in range(processes)]
    for field in ("tokens", "labels", "lengths", "rows"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, step=st.integers(0, 20))
def test_tokens_labels_and_mask_are_those_of_the_row(lengths, step):
    examples = examples_of(lengths)
    batch = Steps(examples, 4, 0).batch(step)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape
    for tokens, labels, mask, length, row in zip(
        batch.tokens, batch.labels, batch.loss_mask, batch.lengths, batch.rows, strict=True
    ):
        if row == len(examples):
            assert not tokens.any() and (labels == IGNORED).all() and length == 1
            continue
        ids, prompt = examples[row].token_ids, examples[row].prompt_length
        assert tokens[:length].tolist() == ids.tolist() and not tokens[length:].any()
        assert labels[:prompt].tolist() == [IGNORED] * min(prompt, length)
        assert labels[prompt:length].tolist() == ids[prompt:].tolist() and (labels[length:] == IGNORED).all()
        np.testing.assert_array_equal(mask, labels != IGNORED)


def test_rows_of_a_step_are_these_in_every_version():
    steps = Steps(examples_of([3] * 10), 4, 7)
    assert [steps.rows(number).tolist() for number in (0, 2, 3)] == [[8, 4, 1, 6], [9, 0, 10, 10], [3, 9, 1, 6]]


def test_another_seed_and_another_epoch_are_another_order():
    one, other = (Steps(examples_of([3] * 50), 50, seed) for seed in (0, 1))
    orders = [tuple(one.rows(0)), tuple(one.rows(1)), tuple(other.rows(0))]
    assert len(set(orders)) == 3


def test_the_first_token_is_never_predicted():
    cut = Example("a", np.arange(1, 5, dtype=np.int32), 0, "", "a")
    assert Steps([cut], 1, 0).batch(0).loss_mask[0, :4].tolist() == [False, True, True, True]


def test_given_buckets():
    steps = Steps(examples_of([3, 10]), 1, -1, buckets=[40, 10, 20])
    assert [steps.batch(n).tokens.shape for n in (0, 1)] == [(1, 10), (1, 10)]


def test_refuses():
    for call, message in (
        (lambda: Steps([], 1, 0), "rows to train on, got none"),
        (lambda: Steps(examples_of([3]), 0, 0), "--batch_size=0: expected at least 1"),
        (lambda: Steps(examples_of([3]), 1, 0, buckets=[2]), "up to the longest example, 3 tokens"),
        (lambda: Steps(examples_of([3]), 4, 0).batch(0, 0, 3), "a multiple of the 3 processes"),
    ):
        with pytest.raises(UserError, match=message):
            call()
