"""The beginning of a prompt that another model has read: up to where its keys and values may be reused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import PrefixOptions
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import Example


def with_prefixes(datasets: Sequence[Dataset], options: PrefixOptions) -> list[Dataset]:
    """The rows with their prefixes; those of a context are where rendering has put them.

    Raises:
        UserError: a prefix of no tokens, or one with no token of the prompt behind it; it names the rows.
    """
    return [dataclasses.replace(one, examples=_prefixed(one, options)) for one in datasets]


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
