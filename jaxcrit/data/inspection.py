"""What a person wants to see of rendered rows: their text, mask visible, and statistics of their lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcrit.data.templates import Example
from jaxcrit.data.truncation import Fitted


@dataclasses.dataclass(frozen=True)
class Shown:
    """One rendered row as text.

    Attributes:
        dataset: its name.
        row: 1-based.
        num_tokens: all of them.
        prompt_length: those without loss.
        prompt: text of the tokens without loss, special tokens spelled out.
        target: text of the tokens with loss.
    """

    dataset: str
    row: int
    num_tokens: int
    prompt_length: int
    prompt: str
    target: str


def show(example: Example, tokenizer: Any, dataset: str, row: int) -> Shown:
    """One rendered row as text."""
    return Shown(dataset, row, len(example.token_ids), example.prompt_length, *texts(example, tokenizer))


def texts(example: Example, tokenizer: Any) -> tuple[str, str]:
    """Text of the masked tokens, and of those with loss, special tokens spelled out."""
    prompt, target, whole = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for ids in (
            example.token_ids[: example.prompt_length],
            example.token_ids[example.prompt_length :],
            example.token_ids,
        )
    )
    # Some tokenizers drop the space that a text begins with; the whole has it.
    return prompt, whole.removeprefix(prompt) if whole.startswith(prompt) else target


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens per row of one dataset, before any cut.

    Attributes:
        num_rows: N.
        prompt: least, median and most tokens of the prompts.
        response: the same of what follows the prompts.
        truncated: share of the rows that were cut.
        num_dropped: rows that were left out for being too long.
        too_long: share of the rows that are longer than the limit, cut or not.
        without_response: share of the rows in which no response is left, or there was none.
    """

    num_rows: int
    prompt: tuple[int, int, int]
    response: tuple[int, int, int]
    truncated: float
    num_dropped: int
    too_long: float
    without_response: float


def measure(before: Sequence[Example], fitted: Fitted) -> Lengths:
    """Statistics of one dataset.

    Args:
        before: rendered rows.
        fitted: the same rows, cut, some left out.
    """
    total = np.array([len(example.token_ids) for example in before])
    prompt = np.array([example.prompt_length for example in before])
    stays = np.ones(len(before), bool)
    stays[list(fitted.dropped)] = False
    left = np.array([len(example.token_ids) > example.prompt_length for example in fitted.examples])
    answered = np.array([example.response is not None for example in fitted.examples])
    return Lengths(
        len(total),
        _spread(prompt),
        _spread(total - prompt),
        fitted.num_cut / len(total),
        len(fitted.dropped),
        float(np.mean(total > fitted.limit)),
        float(np.sum(~(left & answered)) / len(total)),
    )


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())
