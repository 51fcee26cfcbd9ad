"""Batches to learn from, by step number alone: whoever resumes at step k sees what an uninterrupted run saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.training.step import TokenBatch

_MULTIPLE = 8
_HELD_OUT_SEED, _HELD_OUT_MOST = 0, 200


def prepare(examples: Sequence[Example], max_length: int, where: str = "", *, cut: bool = False) -> list[Example]:
    """Checks that every row has something to learn, and fits.

    Args:
        examples: rendered rows.
        max_length: most tokens of a row.
        where: the dataset, for messages.
        cut: drop what is beyond ``max_length`` instead of refusing the row.

    Raises:
        UserError: naming the first row without a response, too long, or of which cutting leaves no response.
    """
    place = f"{where}: " if where else ""
    for number, example in enumerate(examples, 1):
        if len(example.token_ids) <= example.prompt_length:
            raise UserError(f"{place}row {number} has no response to learn from; give rows with prompt and response")
        if len(example.token_ids) > max_length:
            if not cut:
                raise UserError(
                    f"{place}row {number} has {len(example.token_ids)} tokens, the model takes {max_length};"
                    f" remove it, or cut what is too long with --max_length={max_length}"
                )
            if example.prompt_length >= max_length:
                raise UserError(
                    f"{place}row {number}: its prompt alone fills --max_length={max_length} tokens, so no response is"
                    " left to learn from; remove it or give more"
                )
    return [
        dataclasses.replace(example, token_ids=example.token_ids[:max_length]) for example in examples
    ]  # fmt: skip


def hold_out(examples: Sequence[Example], where: str = "") -> tuple[list[Example], list[Example]]:
    """Parts rows into training and test: a tenth, at most 200, always the same ones; equal rows go together.

    Raises:
        UserError: fewer than two different rows.
    """
    identities = sorted({example.sample_id for example in examples})
    if len(identities) < 2:
        raise UserError(f"{where}: expected two different rows or more, to hold one out; or give --eval_data")
    count = min(max(1, len(identities) // 10), _HELD_OUT_MOST)
    drawn = np.random.default_rng(_HELD_OUT_SEED).permutation(len(identities))[:count]
    held = {identities[index] for index in drawn}
    train = [example for example in examples if example.sample_id not in held]
    return train, [example for example in examples if example.sample_id in held]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRows:
    """Rows in a shuffled order without end: a fresh permutation for each pass over them.

    Attributes:
        examples: N rows.
        micro: micro-batches of a step.
        rows: of each micro-batch.
        seed: of the order.
    """

    examples: Sequence[Example]
    micro: int
    rows: int
    seed: int

    @property
    def per_step(self) -> int:
        """Rows of a step."""
        return self.micro * self.rows

    def batch(self, step: int) -> TokenBatch:
        """The ``[micro, rows, T]`` batch of a step (0-based); T is the same for all steps.

        Raises:
            UserError: no token in it is to be learnt.
        """
        place = np.arange(step * self.per_step, (step + 1) * self.per_step)
        chosen = np.empty(len(place), np.int64)
        for epoch in np.unique(place // len(self.examples)):
            here = place // len(self.examples) == epoch
            order = np.random.default_rng((self.seed, int(epoch))).permutation(len(self.examples))
            chosen[here] = order[place[here] % len(self.examples)]
        longest = max(len(example.token_ids) for example in self.examples)
        batch = token_batch([self.examples[index] for index in chosen], -(-longest // _MULTIPLE) * _MULTIPLE)
        if not batch.learn.any():
            raise UserError(f"step {step + 1}: none of its {self.per_step} rows has a response token to learn")
        shape = (self.micro, self.rows)
        return TokenBatch(*(part.reshape(*shape, *part.shape[1:]) for part in dataclasses.astuple(batch)))


def token_batch(examples: Sequence[Example], width: int) -> TokenBatch:
    """Right-pads rows to ``[B, width]``; what is learnt is what follows the prompt."""
    lengths = np.asarray([len(example.token_ids) for example in examples], np.int32)
    prompts = np.asarray([example.prompt_length for example in examples])
    tokens = np.zeros((len(examples), width), np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.token_ids)] = example.token_ids
    at = np.arange(width)
    return TokenBatch(tokens, lengths, (at >= prompts[:, None]) & (at < lengths[:, None]))


def evaluation_batches(examples: Sequence[Example], batch_size: int) -> list[TokenBatch]:
    """All rows once, in buckets of like length; rows that fill up a batch have nothing to learn."""
    prompts = np.asarray([example.prompt_length for example in examples] + [1])
    batches = []
    for batch in make_batches(examples, batch_size, prompt_only=False):
        at = np.arange(batch.tokens.shape[1])
        learn = (at >= prompts[batch.rows][:, None]) & (at < batch.lengths[:, None])
        batches.append(TokenBatch(batch.tokens, batch.lengths, learn))
    return batches
