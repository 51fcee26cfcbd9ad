"""Batches of a few fixed shapes: one compile per shape, little padding.

A shape is a number of rows and a length. Padding is what few shapes cost, a compile is what each more costs, and small
batches leave nothing to fill up but read the weights for fewer tokens. So shapes are chosen from the data, by cost: a
`Budget` says in tokens what a shape and a batch cost. For 300 questions of Dolly, GSM8K and BoolQ (its passages) at
most 8 at a time that is 1.13, 1.06 and 1.04 times the true tokens, where powers of two make it 1.81, 1.50 and 1.64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.reading import fitting
from jaxcrit.data.templates import Example

Shape = tuple[int, int]  # rows, and tokens of each

MOST_SHAPES = 32
_MULTIPLE = 8
# Places in the order of lengths where a shape may end: every one among so many, and so many of the others. Its square
# is what choosing costs.
_LONGEST, _OTHERS = 512, 512


@dataclasses.dataclass(frozen=True)
class Budget:
    """What batches may be and what they cost beside the tokens in them, in tokens; `Model.budget` knows a model's.

    Attributes:
        rows: rows of a batch, at most.
        least: and at least; there may be so many, twice as many, and so on, below ``rows``.
        shape: cost of one more shape.
        batch: cost of one more batch.
        row: cost of a row, whatever its length.
    """

    rows: int
    least: int = 1
    shape: float = 140
    batch: float = 32
    row: float = 0

    @property
    def sizes(self) -> list[int]:
        """Rows that a batch may have, ascending."""
        sizes = [self.least]
        while sizes[-1] * 2 < self.rows:
            sizes.append(sizes[-1] * 2)
        return sizes if sizes[-1] == self.rows else [*sizes, self.rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Examples of similar length, right padded with token 0.

    Attributes:
        tokens: ``[B, T]`` int32.
        lengths: ``[B]`` int32, true tokens of each row; 1 for a row that fills up the batch.
        rows: ``[B]`` int32, place of each row in the sample order; N, out of range, for a row that fills up,
            so that a scatter drops it.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows ``start`` to ``stop`` in the order of lengths, in batches of one shape."""

    start: int
    stop: int
    shape: Shape


def choose_shapes(
    lengths: Sequence[int] | np.ndarray,
    budget: Budget,
    *,
    max_length: int | None = None,
    most: int = MOST_SHAPES,
) -> tuple[Shape, ...]:
    """Chooses the shapes that samples of these lengths are cheapest run in.

    Args:
        lengths: ``[N]`` tokens per sample, at least 1 each.
        budget: rows of batches, and costs.
        max_length: the model's context; longer samples count as cut to it.
        most: shapes, at most.

    Returns:
        Rows and length of each; the last is the longest and holds the longest sample.

    Example:
        >>> choose_shapes([3, 5, 7, 8, 60, 61, 63, 64], Budget(rows=4))
        ((4, 8), (4, 64))
    """
    longest = max_length or int(max(lengths)) + _MULTIPLE
    ordered = np.sort(np.minimum(lengths, longest))
    while len(shapes := {run.shape for run in _cheapest(ordered, budget, None, longest)}) > most:
        budget = dataclasses.replace(budget, shape=2 * budget.shape + 1)
    return tuple(sorted(shapes, key=lambda shape: shape[::-1]))


def common_shapes(
    parts: Iterable[Sequence[Example]], budget: Budget, *, prompt_only: bool = True, max_length: int | None = None
) -> tuple[Shape, ...]:
    """The shapes for examples that are run in several parts, so that a shape compiles once for all of them."""
    lengths = [_length(example, prompt_only) for examples in parts for example in examples]
    return choose_shapes(lengths, budget, max_length=max_length) if lengths else ()


def choose_widths(lengths: Sequence[int] | np.ndarray, rows: int) -> tuple[int, ...]:
    """Chooses at most 8 lengths for batches of so many rows each."""
    return tuple(length for _, length in choose_shapes(lengths, Budget(rows, least=rows), most=8))


def _length(example: Example, prompt_only: bool) -> int:
    return example.prompt_length if prompt_only else len(example.token_ids)


def _cheapest(lengths: np.ndarray, budget: Budget, shapes: Sequence[Shape] | None, longest: int) -> list[_Run]:
    """Cuts samples, in the order of their lengths ``[N]``, into runs of one shape each, for the least cost.

    Exact dynamic programme over where a run may end: with c(i, j) = min over rows B of ceil((j - i) / B) batches of
    B rows as long as sample j needs, best(j) = min_i best(i) + c(i, j) + cost of a shape. O(J^2) for J places.

    Args:
        lengths: ascending.
        budget: rows of batches, and costs.
        shapes: shapes to use, which cost nothing; None for any, their lengths rounded up to a multiple of 8.
        longest: that lengths are not rounded beyond.
    """
    fitting((budget.rows, int(lengths[-1])), 4, "take fewer rows at a time, with --batch_size")
    count = len(lengths)
    step = budget.rows * -(-max(count - _LONGEST, 0) // (_OTHERS * budget.rows)) or 1
    places = np.unique([*range(0, count - _LONGEST, step), *range(max(count - _LONGEST, 0), count + 1)])
    needed = lengths[places[1:] - 1]
    options = []
    if shapes is None:
        options = [(rows, np.minimum(-(-needed // _MULTIPLE) * _MULTIPLE, longest)) for rows in budget.sizes]
    for rows in sorted({rows for rows, _ in shapes or ()}):
        ladder = np.array([*sorted(length for size, length in shapes or () if size == rows), np.inf])
        options.append((rows, ladder[np.searchsorted(ladder, needed)]))
    best, last = np.full(len(places), np.inf), [(0, (0, 0))] * len(places)
    best[0] = 0
    for end in range(1, len(places)):
        held = places[end] - places[:end]
        for rows, widths in options:
            width = widths[end - 1]
            costs = best[:end] + -(-held // rows) * (rows * (width + budget.row) + budget.batch)
            start = int(costs.argmin())
            cost = costs[start] + (budget.shape if shapes is None else 0)
            if cost < best[end]:
                best[end], last[end] = cost, (start, (rows, int(width)))
    runs, end = [], len(places) - 1
    while end > 0:
        start, shape = last[end]
        runs.append(_Run(int(places[start]), int(places[end]), shape))
        end = start
    return runs[::-1]


def make_batches(
    examples: Sequence[Example],
    budget: Budget | int,
    shapes: Sequence[Shape] | None = None,
    prompt_only: bool = True,
    *,
    max_length: int | None = None,
) -> list[Batch]:
    """Cuts examples into batches of few shapes.

    Every example is in exactly one batch, in order of length; `Batch.rows` puts results back in sample order.

    Args:
        examples: N rendered rows.
        budget: rows of batches, and costs; a number for so many rows in every batch. What is left over fills up.
        shapes: rows and length that batches have; default `choose_shapes` of these examples.
        prompt_only: leave the responses out.
        max_length: the model's context; what is longer must be cut before (`jaxcrit.data.truncation`).

    Raises:
        UserError: a batch size below 1, examples longer than the context, or shapes that do not hold the longest.
    """
    if isinstance(budget, int):
        budget = Budget(budget, least=budget)
    if budget.rows < 1:
        raise UserError(f"--batch_size={budget.rows}: expected at least 1")
    if not examples:
        return []
    sequences = [example.token_ids[: _length(example, prompt_only)] for example in examples]
    if max_length is not None:
        refuse_long([len(sequence) for sequence in sequences], max_length)
    lengths = np.array([len(sequence) for sequence in sequences])
    shapes = choose_shapes(lengths, budget, max_length=max_length) if shapes is None else shapes
    if min(map(min, shapes)) < 1 or max(length for _, length in shapes) < lengths.max():
        raise UserError(f"expected shapes of 1 up to the longest example, {lengths.max()} tokens; got {sorted(shapes)}")
    order = np.argsort(lengths, kind="stable")
    return [
        _batch(order[start : min(start + run.shape[0], run.stop)], sequences, *run.shape)
        for run in _cheapest(lengths[order], budget, shapes, 0)
        for start in range(run.start, run.stop, run.shape[0])
    ]


def response_mask(batch: Batch, examples: Sequence[Example]) -> np.ndarray:
    """``[B, T]`` bool, the tokens of a batch that belong to a response; none in rows that fill up the batch."""
    prompts = np.asarray([example.prompt_length for example in examples] + [1])
    at = np.arange(batch.tokens.shape[1])
    return (at >= prompts[batch.rows][:, None]) & (at < batch.lengths[:, None])


def _batch(members: np.ndarray, sequences: list[np.ndarray], batch_size: int, width: int) -> Batch:
    tokens = np.zeros((batch_size, width), dtype=np.int32)
    lengths = np.ones(batch_size, dtype=np.int32)
    rows = np.full(batch_size, len(sequences), dtype=np.int32)
    rows[: len(members)] = members
    for slot, member in enumerate(members):
        lengths[slot] = len(sequences[member])
        tokens[slot, : lengths[slot]] = sequences[member]
    return Batch(tokens, lengths, rows)


def refuse_equal_prompts(examples: Sequence[Example]) -> None:
    """Refuses prompts of the same tokens, which no model can tell apart.

    Raises:
        UserError: there are some; which two come first.
    """
    seen: dict[bytes, int] = {}
    for row, example in enumerate(examples):
        first = seen.setdefault(example.token_ids[: example.prompt_length].tobytes(), row)
        if first != row:
            raise UserError(f"samples {first} and {row}, counted from 0, are the same prompt; remove the duplicates")


def refuse_long(lengths: Sequence[int], max_length: int, where: str = "") -> None:
    """Refuses prompts longer than the model's context, naming how many, and the longest.

    Args:
        lengths: ``[N]`` tokens per sample.
        max_length: the model's context.
        where: the dataset, for the message.

    Raises:
        UserError: some are longer.
    """
    too_long = [length for length in lengths if length > max_length]
    if too_long:
        raise UserError(
            f"{where}{': ' if where else ''}expected prompts of at most {max_length} tokens, the model's context;"
            f" {len(too_long)} of {len(lengths)} are longer, the longest is row {lengths.index(max(too_long)) + 1}"
            f" with {max(too_long)}; drop them with --long=drop, or keep their ends with"
            " --truncate=left (their beginnings with right)"
        )
