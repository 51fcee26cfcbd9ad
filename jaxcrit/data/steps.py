"""Training batches by number: the rows of step s follow from (seed, s) alone.

Nothing is carried from step to step, so a resumed run, or one on another number of processes, sees the same rows.
Every epoch is a permutation of all rows, cut into batches; the last batch of an epoch is filled up with empty rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import choose_widths
from jaxcrit.data.templates import Example

IGNORED = -100  # the label of what has no loss, as everywhere


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatch:
    """One process's part of a step, right padded with token 0.

    Attributes:
        tokens: ``[B, T]`` int32.
        labels: ``[B, T]`` int32, the token itself where it is part of a response, else -100; not shifted.
        lengths: ``[B]`` int32, true tokens of each row; 1 for a row that fills up the batch.
        rows: ``[B]`` int32, place of each row in the sample order; N for a row that fills up.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @property
    def loss_mask(self) -> np.ndarray:
        """``[B, T]`` bool: tokens that are to be predicted. The first of a row never is."""
        mask = self.labels != IGNORED
        mask[:, :1] = False
        return mask


class Steps:
    """The batches of a training run.

    Args:
        examples: N rendered rows, cut to the model's context.
        batch_size: rows per step, over all processes.
        seed: seed of the order; below 0 keeps the order of the rows.
        buckets: widths that batches are padded to; default `choose_widths` of these examples.
        beside: names of rows beside these (`Example.beside`) that have batches of their own, all of one width.

    Raises:
        UserError: no rows, a batch size below 1, or buckets that do not hold the longest example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        beside: Sequence[str] = (),
    ):
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: expected at least 1")
        if not examples:
            raise UserError("expected rows to train on, got none")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        lengths = [len(example.token_ids) for example in examples]
        self.buckets = tuple(sorted(buckets)) if buckets else choose_widths(lengths, batch_size)
        if self.buckets[-1] < max(lengths):
            raise UserError(f"expected buckets up to the longest example, {max(lengths)} tokens; got {self.buckets}")
        # One width, for each of theirs would be compiled beside each of these.
        others = {name: [one.beside[name] for one in examples] for name in beside}
        self.beside = {
            name: Steps(rows, batch_size, seed, [-(-max(len(one.token_ids) for one in rows) // 8) * 8])
            for name, rows in others.items()
        }

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response."""
        return max(len(example.token_ids) - example.prompt_length for example in self.examples)

    @property
    def per_epoch(self) -> int:
        """Steps in which every row comes once."""
        return -(-len(self.examples) // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """``[batch_size]`` int32: places of a step's rows in the sample order, N where a row fills up."""
        count = len(self.examples)
        epoch, place = divmod(step, self.per_epoch)
        order = np.arange(count)
        if self.seed >= 0:
            # Raw draws of a counter-based generator: unlike numpy's permutations, the same in every version.
            order = np.argsort(np.random.Philox(key=[self.seed, epoch]).random_raw(count), kind="stable")
        rows = np.full(self.batch_size, count, np.int32)
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        rows[: len(chosen)] = chosen
        return rows

    def batch(self, step: int, process: int = 0, processes: int = 1) -> TrainBatch:
        """The rows of a step that are one process's; all processes have batches of one shape.

        Args:
            step: 0-based, over all epochs.
            process: which.
            processes: how many share the batch.

        Raises:
            UserError: the batch does not divide among the processes.
        """
        if self.batch_size % processes:
            raise UserError(f"--batch_size={self.batch_size}: expected a multiple of the {processes} processes")
        rows = self.rows(step)
        share = self.batch_size // processes
        return self.of(rows[process * share : (process + 1) * share], rows)

    def of(self, rows: np.ndarray, beside: np.ndarray | None = None) -> TrainBatch:
        """Some rows by their places, as wide as these, or those that they stand ``beside``, need."""
        count, others = len(self.examples), rows if beside is None else beside
        longest = max((len(self.examples[row].token_ids) for row in others if row < count), default=1)
        return self._build(rows, next(bucket for bucket in self.buckets if bucket >= longest))

    def _build(self, rows: np.ndarray, width: int) -> TrainBatch:
        tokens = np.zeros((len(rows), width), np.int32)
        labels = np.full((len(rows), width), IGNORED, np.int32)
        lengths = np.ones(len(rows), np.int32)
        for slot, row in enumerate(rows):
            if row < len(self.examples):
                ids, start = self.examples[row].token_ids, self.examples[row].prompt_length
                lengths[slot] = len(ids)
                tokens[slot, : len(ids)] = ids
                labels[slot, start : len(ids)] = ids[start:]
        return TrainBatch(tokens, labels, lengths, rows)
