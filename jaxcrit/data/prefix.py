"""The beginning of a prompt that another model has read: up to where its keys and values may be reused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import PrefixOptions
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import Example


def with_prefixes(
    datasets: Sequence[Dataset], options: PrefixOptions, *, boundary: int | None = None, reserve: int = 0
) -> list[Dataset]:
    """The rows with their prefixes; those of a context are where rendering has put them.

    Args:
        datasets: rendered rows.
        options: what a prefix is.
        boundary: tokens beyond which the model's RoPE (longrope) takes other frequencies; None where it has one kind.
        reserve: tokens of an answer that are not there yet; 0 where rows have theirs.

    Raises:
        UserError: a prefix of no tokens, one with no token of the prompt behind it, or one that rotates otherwise than
            its whole row; it names the rows.
    """
    found = [dataclasses.replace(one, examples=_prefixed(one, options)) for one in datasets]
    if boundary is None:
        return found
    for one in found:
        lengths = [row.prompt_length + reserve if reserve else len(row.token_ids) for row in one.examples]
        pairs = enumerate(zip(one.examples, lengths, strict=True), 1)
        if over := [number for number, (row, length) in pairs if row.prefix_length <= boundary < length]:
            raise UserError(
                f"{one.source}: row {listed(over)}: the prefix lies on one side of the {boundary} tokens at which the"
                " model's longrope takes other frequencies, the whole on the other: no cache serves both; leave these"
                " rows out"
            )
    return found


def _prefixed(dataset: Dataset, options: PrefixOptions) -> list[Example]:
    share, found = options.share, dataset.examples
    if share is not None:
        lengths = [max(1, min(int(share * one.prompt_length), one.prompt_length - 1)) for one in found]
        found = [dataclasses.replace(one, prefix_length=length) for one, length in zip(found, lengths, strict=True)]
    where = f"{dataset.source}: --prefix={options.prefix}"
    if short := [row for row, one in enumerate(found, 1) if one.prefix_length < 1]:
        raise UserError(
            f"{where}: no context in row {listed(short)}; leave such rows out, give each a prefix"
            ' ({"prefix": ..., "prompt": ...}), or cut by share (--prefix=0.8)'
        )
    if whole := [row for row, one in enumerate(found, 1) if one.prefix_length >= one.prompt_length]:
        raise UserError(f"{where}: nothing of the prompt is left behind the prefix in row {listed(whole)}; cut earlier")
    return found
