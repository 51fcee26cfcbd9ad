"""Answers of a model to the prompts of a batch, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcrit.data.batches import Batch
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.generation import Prefilled, decode, prefill
from jaxcrit.models.model import Model


class Answer(NamedTuple):
    """One answer.

    Attributes:
        row: place of its prompt among all.
        token_ids: tokens, without the one that ended it.
        stopped: whether it came to an end by itself.
        text: the tokens decoded, special ones left out.
    """

    row: int
    token_ids: list[int]
    stopped: bool
    text: str


def answers(
    model: Model,
    decoder: Decoder,
    batch: Batch,
    count: int,
    max_new_tokens: int,
    *,
    stop: Sequence[int],
    prompts: Prefilled | None = None,
    numbers: np.ndarray | None = None,
    **sampling: Any,
) -> Iterator[Answer]:
    """Lets a model answer a batch; rows that fill it up are left out.

    Args:
        model: tokenizer and mesh.
        decoder: weights that answer.
        batch: prompts.
        count: number of all prompts; a row of that number fills up.
        max_new_tokens: tokens of each answer, at most.
        stop: tokens that end an answer.
        prompts: the batch, where it has been run already.
        numbers: number by row that an answer's draws follow from; default the row.
        **sampling: arguments of `generate`: ``sampling`` and ``seed``.
    """
    numbers = np.arange(count) if numbers is None else numbers
    samples = np.append(numbers, -1)[batch.rows]
    if prompts is None:
        prompts = prefill(decoder, batch.tokens, batch.lengths, max_new_tokens, mesh=model.mesh)
    found = decode(decoder, prompts, stop=stop, samples=samples, **sampling)
    for row, ids, stopped in zip(batch.rows.tolist(), found.token_ids, found.stopped.tolist(), strict=True):
        if row < count:
            yield Answer(row, ids, stopped, model.tokenizer.decode(ids, skip_special_tokens=True))
